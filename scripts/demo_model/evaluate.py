"""Exact-answer and refusal accuracies of an exported demo model.

    python scripts/demo_model/evaluate.py --out assets/demo

Every question is its own prompt (system message with the document, one user
message), decoded greedily, and counts only if the whole answer and its end
token are right.  "Greedy decoding writes exactly this answer" and "each token
of this answer is the most likely one after those before it" say the same, so
the table needs one forward pass per document; the shipped documents are also
run through transformers' own generate().

The weights are the exported ones, rounded to 16 bits; the documents come from
seeds that training does not use.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

import batches
import tokenizer as tok
import world
from model import Config, Model

SIZES = (4, 8, 16, 32, 64, 96)
SEED = 900_000      # training draws from one stream seeded far below this


def load(folder):
    config = json.loads((folder / "config.json").read_text())
    names = Config.__dataclass_fields__
    model = Model(Config(**{k: v for k, v in config.items() if k in names}))
    state = load_file(folder / "model.safetensors")
    model.load_state_dict({k.removeprefix("model."): v.float() for k, v in state.items()})
    return model.eval(), tok.Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")))


@torch.no_grad()
def exact(model, encoder, text, questions, alone=False, system=None):
    """Which of (question, answer) pairs are answered exactly after `text`."""
    branches = [batches.Branch(encoder, [(q, a, None)], 1.0, system=system, alone=alone)
                for q, a in questions]
    inputs, tokens, *_ = batches.rows(encoder, [(text, branches)])
    right = iter((model.logits(model(*inputs)).argmax(-1) == tokens).tolist())
    return [all([next(right) for _ in b.targets]) for b in branches]


def share(results):
    return round(sum(results) / len(results), 4) if results else None


def by_size(model, encoder, size, questions=480):
    """Half the documents have one or two attributes, half have many."""
    rng = random.Random(SEED + size)
    present, absent, wrong, alike = [], [], [], []
    while len(present) < questions:
        many = rng.random() < 0.5
        document = world.Document(rng, size, attributes=10 if many else rng.choice([1, 2]),
                                  repeats=0.2 if many else 0.0)
        asked = [(q, a) for q, a, _ in document.present(24)]
        result = exact(model, encoder, document.text, asked)
        present += result
        alike += [] if many else result
        n = len(asked)
        asked = [document.absent()[:2] for _ in range(n)]
        absent += exact(model, encoder, document.text, asked)
        if many:
            asked = [document.absent(wrong_attribute=1.0)[:2] for _ in range(n)]
            wrong += exact(model, encoder, document.text, asked)
    return {"facts": size, "questions": len(present), "present_exact": share(present),
            "present_exact_few_attributes": share(alike), "absent_refused": share(absent),
            "absent_attribute_refused": share(wrong)}


def other_prompts(model, encoder, questions=400):
    """Refusals with nothing to recall from, and prompts a user may type otherwise."""
    rng = random.Random(SEED)
    facts = [world.ask_anything(rng)[:2] for _ in range(questions)]
    unrelated = [(world.ask_unrelated(rng), world.REFUSAL) for _ in range(questions)]
    document = world.Document(rng, 64, attributes=10)
    vague = [world.ask_vaguely(rng, f.subject)[:2] for f in document.facts]
    hasty = [(world.sloppy(rng, q), a) for q, a, _ in document.present(64)]
    return {
        "no_system_message": share(exact(model, encoder, "x", facts, alone=True)),
        "generic_system_message": share(exact(model, encoder, "x", facts, alone=True,
                                              system=world.GENERIC_SYSTEMS[1])),
        "unrelated_question": share(exact(model, encoder, "x", unrelated, alone=True)),
        "unrelated_question_with_document": share(exact(model, encoder, document.text, unrelated)),
        "vague_question_with_document": share(exact(model, encoder, document.text, vague)),
        "hasty_question_exact": share(exact(model, encoder, document.text, hasty)),
    }


def shipped(folder, model, encoder):
    text = (folder / "document.txt").read_text()
    listed = json.loads((folder / "questions.json").read_text())["questions"]
    result = exact(model, encoder, text, [(q["question"], q["answer"]) for q in listed])
    bare = exact(model, encoder, "x", [(q["question"], world.REFUSAL) for q in listed], alone=True)
    return {
        "tokens": len(encoder(text)), "questions": len(listed),
        "present_exact": share([r for r, q in zip(result, listed) if q["in_document"]]),
        "absent_refused": share([r for r, q in zip(result, listed) if not q["in_document"]]),
        "refused_without_document": share(bare),
    }


def generated(folder, documents):
    """The shipped questions through transformers, unchanged: AutoModel, generate()."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = {}
    for document in documents:
        text = (document / "document.txt").read_text()
        right = []
        for q in json.loads((document / "questions.json").read_text())["questions"]:
            prompt = tokenizer.apply_chat_template(
                [{"role": "system", "content": text}, {"role": "user", "content": q["question"]}],
                tokenize=False, add_generation_prompt=True)
            ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
            reply = model.generate(**ids, max_new_tokens=24, do_sample=False)
            reply = tokenizer.decode(reply[0, ids["input_ids"].shape[1]:])
            right.append(reply == q["answer"] + tok.IM_END)
        out[document.name] = share(right)
    return out


def same_logits(folder, model, encoder):
    """Largest difference to transformers' logits, in f32, same weights."""
    from transformers import AutoModelForCausalLM
    document = world.Document(random.Random(SEED), 64, attributes=10)
    ids = torch.tensor([encoder.message("system", document.text)])
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return float((theirs(ids).logits - model.plain(ids)).abs().max())


def evaluate(out):
    model, encoder = load(out / "model")
    documents = sorted(p for p in (out / "documents").iterdir() if p.is_dir())
    report = {"by_facts": [by_size(model, encoder, n) for n in SIZES],
              "other_prompts": other_prompts(model, encoder),
              "documents": {d.name: shipped(d, model, encoder) for d in documents},
              "documents_by_transformers_generate": generated(out / "model", documents),
              "largest_logit_difference_to_transformers": same_logits(out / "model", model, encoder),
              "evaluation_seed": SEED}
    print("facts  questions  exact  exact, few attributes  refused  refused, other attribute")
    for r in report["by_facts"]:
        print(f"{r['facts']:5}  {r['questions']:9}  {r['present_exact']:.3f}  "
              f"{r['present_exact_few_attributes']:21.3f}  {r['absent_refused']:7.3f}  "
              f"{r['absent_attribute_refused']:24.3f}")
    for key in ("other_prompts", "documents", "documents_by_transformers_generate",
                "largest_logit_difference_to_transformers"):
        print(key, json.dumps(report[key]))
    return report


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--out", type=Path, default=Path("assets/demo"))
    torch.set_num_threads(1)
    evaluate(p.parse_args().out)
