"""Writes a model of a real shape with random weights, to measure loading and speed without a download.

    python scripts/make_random_model.py --shape llama-3.2-1b --out /tmp/llama-1b

The folder is in Hugging Face layout (config.json, model.safetensors in bf16, the demo's tokenizer). Only numpy is
needed. The weights are small random numbers: answers are noise, shapes and costs are real.
"""

import argparse
import json
import pathlib
import shutil
import struct

import numpy as np

DEMO = pathlib.Path(__file__).resolve().parents[1] / "assets/demo/model"

SHAPES = {
    "llama-3.2-1b": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256,
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
        "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    },
}


def tensors(c: dict):
    """Yields (name, shape) of every weight."""
    h, f, d = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    yield "model.embed_tokens.weight", (c["vocab_size"], h)
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        yield p + "input_layernorm.weight", (h,)
        yield p + "post_attention_layernorm.weight", (h,)
        for name, shape in [("q", (q, h)), ("k", (kv, h)), ("v", (kv, h)), ("o", (h, q))]:
            yield f"{p}self_attn.{name}_proj.weight", shape
        for name, shape in [("gate", (f, h)), ("up", (f, h)), ("down", (h, f))]:
            yield f"{p}mlp.{name}_proj.weight", shape
    yield "model.norm.weight", (h,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    config = {**SHAPES[args.shape], "hidden_act": "silu", "torch_dtype": "bfloat16",
              "bos_token_id": 0, "eos_token_id": 2}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, args.out / name)
    header, offset = {}, 0
    for name, shape in tensors(config):
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with open(args.out / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors(config):
            if len(shape) == 1:
                values = np.ones(shape, np.float32)
            else:
                values = rng.standard_normal(shape, np.float32) / np.float32(shape[1] ** 0.5)
            # bf16 is the upper half of an f32.
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    print(f"{args.out}: {offset / 2**20:.0f} MiB of weights")


if __name__ == "__main__":
    main()
