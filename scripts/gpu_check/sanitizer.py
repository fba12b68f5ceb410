"""A few kernel tests under compute-sanitizer, where there is one."""

import re

from .machine import find_sanitizer
from .process import run

# Short ones, which together launch most kernels.
TESTS = {
    "kernels_attention": [
        "merge::merges_any_number_of_parts_empty_ones_too",
        "serving::a_decode_step_agrees_with_the_cpu_backend",
    ],
    "kernels_backward": ["forward_and_backward_give_the_gradients_of_the_crate"],
    "kernels_layers": ["rope::rotation_into_the_paged_cache", "swiglu::gated_activation_of_huge_gates"],
    "kernels_loss": ["masked_tokens_get_no_weight"],
    "kernels_sampling": ["draws::a_row_whose_every_token_is_banned_gives_the_first"],
}
TOOLS = ["memcheck", "racecheck"]
LIMIT = 40.0  # seconds of one
FOUND = 9  # exit status that stands for "found something"
SUMMARY = re.compile(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (.*)")
UNSUPPORTED = re.compile(
    r"not supported|unsupported|LibraryNotLoaded|Unable to find injection|insufficient", re.IGNORECASE
)


def sanitizer(check, step) -> None:
    if check.rehearse:
        step.correctness = False
        return step.not_run("needs a GPU")
    program = find_sanitizer()
    if not program:
        return step.not_run("NO compute-sanitizer on this machine")
    binaries = check.binaries.tests("kernels_", check.tests)
    table = step.table("", ["tool", "test", "result", "s"])
    bad = []
    for tool in TOOLS:
        for name, tests in TESTS.items():
            for test in tests if name in binaries else []:
                if check.left(step) < 2:
                    table.rows.append([tool, f"{name} {test}", "no time was left", 0.0])
                    continue
                command = [program, "--tool", tool, "--error-exitcode", FOUND, binaries[name], "--exact", test]
                done = run(command, min(LIMIT, check.left(step)), check.test_env())
                check.report.log(f"compute-sanitizer {tool} {name} {test}: {done.end()}", done.output)
                summary = SUMMARY.search(done.output)
                if not summary and UNSUPPORTED.search(done.output):
                    step.excerpt("compute-sanitizer", done.output)
                    return step.not_run("compute-sanitizer does not work on this machine")
                ran = "1 passed" in done.output
                said = summary[1] if summary else done.end()
                table.rows.append(
                    [tool, f"{name} {test}", said if ran or not done.ok else "NO SUCH TEST", done.seconds]
                )
                if done.code is None:
                    continue  # slow is not wrong
                if not done.ok or not ran or not summary:
                    bad.append(f"{tool} {name} {test}: {said}")
                    step.excerpt(f"{tool} {name} {test}", done.output)
    clean = [row for row in table.rows if re.match(r"0 (errors|hazards)", row[2])]
    if bad:
        step.failed("; ".join(bad))
    elif not clean:
        step.not_run("nothing came to its end in the time there was")
    else:
        step.passed(f"{len(clean)} of {len(table.rows)} runs came to their end, without an error")
