#!/usr/bin/env python3
"""Runs the fuzz targets on a given number of inputs each and writes the report: `<date>-fuzz.md` and `.csv`.

    scripts/fuzz.py --inputs 200000 --date 2026-11-22

Needs stable Rust only. The runs are seeded (`--seed`): the same numbers come out again, but for times.
"""

import argparse
import csv
import os
import platform
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = [
    "target", "inputs", "accepted_percent", "accepted_kinds", "refused_kinds", "peak_bytes", "work_of_allowed",
    "locked_in", "slowest_ms", "seconds",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--date", required=True, help="in the name of the report")
    parser.add_argument("--out", type=Path, default=ROOT / "benches/results")
    parser.add_argument("--targets", nargs="*", default=[], help="names of tests; all without")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {
            "CARTOUCHE_FUZZ_INPUTS": str(args.inputs),
            "CARTOUCHE_FUZZ_SEED": str(args.seed),
            "CARTOUCHE_FUZZ_REPORT": folder,
        }
        command = ["cargo", "test", "--locked", "--test", "fuzz", "--", *args.targets]
        # An input that fails ends here: there is no report of a run that found something.
        subprocess.run(command, cwd=ROOT, env=env, check=True)
        rows = [next(csv.DictReader([",".join(COLUMNS), path.read_text()])) for path in sorted(Path(folder).glob("*.csv"))]
        kinds = {path.stem: path.read_text().strip().split("\n") for path in Path(folder).glob("*.kinds")}
    write(args, rows, kinds)


def write(args, rows, kinds):
    name = f"{args.date}-fuzz"
    with open(args.out / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    total = sum(int(row["inputs"]) for row in rows)
    lines = [
        f"# Fuzzing, {args.date}",
        "",
        f"{total:,} inputs, 0 panics, 0 beyond the memory or the work allowed, 0 system calls by the targets that are locked in.",
        "",
        f"`scripts/fuzz.py --inputs {args.inputs} --seed {args.seed} --date {args.date}` on {machine()}, test profile,",
        "stable Rust. Each input is a seed of `tests/fixtures` or a mutation that knows the format; one that took a way",
        "not seen before is changed further. What each target checks of what it accepts: `fuzz/src/targets/`.",
        "",
        "- *ways*: distinct results, accepted and refused: kinds of cartridges or replies, errors without what they quote",
        "- *peak*: most bytes one input held at a time; *work*: bytes allocated and read for one input, as a share of what",
        "  its length allows (1 would be a failure)",
        "- *locked in*: the thread could open no file, start no process and reach no network (seccomp)",
        "",
        "| target | inputs | accepted | ways: accepted + refused | peak | work | locked in | slowest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| `{row['target']}` | {int(row['inputs']):,} | {row['accepted_percent']}% | {row['accepted_kinds']} + "
            f"{row['refused_kinds']} | {int(row['peak_bytes']) / 1024:,.0f} KiB | {row['work_of_allowed']} | "
            f"{row['locked_in']} | {float(row['slowest_ms']):,.0f} ms |"
        )
    lines += ["", "The ten most frequent refusals of each target:", ""]
    for row in rows:
        lines.append(f"- `{row['target']}`")
        refused = [line.split("\t") for line in kinds[row["target"]]]
        refused = sorted((int(count), kind) for count, verdict, kind in refused if verdict == "refused")
        lines += [f"  - {count:,} × {kind.strip()}" for count, kind in refused[:-11:-1]]
    (args.out / f"{name}.md").write_text("\n".join(lines) + "\n")
    print(args.out / f"{name}.md")


def machine():
    cpu = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor()
    )
    return f"{os.cpu_count()} cores of {cpu}"


if __name__ == "__main__":
    main()
