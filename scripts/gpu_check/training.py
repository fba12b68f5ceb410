"""The demo's cartridge, a few updates on the card and on the CPU, from the same data.

How far the losses may be apart: with this recipe, PyTorch on a CPU with the model in bf16 (masters in f32) stays
within 5% of itself in f32 in every update, 0.5% of the mean loss on average, and 0.6% in the mean of the last twenty.
Allowed is twice that.
"""

import json

from . import report
from .process import run

UPDATES = 60
WORST, MEAN, LAST = 0.10, 0.01, 0.012
LEAST = 0.05  # losses below count as this, where a ratio is taken
SHOWN = [1, 2, 5, 10, 20, 30, 40, 50, 60]


def training(check, step) -> None:
    data = check.temporary / "questions.parquet"
    program = check.binaries.program()
    demo = ["--document", "demo:harbour-log"]
    teach = [program, "synthesize", "--device", "cpu", *demo, "--conversations", "demo:harbour-log"]
    # The teacher's data once, on the CPU: only the learning is compared.
    made = run([*teach, "--limit", "300", "--answer-tokens", "64", "--out", data], check.left(step), check.env)
    if not made.ok:
        step.excerpt("cartouche synthesize", made.output)
        return step.failed(f"the data could not be made: {made.end()}")
    losses = {}
    for device in dict.fromkeys([check.device, "cpu"]):
        folder = check.temporary / f"run-{device.replace(':', '')}"
        learn = [program, "train", "--device", device, *demo, "--conversations", data, "--run-dir", folder]
        learn += ["--tokens", "46", "--packed-seq-length", "512", "--epochs", "60", "--lr", "0.02"]
        learn += ["--warmup-steps", "10", "--max-optimizer-steps", str(UPDATES)]
        done = run(learn, check.left(step), check.env)
        check.report.log(f"train --device {device}: {done.end()}", done.output)
        if not done.ok:
            step.excerpt(f"cartouche train --device {device}", done.output)
            return step.failed(f"train --device {device}: {done.end()}")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[device] = [line for line in lines if "train/loss" in line]
    compare(step, check.report.extra, losses[check.device], losses["cpu"], check.device)


def compare(step, extra: list, ours: list[dict], cpu: list[dict], device: str) -> None:
    columns = ["update", "loss", "loss on the CPU", "gradient norm", "gradient norm on the CPU"]
    table = step.table(f"Learning on {device} and on the CPU", columns)
    every = report.Table("", columns, file="training")
    extra.append(every)
    step.notes.append((__doc__ or "").split("\n\n", 1)[1].replace("\n", " "))
    if [line["train/step_num_input_tokens"] for line in ours] != [line["train/step_num_input_tokens"] for line in cpu]:
        return step.failed("the two runs did not learn from the same packs")
    for a, b in zip(ours, cpu):
        row = [a["train/optimizer_step"], a["train/loss"], b["train/loss"], a["train/grad_norm"], b["train/grad_norm"]]
        every.rows.append(row)
        if row[0] in SHOWN:
            table.rows.append(row)
    pairs = [(a["train/loss"], b["train/loss"]) for a, b in zip(ours, cpu)]
    if len(pairs) != UPDATES:
        return step.failed(f"{len(pairs)} updates instead of {UPDATES}")
    worst = max(abs(a - b) / max(b, LEAST) for a, b in pairs)
    mean = sum(abs(a - b) for a, b in pairs) / sum(b for _, b in pairs)
    last = [sum(column) for column in zip(*pairs[-20:])]
    off = abs(last[0] - last[1]) / last[1]
    said = f"{UPDATES} losses differ by at most {worst:.2%}, on average {mean:.2%}, the last twenty {off:.2%}"
    fine = worst <= WORST and mean <= MEAN and off <= LAST  # NaN is not fine
    (step.passed if fine else step.failed)(said)
