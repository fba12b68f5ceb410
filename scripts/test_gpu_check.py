"""What gpu-check says when things go wrong: python3 -m unittest scripts/test_gpu_check.py. Needs no GPU, no Rust."""

import contextlib
import io
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import types
import unittest
from unittest import mock

SCRIPTS = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(SCRIPTS))
from gpu_check import attention, main, report, sanitizer, serving, test_binaries, timing, training  # noqa: E402

CARD = "NVIDIA H900, 999.9, 9.0, 81559, 4, 345, 1980, 2619, 700.00, 33, Enabled"
# A libtest program: --list names the tests, each line of RESULTS is printed, then it ends or hangs.
TEST_PROGRAM = """#!/bin/sh
if [ "$1" = --list ]; then printf 'a::one: test\\nb::two: test\\n'; exit 0; fi
if [ "$1" = --exact ]; then {alone}; fi
{body}
"""
PASSES = "echo 'test a::one ... ok'; echo 'test b::two ... ok'; echo 'KERNELS RUN ON cuda:0: X'; exit 0"
FAILS = (
    "echo 'test a::one ... ok'; echo 'test b::two ... FAILED'; echo \"it broke in /usr/lib/secret/place.rs\"; exit 101"
)
HANGS = "echo 'test a::one ... ok'; sleep 600"
CRASHES = "echo 'test a::one ... ok'; kill -SEGV $$"
ELSEWHERE = "echo 'test a::one ... ok'; echo 'test b::two ... ok'; exit 0"
NO_TORCH = '#!/bin/sh\nPYTHONPATH={folder} exec {python} "$@"\n'


class Runs(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.bin, self.tools, self.out = (self.folder / name for name in ("bin", "tools", "out"))
        self.bin.mkdir()
        self.tools.mkdir()
        no_torch = self.folder / "without"
        no_torch.mkdir()
        (no_torch / "torch.py").write_text("raise ImportError('no torch here')")
        self.python = self.script(
            self.tools / "python-without-torch", NO_TORCH.format(folder=no_torch, python=sys.executable)
        )
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        self.enterContext(mock.patch.dict(os.environ, {"PATH": f"{self.tools}:/usr/bin:/bin"}))

    def script(self, path: pathlib.Path, text: str) -> pathlib.Path:
        path.write_text(text)
        path.chmod(0o755)
        return path

    def program(self, name: str, body: str, alone: str = "exit 0") -> None:
        self.script(self.bin / name, TEST_PROGRAM.format(body=body, alone=alone))

    def nvidia_smi(self) -> None:
        self.script(self.tools / "nvidia-smi", f"#!/bin/sh\necho '{CARD}'\n")

    def check(self, *arguments: str, rehearse: bool = False) -> tuple[int, str]:
        given = ["--bin", str(self.bin), "--out", str(self.out), "--python", str(self.python), *arguments]
        with contextlib.redirect_stdout(io.StringIO()):
            code = main.main([*given, *(["--rehearse"] if rehearse else [])])
        return code, (self.out / "report.md").read_text()

    def test_one_bad_binary_does_not_stop_the_others(self):
        self.nvidia_smi()
        for name, body in [("kernels_a", FAILS), ("kernels_b", HANGS), ("kernels_c", CRASHES), ("kernels_d", PASSES)]:
            self.program(name, body)
        with mock.patch.object(test_binaries, "BINARY_LIMIT", 1.0):
            code, said = self.check("--only", "kernels")
        self.assertEqual(code, 1)
        self.assertIn("Kernels against their twins: FAILED", said)
        self.assertIn("| kernels_a | exit status 101 | 2 | 1 | 1 | 0 |", said)
        self.assertIn("| kernels_b | stopped at its limit of 1 s | 2 | 1 | 0 | 1 |", said)
        self.assertIn("| kernels_c | ended by SIGSEGV | 2 | 1 | 0 | 1 |", said)
        self.assertIn("| kernels_d | passed | 2 | 2 | 0 | 0 |", said)
        self.assertIn("| kernels_b b::two | passes alone |", said)
        self.assertIn("it broke in …/place.rs", said)
        self.assertIn("H900", said)
        self.assertIn("it broke", (self.out / "log.txt").read_text())

    def test_no_names_and_no_paths_in_the_report(self):
        self.program("kernels_a", FAILS)
        _, said = self.check("--only", "kernels", rehearse=True)
        for secret in (socket.gethostname(), str(self.folder), "/usr/lib/secret", str(SCRIPTS)):
            self.assertNotIn(secret, said + (self.out / "log.txt").read_text())
        self.assertEqual(report.anonymous("POST /v1/chat/completions"), "POST /v1/chat/completions")

    def test_no_torch_is_said_loudly_and_is_no_success(self):
        self.nvidia_smi()
        self.program("kernels_a", PASSES)
        code, said = self.check("--only", "kernels,attention")
        self.assertEqual(code, 3)
        self.assertIn("**NO PYTORCH.**", said)
        self.assertIn("Attention's error beside PyTorch's | NOT RUN | NO PYTORCH", said)

    def test_no_card_is_a_failure(self):
        self.program("kernels_a", PASSES)
        with mock.patch("gpu_check.machine.query", return_value=None):
            code, said = self.check("--only", "kernels")
        self.assertEqual(code, 1)
        self.assertIn("Machine | FAILED | no NVIDIA GPU", said)
        self.assertIn("| nvidia-smi | NONE |", said)

    def test_tests_that_never_reached_the_card_do_not_pass(self):
        self.nvidia_smi()
        self.program("kernels_a", ELSEWHERE)
        code, said = self.check("--only", "kernels")
        self.assertEqual(code, 1)
        self.assertIn("NOTHING RAN ON THE CARD", said)

    def test_steps_without_a_program_fail_one_by_one(self):
        self.nvidia_smi()
        code, said = self.check("--only", "serving,training,timing")
        self.assertEqual(code, 1)
        for step in ("Serving", "Training", "Timings"):
            self.assertIn(f"{step} | FAILED | FileNotFoundError: no program cartouche", said)

    def test_an_empty_folder_is_no_success(self):
        self.nvidia_smi()
        code, said = self.check("--only", "kernels")
        self.assertEqual(code, 1)
        self.assertIn("NOT RUN | no such test binaries", said)

    def test_no_time_is_no_success(self):
        self.nvidia_smi()
        self.program("kernels_a", PASSES)
        code, said = self.check("--only", "kernels", "--seconds", "0.5")
        self.assertEqual(code, 3)
        self.assertIn("NOT RUN | no time was left", said)

    def test_an_interrupted_check_leaves_a_report_and_no_process(self):
        self.program("kernels_a", f"echo $$ >{self.folder}/pid; {HANGS}")
        command = [sys.executable, SCRIPTS / "gpu-check", "--rehearse", "--bin", self.bin, "--out", self.out]
        process = subprocess.Popen([*command, "--only", "kernels", "--python", self.python], stdout=subprocess.DEVNULL)
        while not (self.folder / "pid").is_file() or not (self.folder / "pid").read_text().strip():
            time.sleep(0.05)
        process.terminate()
        self.assertEqual(process.wait(30), 128 + signal.SIGTERM)
        said = (self.out / "report.md").read_text()
        self.assertIn("Interrupted by SIGTERM", said)
        self.assertIn("NOT RUN | was running when the check was ended", said)
        with self.assertRaises(ProcessLookupError):
            os.kill(int((self.folder / "pid").read_text()), 0)

    def test_what_the_sanitizer_says_is_read(self):
        self.nvidia_smi()
        self.program("kernels_loss", PASSES)
        for said, code, status in [
            ("test result: ok. 1 passed\n==1== ERROR SUMMARY: 0 errors", 0, "passed | 2 of 2 runs"),
            ("test result: ok. 1 passed\n==1== ERROR SUMMARY: 3 errors", 9, "FAILED"),
            ("test result: ok. 0 passed\n==1== ERROR SUMMARY: 0 errors", 0, "FAILED"),
            ("Error: Device not supported", 1, "NOT RUN | compute-sanitizer does not work"),
        ]:
            self.script(self.tools / "compute-sanitizer", f"#!/bin/sh\nprintf '{said}'\nexit {code}\n")
            with mock.patch.object(sanitizer, "TESTS", {"kernels_loss": ["a::one"]}):
                self.assertIn(f"compute-sanitizer | {status}", self.check("--only", "sanitizer")[1])

    def test_an_archive_is_unpacked_and_its_manifest_shown(self):
        self.nvidia_smi()
        self.program("kernels_a", PASSES)
        (self.folder / "MANIFEST.txt").write_text("commit: 0123456789")
        with tarfile.open(self.folder / "pack.tar.xz", "w:xz") as archive:
            for name in ("MANIFEST.txt", "bin"):
                archive.add(self.folder / name, arcname=name)
        command = ["--out", str(self.out), "--python", str(self.python), "--only", "kernels"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            self.assertEqual(main.main([str(self.folder / "pack.tar.xz"), *command]), 0)
            self.assertEqual(main.main([str(self.folder / "bin/kernels_a"), *command]), 2)
        self.assertIn("commit: 0123456789", (self.out / "report.md").read_text())

    def test_the_newest_of_cargos_builds_is_taken(self):
        deps = self.bin / "deps"
        deps.mkdir()
        for i, hash_ in enumerate(["0123456789abcdef", "fedcba9876543210"]):
            os.utime(self.script(deps / f"kernels_a-{hash_}", "#!/bin/sh\n"), (i, i))
        (deps / "kernels_a-0123456789abcdef.d").write_text("")
        found = main.options.Binaries(self.bin).all()
        self.assertEqual({name: path.name for name, path in found.items()}, {"kernels_a": "kernels_a-fedcba9876543210"})


class Judgements(unittest.TestCase):
    """What the steps make of figures."""

    def answers(self, ours: list, theirs: list) -> list[str]:
        servers = [
            types.SimpleNamespace(chat=lambda _, a=a: {"text": str([t[0] for t in a]), "tokens": a})
            for a in (ours, theirs)
        ]
        table = report.Table("", [])
        return serving.compare(table, "plainly", [({}, None)], *servers, 10)

    def test_other_log_probabilities_than_bf16_explains_fail(self):
        cpu = [(5, -0.1, {5: -0.1, 6: -2.5})]
        self.assertEqual(self.answers([(5, -0.12, {5: -0.12, 6: -2.6})], cpu), [])
        self.assertIn("chosen token", self.answers([(5, -0.3, {5: -0.3, 6: -2.5})], cpu)[0])
        self.assertIn("not finite", self.answers([(5, math.nan, {5: math.nan})], cpu)[0])
        self.assertIn("no log-probabilities", self.answers([], [])[0])

    def test_another_text_passes_only_at_a_near_tie(self):
        cpu = [(1, -0.1, {1: -0.1}), (5, -0.69, {5: -0.69, 6: -0.70})]
        self.assertEqual(self.answers([(1, -0.1, {1: -0.1}), (6, -0.68, {6: -0.68})], cpu), [])
        self.assertIn("instead of", self.answers([(1, -0.1, {1: -0.1}), (7, -0.68, {7: -0.68})], cpu)[0])

    def losses(self, change) -> report.Step:
        line = {"train/step_num_input_tokens": 1, "train/grad_norm": 1.0}
        cpu = [line | {"train/optimizer_step": i + 1, "train/loss": 2.0} for i in range(training.UPDATES)]
        step = report.Step("training", "", True)
        training.compare(step, [], [a | {"train/loss": change(i)} for i, a in enumerate(cpu)], cpu, "cuda:0")
        return step

    def test_losses_that_part_fail(self):
        self.assertEqual(self.losses(lambda i: 2.0 + 0.01 * (-1) ** i).status, report.PASSED)
        self.assertEqual(self.losses(lambda i: 2.0 + 0.03 * (i > 40)).status, report.FAILED)
        self.assertEqual(self.losses(lambda i: 2.0 + 0.3 * (i == 3)).status, report.FAILED)
        self.assertEqual(self.losses(lambda i: math.nan if i == 7 else 2.0).status, report.FAILED)

    def test_errors_of_attention_are_held_to_pytorchs(self):
        sdpa = {"most": 2e-3, "mean": 2e-4, "relative": 2e-3}
        self.assertTrue(attention.fine(sdpa, sdpa))
        self.assertFalse(attention.fine(sdpa | {"relative": 4e-3}, sdpa))
        self.assertFalse(attention.fine(sdpa | {"most": 1e-2}, sdpa))
        self.assertFalse(attention.fine(sdpa | {"mean": math.nan}, sdpa))

    def test_goals(self):
        row = {"what": "decode", "roof_fraction": "0.86", "ratio": ""}
        self.assertEqual(timing.judge(row, None), ("0.85 of the roof", "yes"))
        self.assertEqual(timing.judge(row | {"roof_fraction": "0.84"}, None)[1], "no")
        self.assertEqual(timing.judge(row | {"what": "train"}, 0.9), ("1 x PyTorch", "no"))
        self.assertEqual(timing.judge(row | {"what": "train"}, None)[1], "not known")
        self.assertEqual(timing.judge(row | {"what": "capacity"}, None), ("", ""))


if __name__ == "__main__":
    unittest.main()
