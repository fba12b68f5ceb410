"""PyTorch's times for the rows that `cartouche bench --shape` measured, on the same device by the same rules.

    python -m gpu_check.torch_peers SHAPE_CSV CONFIG_JSON DEVICE SECONDS

Prints a line of JSON per row and form as it is done: what, case, form, measured_ms, runs, peak_mib, note. Forms:
`flash` is attention over keys and values that lie ready behind each other, `flash with prefix` puts a shared
prefix before each sequence's own first, and sums its gradients over the sequences, which is what ours computes.
"""

import csv
import gc
import json
import statistics
import sys
import time

import torch

from .torch_attention import backend, sdpa, with_prefix
from .torch_llama import Llama, TrainStep

# As in src/bench/shape/measure.rs, with less patience.
WARMUP, LEAST, MOST, SECONDS = 3, 3, 100, 0.5


class Peers:
    def __init__(self, config: dict, device: str):
        self.config, self.device, self.cuda = config, device, device.startswith("cuda")
        self.model: Llama | None = None
        self.dtype = torch.bfloat16
        self.generator = torch.Generator(device).manual_seed(3)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def time(self, f) -> dict:
        def once() -> float:
            self.synchronize()
            began = time.perf_counter()
            f()
            self.synchronize()
            return time.perf_counter() - began

        warm = 0.0
        for _ in range(WARMUP):
            if warm < SECONDS:
                warm += once()
        times: list[float] = []
        while len(times) < LEAST or len(times) < MOST and sum(times) < SECONDS:
            times.append(once())
        return {
            "measured_ms": statistics.median(times) * 1e3,
            "min_ms": min(times) * 1e3,
            "max_ms": max(times) * 1e3,
            "runs": len(times),
        }

    def numbers(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, generator=self.generator, dtype=torch.float32).to(self.dtype)

    def heads(self) -> tuple[int, int, int]:
        c = self.config
        return c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]

    def roof(self, case: dict, row: dict):
        if "product" in row["case"]:
            side = int(case["side"])
            a, b = self.numbers(side, side), self.numbers(side, side)
            yield "matmul", self.time(lambda: a @ b.t())
        else:
            bytes_ = int(row["bytes"]) // 2
            a = torch.ones(bytes_, dtype=torch.uint8, device=self.device)
            b = torch.ones_like(a)
            yield "copy_", self.time(lambda: b.copy_(a))

    def attention(self, case: dict, _row: dict):
        tokens, length, prefix = int(case["tokens"]), int(case["length"]), int(case["prefix"])
        heads, kv_heads, dim = self.heads()
        batch = max(tokens // length, 1)
        # As a projection leaves them: [batch, rows, heads, dim], seen as [batch, heads, rows, dim].
        q = self.numbers(batch, length, heads, dim).transpose(1, 2)
        own = [self.numbers(batch, length, kv_heads, dim).transpose(1, 2) for _ in "kv"]
        shared = [self.numbers(kv_heads, prefix, dim) for _ in "kv"] if prefix else [None, None]
        forms = {"flash": [with_prefix(t, p).detach() for t, p in zip(own, shared)]}
        if prefix:
            forms["flash with prefix"] = None
        for form, ready in forms.items():
            leaves = [q, *ready] if ready else [q, *own, *shared]
            leaves = [leaf.detach().requires_grad_(case["pass"] == "backward") for leaf in leaves]

            def forward(leaves=leaves, ready=ready):
                if ready:
                    return sdpa(*leaves)
                q, k, v, keys, values = leaves
                return sdpa(q, with_prefix(k, keys), with_prefix(v, values))

            with backend(self.device):
                if case["pass"] == "forward":
                    with torch.no_grad():
                        yield form, self.time(forward)
                else:
                    out, grad = forward(), self.numbers(batch, heads, length, dim)
                    yield form, self.time(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))  # noqa

    def cartridge(self, case: dict, row: dict):
        """The attention of a decoding step: keys and values of the cartridge before each sequence's own."""
        if case["of"] != "attention" or case["cartridges"] != "1":
            return
        keys, batch = int(case["p"]) + int(case["suffix"]), int(case["sequences"])
        heads, kv_heads, dim = self.heads()
        layers = int(row["layers"])
        # More than any cache holds; all layers need not lie there at once.
        room = (torch.cuda.mem_get_info(self.device)[0] if self.cuda else 1 << 30) // 2
        kept = max(1, min(layers, room // (2 * 2 * batch * kv_heads * keys * dim)))
        q = self.numbers(batch, heads, 1, dim)
        kv = [tuple(self.numbers(batch, kv_heads, keys, dim) for _ in "kv") for _ in range(kept)]

        def step():
            for layer in range(layers):
                sdpa(q, *kv[layer % kept])

        with torch.no_grad(), backend(self.device):
            yield "flash", self.time(step)

    def train(self, case: dict, row: dict):
        if self.model is None:
            self.model = Llama(self.config, self.device, int(row["layers"]))
        tokens, length, targets = int(case["tokens"]), int(case["length"]), int(case["targets"])
        sequences = max(tokens // length, 1)
        prefix, recompute = int(case["p"]), case["recompute"] == "true"
        step = TrainStep(self.model, sequences, length, targets // sequences, int(case["top"]), prefix, recompute)
        held = 0
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            held = torch.cuda.memory_allocated(self.device)
        with backend(self.device):
            timed = self.time(step.run)
        if self.cuda:
            timed["peak_mib"] = (torch.cuda.max_memory_allocated(self.device) - held) / 2**20
        yield "autograd, flash", timed


def main(rows: str, config: str, device: str, seconds: str) -> None:
    until = time.monotonic() + float(seconds)
    with open(config, encoding="utf-8") as file:
        peers = Peers(json.load(file), device)
    with open(rows, newline="", encoding="utf-8") as file:
        jobs = [row for row in csv.DictReader(file) if row["measured_ms"]]
    for row in jobs:
        case = dict(pair.split("=", 1) for pair in row["case"].split() if "=" in pair)
        function = getattr(peers, row["what"], None)
        if function is None:
            continue
        line = {"what": row["what"], "case": row["case"]}
        if time.monotonic() > until:
            print(json.dumps(line | {"note": "no time was left for PyTorch"}), flush=True)
            continue
        try:
            for form, timed in function(case, row):
                print(json.dumps(line | {"form": form} | timed), flush=True)
        except Exception as error:  # a row that does not fit must not end the others
            said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            print(json.dumps(line | {"note": f"PyTorch: {type(error).__name__}: {said}"}), flush=True)
        gc.collect()
        if peers.cuda:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:])
