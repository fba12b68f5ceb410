"""The test binaries, with their kernels on the card."""

import re
import time

from .process import run

BINARY_LIMIT = 120.0  # seconds
ALONE_LIMIT = 30.0
ALONE_AT_MOST = 12
RESULT = re.compile(r"^test (\S+)(?: - should panic)? \.\.\. (ok|FAILED|ignored)", re.MULTILINE)
# What the tests say once they have found the card (tests/kernels_support/card.rs).
ON_THE_CARD = "KERNELS RUN ON "
# What a test prints that has nothing to say on the machine it runs on.
SKIPPED = re.compile(r"^SKIPPED\b.*", re.MULTILINE)


def kernels(check, step) -> None:
    # The tests of the emulation itself have nothing to do on a card.
    tests = check.binaries.tests("kernels_", check.tests)
    if not check.rehearse and tests.pop("kernels_simt", None):
        step.notes.append("kernels_simt is left out: it tests the emulation itself.")
    run_all(check, step, tests, "kernels_*: every kernel against its twin in f64")


def engine(check, step) -> None:
    tests = check.binaries.tests("gpu_", check.tests)
    run_all(check, step, tests, "gpu_*: steps of the engine, models and gradients against the CPU")


def run_all(check, step, tests, title) -> None:
    if not tests:
        return step.not_run("no such test binaries in the folder")
    columns = ["binary", "result", "tests", "passed", "failed", "unfinished", "skipped", "s"]
    table = step.table(title, columns, file="tests")
    alone = None
    for name, path in tests.items():
        known, outcome = run_one(check, path, min(BINARY_LIMIT, check.left(step)))
        check.report.log(f"{name}: {outcome.end()}", outcome.output)
        results = dict(RESULT.findall(outcome.output))
        failed = [test for test, result in results.items() if result == "FAILED"]
        unfinished = [test for test in known if test not in results]
        skipped = len(SKIPPED.findall(outcome.output))
        fine = outcome.ok and not failed and not unfinished and bool(results)
        said = "passed" if fine else outcome.end() if outcome.code != 0 else "NO RESULTS"
        if fine and not check.rehearse and ON_THE_CARD not in outcome.output:
            fine, said = False, "NOTHING RAN ON THE CARD"
        counts = [len(known), list(results.values()).count("ok"), len(failed), len(unfinished), skipped]
        table.rows.append([name, said, *counts, outcome.seconds])
        if skipped:
            said = sorted(set(SKIPPED.findall(outcome.output)))
            step.notes.append(f"{name} skipped: " + "; ".join(said))
        if not fine:
            step.excerpt(f"End of {name}", outcome.output)
            if failed or unfinished:
                alone = alone or step.table("Tests that failed or did not finish, each alone", ["test", "result", "s"])
                run_alone(check, step, alone, name, path, [*failed, *unfinished])
        check.report.write()
    bad = [row[0] for row in table.rows if row[1] != "passed"]
    total = sum(row[3] for row in table.rows)
    where = "on the emulation" if check.rehearse else f"on {check.device}"
    if bad:
        step.failed(f"{', '.join(bad)} (of {len(tests)} binaries, {where})")
    else:
        skipped = sum(row[6] for row in table.rows)
        step.passed(
            f"{total} tests of {len(tests)} binaries {where}" + (f", {skipped} of them skipped" * bool(skipped))
        )


def run_one(check, path, limit: float):
    began = time.monotonic()
    known = re.findall(r"^(\S+): test$", run([path, "--list"], min(20, limit), check.test_env()).output, re.MULTILINE)
    return known, run([path, "--show-output"], limit - (time.monotonic() - began), check.test_env())


def run_alone(check, step, table, binary: str, path, tests: list[str]) -> None:
    """A kernel that faults ends all launches of its process: alone, the tests behind it may pass."""
    for test in tests[:ALONE_AT_MOST]:
        if check.left(step) < ALONE_LIMIT / 2:
            break
        outcome = run([path, "--exact", test], min(ALONE_LIMIT, check.left(step)), check.test_env())
        check.report.log(f"{binary} {test} alone: {outcome.end()}", outcome.output)
        table.rows.append([f"{binary} {test}", "passes alone" if outcome.ok else outcome.end(), outcome.seconds])
