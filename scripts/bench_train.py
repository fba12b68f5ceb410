"""Times a training step here and in PyTorch, on the same packs, in turns.

    cargo build --release --benches
    cartouche train --config configs/train-demo.yaml --max-optimizer-steps 1 --run-dir /tmp/run
    python scripts/bench_train.py --run-dir /tmp/run --model assets/demo/model --csv benches/results/train.csv

The recipe: the packs of the run one after the other, forward and backward through frozen f32 weights, loss of
the sparse targets per token, gradients of a prefix of --tokens keys and values per layer, no optimiser.
PyTorch does it in three ways, and the fastest counts: `packed` (all sequences in one row, scaled dot-product
attention with a mask), `padded` (a row per sequence, all logits) and `padded-sparse` (logits of the supervised
rows only).  Each program runs in its own process; memory is the peak resident set, and its growth over what
the process held before the first step.
"""

import argparse
import csv
import pathlib
import re
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
WAYS = ["packed", "padded", "padded-sparse"]


def read_packs(run_dir):
    from safetensors.numpy import load_file

    t = load_file(pathlib.Path(run_dir) / "packs.safetensors")
    packs, at = [], dict.fromkeys(["tokens", "cu_seqlens", "rows"], 0)
    for tokens, seqlens, entries, _ in t["sizes"].reshape(-1, 4):
        def take(name, count, of=None):
            start = at[of or name]
            return t[name][start:start + count].astype("int64" if name != "probs" else "float32")
        packs.append(dict(
            tokens=take("tokens", tokens), cu_seqlens=take("cu_seqlens", seqlens), rows=take("rows", entries),
            ids=take("ids", entries, "rows"), probs=take("probs", entries, "rows")))
        for name, count in (("tokens", tokens), ("cu_seqlens", seqlens), ("rows", entries)):
            at[name] += count
    return packs


def resident(field):
    return int(re.search(rf"{field}:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024


def torch_steps(way, args):
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.cache_utils import DynamicCache

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    model.requires_grad_(False)
    c, p = model.config, args.tokens
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    gen = torch.Generator().manual_seed(0)
    prefix = [[torch.randn(1, c.num_key_value_heads, p, head_dim, generator=gen).requires_grad_() for _ in "kv"]
              for _ in range(c.num_hidden_layers)]

    def cache(batch):
        cache = DynamicCache(config=c)
        for i, (k, v) in enumerate(prefix):
            cache.update(k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1), i)
        return cache

    def packed(pack):
        tokens, cu = torch.tensor(pack["tokens"]), pack["cu_seqlens"]
        lens = torch.tensor(cu[1:] - cu[:-1])
        seq = torch.repeat_interleave(torch.arange(len(lens)), lens)
        position = torch.arange(len(tokens)) - torch.tensor(cu[:-1])[seq]
        own = (seq[:, None] == seq[None]) & (position[:, None] >= position[None])
        mask = torch.cat([torch.ones(len(tokens), p, dtype=torch.bool), own], 1)
        bias = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[None, None]
        hidden = model.model(input_ids=tokens[None], position_ids=(position + p)[None], attention_mask=bias,
                             past_key_values=cache(1)).last_hidden_state[0]
        return hidden, torch.tensor(pack["rows"])

    def padded(pack):
        cu = pack["cu_seqlens"]
        lens = cu[1:] - cu[:-1]
        ids = torch.zeros(len(lens), int(lens.max()), dtype=torch.long)
        for i, (start, end) in enumerate(zip(cu[:-1], cu[1:])):
            ids[i, :end - start] = torch.tensor(pack["tokens"][start:end])
        keep = torch.arange(ids.shape[1])[None] < torch.tensor(lens)[:, None]
        mask = torch.cat([torch.ones(len(lens), p, dtype=torch.long), keep.long()], 1)
        hidden = model.model(input_ids=ids, attention_mask=mask, past_key_values=cache(len(lens)),
                             position_ids=(torch.arange(ids.shape[1]) + p)[None]).last_hidden_state
        return hidden[keep], torch.tensor(pack["rows"])

    def step(pack):
        hidden, rows = (packed if way == "packed" else padded)(pack)
        distinct, index = torch.unique(rows, return_inverse=True)
        if way == "padded-sparse":
            logprobs = torch.log_softmax(model.lm_head(hidden[distinct]), -1)
        else:
            logprobs, index = torch.log_softmax(model.lm_head(hidden), -1), rows
        chosen = logprobs[index, torch.tensor(pack["ids"])]
        loss = -(torch.tensor(pack["probs"]) * chosen).sum() / len(distinct)
        loss.backward()
        for layer in prefix:
            for tensor in layer:
                tensor.grad = None
        return loss.item()

    packs = read_packs(args.run_dir)[:args.packs]
    before = resident("VmRSS")
    step(packs[0])
    times = []
    for _ in range(args.repeat):
        start = time.perf_counter()
        for pack in packs:
            step(pack)
        times.append(time.perf_counter() - start)
    tokens = sum(len(pack["tokens"]) for pack in packs)
    print(f"{tokens / statistics.median(times):.1f},{resident('VmHWM'):.0f},{resident('VmHWM') - before:.0f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=46)
    parser.add_argument("--packs", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        return torch_steps(args.way, args)
    benches = (ROOT / "target/release/deps").glob("train_step-*")
    ours = max((b for b in benches if b.suffix == ""), key=lambda b: b.stat().st_mtime)
    shared = ["--run-dir", args.run_dir, "--model", args.model, "--tokens", str(args.tokens), "--packs",
              str(args.packs), "--repeat", str(args.repeat), "--threads", str(args.threads)]
    programs = {"cartouche": [str(ours), *shared], "cartouche-recompute": [str(ours), *shared, "--recompute"]}
    programs |= {f"torch-{way}": [sys.executable, __file__, "--way", way, *shared] for way in WAYS}
    rows = []
    for round_ in range(args.rounds):
        for name, command in programs.items():
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append([round_, name, *out.split()[-1].split(",")])
            print(*rows[-1])
    head = ["round", "program", "tokens_per_s", "peak_mib", "peak_over_start_mib"]
    print("\nmedians:")
    for name in programs:
        mine = [[float(x) for x in row[2:]] for row in rows if row[1] == name]
        print(f"{name:22}", *(f"{statistics.median(column):10.1f}" for column in zip(*mine)))
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            csv.writer(file).writerows([head, *rows])


if __name__ == "__main__":
    main()
