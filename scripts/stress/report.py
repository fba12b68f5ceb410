"""The report of a run, and its samples."""

import csv
import datetime
import pathlib
import platform
import statistics


def machine() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = pathlib.Path("/proc/meminfo").read_text().split()[1]
    return f"{models[0] if models else platform.machine()}, {len(models)} cores, {int(memory) / 2**20:.0f} GiB"


def write(out: pathlib.Path, facts: dict, tally, samples: list[dict], failures: list[str]) -> pathlib.Path:
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{datetime.date.today().isoformat()}-stress-registry"
    with open(out / f"{stem}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, samples[0].keys())
        writer.writeheader()
        writer.writerows(samples)
    seconds = sorted(tally.seconds)
    lines = ["# Registry under stress", "", f"`{facts.pop('command')}`", "", f"{machine()}.", ""]
    lines += [f"**{'FAILED' if failures else 'Passed'}.**", ""] + [f"- {failure}" for failure in failures]
    lines += ["", "| what | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += [f"| {name} | {count} |" for name, count in sorted(tally.counts.items())]
    if len(seconds) > 1:
        lines += [f"| seconds of a right answer, p50 / p99 / most | {statistics.median(seconds):.3f} / "
                  f"{seconds[int(len(seconds) * 0.99)]:.3f} / {seconds[-1]:.3f} |"]
    if tally.complaints:
        lines += ["", "First complaints:", ""] + [f"- {complaint}" for complaint in tally.complaints]
    path = out / f"{stem}.md"
    path.write_text("\n".join(lines) + "\n")
    return path
