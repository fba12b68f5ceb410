"""Runs the steps one after the other and writes the report after each."""

import datetime
import lzma
import os
import pathlib
import signal
import sys
import tarfile
import tempfile
import time
import traceback

from . import options, process, steps
from .report import FAILED, NOT_RUN, PASSED, Report, Step, anonymous


class Interrupted(BaseException):
    """SIGINT or SIGTERM."""


class Check:
    """What the steps share."""

    def __init__(self, chosen, binaries: options.Binaries, report: Report, temporary: pathlib.Path):
        self.binaries, self.report, self.temporary = binaries, report, temporary
        self.rehearse, self.tests, self.shapes = chosen.rehearse, chosen.tests, chosen.shapes
        self.device = "cpu" if chosen.rehearse else chosen.device
        self.python = chosen.python or sys.executable
        self.card = ""
        self.torch: str | None = None  # its version, where it can be used
        self.no_torch = "NO PYTORCH"  # in words
        self.env: dict[str, str] = {}  # for the program: where CUDA's libraries are
        self.until = time.monotonic() + chosen.seconds
        self.limits: dict[str, float] = {}  # when a step must be done
        self.started: dict[str, float] = {}

    def left(self, step: Step) -> float:
        """Seconds that a step still has."""
        return min(self.until, self.limits.get(step.name, self.until)) - time.monotonic()

    def library_path(self) -> str:
        return self.env.get("LD_LIBRARY_PATH") or os.environ.get("LD_LIBRARY_PATH", "")

    def test_env(self) -> dict[str, str]:
        return {**self.env, "RUST_BACKTRACE": "0"} | ({} if self.rehearse else {"CARTOUCHE_TEST_DEVICE": self.device})


def main(arguments: list[str] | None = None) -> int:
    chosen = options.parse(arguments, [name for name, *_ in steps.STEPS])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as temporary:
        temporary = pathlib.Path(temporary)
        try:
            if chosen.archive:
                binaries = options.Binaries.unpack(chosen.archive, temporary)
            else:
                binaries = options.Binaries(chosen.bin)
        except (OSError, ValueError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
            print(f"gpu-check: {chosen.archive}: {error}", file=sys.stderr)
            return 2
        return run_steps(chosen, binaries, temporary)


def run_steps(chosen, binaries: options.Binaries, temporary: pathlib.Path) -> int:
    date = datetime.date.today().isoformat()
    report = Report(temporary / "report")
    check = Check(chosen, binaries, report, temporary)
    wanted = [
        s for s in steps.STEPS if s[0] not in chosen.skip and (not chosen.only or s[0] in {"machine", *chosen.only})
    ]
    report.steps = [Step(name, title, correctness) for name, title, correctness, _, _ in wanted]
    stopped = 0
    try:
        for step, (*_, limit, function) in zip(report.steps, wanted):
            run_step(check, step, limit, function)
            if step.name == "machine":
                settle_report(check, chosen, date)
            report.write()
            print(anonymous(f"{step.seconds:6.0f} s  {step.title}: {step.status}: {step.summary}"), flush=True)
    except Interrupted as signalled:
        stopped = signalled.args[0]
        print(f"interrupted by {signal.Signals(stopped).name}", flush=True)
    finally:
        process.stop_all()
    settle_report(check, chosen, date)
    report.head += [f"**Interrupted by {signal.Signals(stopped).name}.**"] if stopped else []
    report.write()
    print(f"report: {os.path.relpath(report.folder)}/report.md")
    return 128 + stopped if stopped else status(report)


def run_step(check: Check, step: Step, limit: float, function) -> None:
    began = time.monotonic()
    check.limits[step.name] = began + limit * (steps.REHEARSAL_FACTOR if check.rehearse else 1)
    step.summary = "was running when the check was ended"
    try:
        if check.left(step) < 1:
            step.not_run("no time was left")
        else:
            function(check, step)
    except Exception as error:  # one step never ends the others
        step.failed(f"{type(error).__name__}: {error}")
        step.excerpt("Where", traceback.format_exc())
    finally:
        step.seconds = time.monotonic() - began


def settle_report(check: Check, chosen, date: str) -> None:
    """Names the report once the card is known."""
    report = check.report
    if report.heading:
        return
    folder = chosen.out or options.default_folder(check.card, check.rehearse, date)
    folder.mkdir(parents=True, exist_ok=True)
    log = report.folder / "log.txt"
    (folder / "log.txt").write_text(log.read_text() if log.is_file() else "")
    report.folder = folder
    report.heading = f"gpu-check, {date}: {check.card or 'no card'}"
    if check.rehearse:
        report.heading = f"gpu-check, {date}: REHEARSAL on the CPU"
        report.head = [
            "**No GPU took part.** Kernels ran on the emulation, program and PyTorch on the CPU, with small shapes.",
            "Timings here say nothing about a GPU, nor about this program on a CPU: the build may be a debug build.",
        ]


def status(report: Report) -> int:
    counted = [step.status for step in report.steps if step.correctness]
    return 1 if FAILED in counted else 3 if NOT_RUN in counted else 0 if PASSED in counted else 3


def interrupt(number: int, _frame) -> None:
    # A second signal must not cut short the writing of the report.
    for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted(number)
