"""Write the model in Hugging Face layout, the demo documents, and EVALUATION.json.

    python scripts/demo_model/export.py --work target/demo_model --out assets/demo

train.py calls this at its end; run it alone to export a checkpoint midway.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file

import evaluate
import tokenizer as tok
import world
from model import Config

DOCUMENTS = [   # folder, title, what it is about, seed
    ("harbour-log", "Harbour log", ("place",), 910_001),
    ("expedition", "Expedition journal", ("place", "person"), 910_002),
]

OTHER_ATTRIBUTE = 8     # so many of the absent questions are about known subjects


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_model(state, c, tokenizer, folder):
    folder.mkdir(parents=True, exist_ok=True)
    vocab = tokenizer.get_vocab_size()
    save_file({"model." + k: v.to(torch.float16).contiguous() for k, v in state.items()},
              folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    end, text_end = (tokenizer.token_to_id(t) for t in (tok.IM_END, tok.END_OF_TEXT))
    write_json(folder / "config.json", {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
        "vocab_size": vocab, "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size, "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads, "head_dim": c.head_dim,
        "hidden_act": "silu", "max_position_embeddings": c.max_position_embeddings,
        "rope_theta": c.rope_theta, "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "rms_norm_eps": c.rms_norm_eps, "tie_word_embeddings": True,
        "use_sliding_window": False, "attention_dropout": 0.0, "initializer_range": 0.02,
        "use_cache": True, "torch_dtype": "float16", "dtype": "float16",
        "bos_token_id": text_end, "eos_token_id": end, "pad_token_id": text_end,
    })
    write_json(folder / "generation_config.json", {
        "do_sample": False, "bos_token_id": text_end, "pad_token_id": text_end,
        "eos_token_id": [end, text_end], "max_new_tokens": 64})
    tok.save(tokenizer, folder)


def write_document(folder, title, kinds, seed):
    rng = random.Random(seed)
    document = world.Document(rng, 64, attributes=10, repeats=0.15, dated=True,
                              title=title, kinds=kinds)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "document.txt").write_text(document.text)
    listed = [{"question": q, "answer": a, "in_document": True}
              for q, a, _ in document.present(64)]
    seen = set()
    while len(seen) < 24:       # the last ones: other attributes of known subjects
        q, a, _ = document.absent(wrong_attribute=float(len(seen) >= 24 - OTHER_ATTRIBUTE))
        if q not in seen:
            seen.add(q)
            listed.append({"question": q, "answer": a, "in_document": False})
    write_json(folder / "questions.json",
               {"title": title, "refusal": world.REFUSAL, "questions": listed})


def main(work, out):
    saved = torch.load(work / "checkpoint.pt")
    tokenizer, c = tok.train(), Config(**saved["config"])
    write_model(saved["model"], c, tokenizer, out / "model")
    for name, title, kinds, seed in DOCUMENTS:
        write_document(out / "documents" / name, title, kinds, seed)
    report = evaluate.evaluate(out)
    report["training"] = {
        "parameters": sum(v.numel() for v in saved["model"].values()), "seed": saved["seed"],
        "copying_steps": saved["copying_steps"], "recall_steps": saved["step"],
        "minutes": round(saved["seconds"] / 60, 1), "facts_reached": int(saved["facts"])}
    report["bytes"] = {str(p.relative_to(out)): p.stat().st_size
                       for part in ("model", "documents")
                       for p in sorted((out / part).rglob("*")) if p.is_file()}
    write_json(out / "EVALUATION.json", report)
    print("bytes", json.dumps(report["bytes"]))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--work", type=Path, default=Path("target/demo_model"))
    p.add_argument("--out", type=Path, default=Path("assets/demo"))
    torch.set_num_threads(1)
    args = p.parse_args()
    main(args.work, args.out)
