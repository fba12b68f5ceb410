"""Writes a GGUF file of a real shape with random Q8_0 weights, to compare speed with llama.cpp on the same file.

    pip install gguf numpy
    python scripts/make_random_gguf.py --out /tmp/llama-1b-q8_0.gguf

The shape is Llama-3.2-1B's, the vocabulary the demo model's, padded with unused tokens. Answers are noise; shapes
and costs are real.
"""

import argparse
import json
import pathlib

import gguf
import numpy as np

from make_random_model import DEMO, SHAPES

# A block of Q8_0: an f16 scale and 32 signed bytes.
BLOCK, BLOCK_BYTES = 32, 34
# With bytes spread evenly over -127..127 this gives weights a standard deviation of 0.02.
SCALE = np.float16(0.02 / 73.6)


def random_q8_0(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    blocks = np.empty((rows, columns // BLOCK, BLOCK_BYTES), np.uint8)
    blocks[..., :2] = np.frombuffer(SCALE.tobytes(), np.uint8)
    quants = rng.integers(-127, 128, (rows, columns // BLOCK, BLOCK), np.int8)
    blocks[..., 2:] = quants.view(np.uint8)
    return blocks.reshape(rows, -1)


def add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """The demo's byte-level BPE, so that both programs make the same tokens of a text."""
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    tokens = [f"<unused_{i}>" for i in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, token_id in tokenizer["model"]["vocab"].items():
        tokens[token_id], types[token_id] = token, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], gguf.TokenType.CONTROL
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    special = {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    writer.add_bos_token_id(min(special.values()))
    writer.add_eos_token_id(max(special.values()))
    writer.add_add_bos_token(False)
    template = json.loads((DEMO / "tokenizer_config.json").read_text()).get("chat_template")
    if template:
        writer.add_chat_template(template)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    c = SHAPES["llama-3.2-1b"]
    hidden, inner, head = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    rng = np.random.default_rng(0)

    writer = gguf.GGUFWriter(args.out, "llama")
    writer.add_name("random-llama-1b-q8_0")
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_vocab_size(c["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    add_vocabulary(writer, c["vocab_size"])

    def matrix(name: str, rows: int, columns: int) -> None:
        data = random_q8_0(rng, rows, columns)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    matrix("token_embd.weight", c["vocab_size"], hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for i in range(c["num_hidden_layers"]):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(hidden, np.float32))
        for name, rows, columns in [
            ("attn_q", q, hidden), ("attn_k", kv, hidden), ("attn_v", kv, hidden), ("attn_output", hidden, q),
            ("ffn_gate", inner, hidden), ("ffn_up", inner, hidden), ("ffn_down", hidden, inner),
        ]:
            matrix(f"blk.{i}.{name}.weight", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{args.out}: {args.out.stat().st_size >> 20} MiB")


if __name__ == "__main__":
    main()
