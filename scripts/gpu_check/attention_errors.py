"""Reads a case of training's attention that `cartouche bench --shape … --dump` wrote, computes it in f64 and with
PyTorch's scaled dot-product attention in bf16, and prints the errors of both as a line of JSON per tensor.

    python -m gpu_check.attention_errors FILE DEVICE
"""

import itertools
import json
import math
import struct
import sys

import torch

from .torch_attention import backend, exact, sdpa, with_prefix

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "I64": torch.int64,
}
OPERANDS = ["q", "k", "v", "prefix_keys", "prefix_values"]


def load(path: str) -> dict[str, torch.Tensor]:
    """A safetensors file, without the package."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header, data = json.loads(file.read(length)), bytearray(file.read())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        values = torch.frombuffer(data, dtype=torch.uint8, count=end - start, offset=start).clone()
        tensors[name] = values.view(TYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def compute(case: dict, dtype: torch.dtype, attend, device: str) -> dict[str, torch.Tensor]:
    """Result and gradients, each as wide as it came out."""
    leaves = {name: case[name].to(device, dtype).requires_grad_() for name in OPERANDS}
    grad = case["grad_out"].to(device, dtype)
    ends = case["cu_seqlens"].tolist()
    parts = []
    for start, end in itertools.pairwise(ends):

        def own(name, start=start, end=end):
            return leaves[name][start:end].transpose(0, 1)[None]

        k, v = with_prefix(own("k"), leaves["prefix_keys"]), with_prefix(own("v"), leaves["prefix_values"])
        parts.append(attend(own("q"), k, v)[0].transpose(0, 1))
    out = torch.cat(parts)
    out.backward(grad)
    results = {"out": out.detach()} | {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
    return {name: value.double().cpu() for name, value in results.items()}


def errors(got: torch.Tensor, want: torch.Tensor) -> dict[str, float]:
    if got.shape != want.shape:
        raise ValueError(f"shape {tuple(got.shape)}, not {tuple(want.shape)}")
    off = (got - want).abs()
    return {
        "most": off.max().item(),
        "mean": off.mean().item(),
        "relative": (off.norm() / want.norm()).item() if want.norm() > 0 else math.inf,
    }


def main(path: str, device: str) -> None:
    case = load(path)
    # Each is held to f64 of the very numbers it was given.
    want = compute(case, torch.float64, exact, "cpu")
    rounded = {name: case[name].bfloat16() for name in [*OPERANDS, "grad_out"]} | {"cu_seqlens": case["cu_seqlens"]}
    of_rounded = compute(rounded, torch.float64, exact, "cpu")
    with backend(device):
        theirs = compute(rounded, torch.bfloat16, sdpa, device)
    heads, dim = case["q"].shape[1:]
    about = {
        "dtype": str(case["q"].dtype).removeprefix("torch."),
        "heads": heads,
        "dim": dim,
        "kv_heads": case["k"].shape[1],
        "tokens": case["q"].shape[0],
        "prefix": case["prefix_keys"].shape[1],
    }
    for name, reference in want.items():
        line = {
            "tensor": name,
            "size": reference.abs().mean().item(),
            **about,
            "ours": errors(case[name].double(), reference),
            "sdpa": errors(theirs[name], of_rounded[name]),
        }
        print(json.dumps(line))


if __name__ == "__main__":
    main(*sys.argv[1:])
