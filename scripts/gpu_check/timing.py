"""`cartouche bench --shape` and PyTorch on the same card, one after the other, shape by shape.

Predicted is the larger of bytes at the card's own copy rate and operations at its own matrix product's rate, both
measured in the same run. Ratios are PyTorch's time over ours: above 1 ours is faster. PyTorch's time is that of the
form that computes the same: for a prefix, it is put before every sequence's own keys and its gradients are summed;
`flash alone` starts from keys and values that lie ready and leaves the sum out.
"""

import csv
import json

from . import machine
from .process import ROOT, run
from .report import Table

LEAST_SECONDS = 30.0  # a shape is not begun with less
SHARE_OF_OURS = 0.55  # of the time that is left for a shape
REHEARSAL = ["--layers", "1", "--scale", "128", "--kv-mib", "16", "--only", "cartridge,attention,train"]
REHEARSED = "llama-3.2-1b"
# What we want, by the figure: of the roof, against PyTorch, or against the text in the cartridge's place.
OF_ROOF = {"decode": 0.85, "cartridge": 0.8}
OVER_PYTORCH = {"attention": 1.0, "train": 1.0}
OVER_TEXT = {"capacity": 26.4}  # of the paper, arXiv 2506.06266
COLUMNS = [
    "what",
    "case",
    "predicted ms",
    "measured ms",
    "of roof",
    "PyTorch ms",
    "ratio to PyTorch",
    "flash alone ms",
    "ratio to flash alone",
    "ratio to other row",
    "peak MiB",
    "PyTorch's peak MiB",
    "goal",
    "met",
]
DETAIL = [
    "layers",
    "of_layers",
    "scale",
    "dtype",
    "min_ms",
    "max_ms",
    "runs",
    "bytes",
    "flops",
    "bound",
    "gb_per_s",
    "tflop_per_s",
    "tokens_per_s",
    "ratio_predicted",
    "note",
]


def timing(check, step) -> None:
    step.notes.append((__doc__ or "").split("\n\n", 1)[1].replace("\n", " "))
    shapes = [REHEARSED] if check.rehearse else check.shapes
    every = Table("", ["shape", *COLUMNS, *DETAIL], file="timings")
    check.report.extra.append(every)
    missing, broken = [], []
    for i, shape in enumerate(shapes):
        left = check.left(step)
        if i and left < LEAST_SECONDS:
            missing.append(f"{shape}: no time was left")
            continue
        # The first shape is the one we want whole; the others take what it leaves.
        ours, said, cut = measure(check, shape, left * SHARE_OF_OURS)
        (missing if cut else broken).extend([f"{shape}: {said}"] if said else [])
        if not ours:
            break  # nor will the others be measured
        before = machine.under_load(check) if not check.rehearse else ""
        theirs, said, cut = peers(check, step, shape, ours, check.left(step))
        (missing if cut else broken).extend([f"{shape}: {said}"] if said else [])
        if before:
            step.notes.append(
                f"{shape}: the card just after ours {before}; just after PyTorch {machine.under_load(check)}."
            )
        table = step.table(f"{shape}, {ours[0]['layers']} of {ours[0]['of_layers']} layers" if ours else shape, COLUMNS)
        for row in ours:
            of_row = [peer for peer in theirs if (peer["what"], peer["case"]) == (row["what"], row["case"])]
            cells = line(row, of_row, check.rehearse)
            table.rows.append(cells)
            every.rows.append([shape, *cells, *(row.get(name) for name in DETAIL)])
        check.report.write()
    missing += [f"{check.no_torch}, no ratios"] if check.torch is None else []
    step.notes += [*missing, *broken]
    judged = [row for row in every.rows if cell(row, "met") in ("yes", "no")]
    if not every.rows:
        return step.failed("nothing was measured: " + "; ".join(broken))
    summary = f"{len(every.rows)} figures"
    if judged:
        summary += f", {sum(cell(row, 'met') == 'yes' for row in judged)} of {len(judged)} goals met"
    summary = "; ".join([summary, *missing, *broken])
    (step.failed if broken else step.passed)(summary)


def measure(check, shape: str, seconds: float) -> tuple[list[dict], str, bool]:
    """Our rows, why some are missing, and whether that is for want of time."""
    folder = check.temporary / f"bench-{shape}"
    command = [check.binaries.program(), "bench", "--shape", shape, "--device", check.device, "--out", folder]
    done = run([*command, *(REHEARSAL if check.rehearse else [])], seconds, check.env)
    check.report.log(f"bench --shape {shape}: {done.end()}", done.output)
    path = folder / "shape.csv"
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []
    last = (done.output.strip().splitlines() or [""])[-1]
    return rows, "" if done.ok else f"cartouche bench: {done.end()}: {last}", done.code is None


def peers(check, step, shape: str, ours: list[dict], seconds: float) -> tuple[list[dict], str, bool]:
    if check.torch is None or not ours:
        return [], "", False
    rows, config = check.temporary / f"bench-{shape}/shape.csv", ROOT / "assets/shapes" / f"{shape}.json"
    command = [check.python, "-m", "gpu_check.torch_peers", rows, config, check.device, max(seconds - 10, 5)]
    done = run(command, seconds, {"PYTHONPATH": str(ROOT / "scripts")})
    check.report.log(f"torch_peers {shape}: {done.end()}", done.output)
    if not done.ok:
        step.excerpt(f"PyTorch's part of {shape}", done.output)
    lines = [json.loads(text) for text in done.output.splitlines() if text.startswith("{")]
    notes = [f"{entry['what']} {entry['case']}: {entry['note']}" for entry in lines if "note" in entry]
    step.notes += notes
    said = "" if done.ok else f"PyTorch's part: {done.end()}"
    return [entry for entry in lines if "form" in entry], said, done.code is None


def cell(row: list, column: str):
    """Of a row that begins with its shape."""
    return row[1 + COLUMNS.index(column)]


def line(row: dict, peers_of_row: list[dict], rehearse: bool) -> list:
    by_form = {peer["form"]: peer for peer in peers_of_row}
    alone = by_form.pop("flash", None) if "flash with prefix" in by_form else None
    same = next(iter(by_form.values()), None)
    ours = number(row["measured_ms"])
    over = [peer["measured_ms"] / ours if peer and ours else None for peer in (same, alone)]
    goal, met = ("", "") if rehearse else judge(row, over[0])
    times = [number(row["predicted_ms"]), ours, number(row["roof_fraction"])]
    theirs = [same and same["measured_ms"], over[0], alone and alone["measured_ms"], over[1]]
    peaks = [number(row["ratio"]), number(row["peak_mib"]), same and same.get("peak_mib")]
    return [row["what"], row["case"], *times, *theirs, *peaks, goal, met]


def judge(row: dict, over_pytorch: float | None) -> tuple[str, str]:
    """The goal of a row in words, and whether it is met where that is known."""
    what = row["what"]
    for goals, value, words in (
        (OF_ROOF, number(row["roof_fraction"]), "of the roof"),
        (OVER_PYTORCH, over_pytorch, "x PyTorch"),
        (OVER_TEXT, number(row["ratio"]), "x the text"),
    ):
        if what in goals and not (what == "capacity" and value is None):
            reached = "not known" if value is None else "yes" if value >= goals[what] else "no"
            return f"{goals[what]:g} {words}", reached
    return "", ""


def number(text: str) -> float | None:
    return float(text) if text else None
