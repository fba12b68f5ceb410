"""Commands with a time limit, each in a process group of its own, so that whatever it starts ends with it."""

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
GRACE = 5.0  # seconds between asking a process to end and ending it
_live: set[subprocess.Popen] = set()


@dataclasses.dataclass
class Outcome:
    """How a command ended. `code` is None where it ran past its limit."""

    code: int | None
    output: str
    seconds: float

    @property
    def ok(self) -> bool:
        return self.code == 0

    def end(self) -> str:
        """In words."""
        if self.code is None:
            return f"stopped at its limit of {self.seconds:.0f} s"
        if self.code < 0:
            with contextlib.suppress(ValueError):
                return f"ended by {signal.Signals(-self.code).name}"
        return f"exit status {self.code}"


def start(command: list, env: dict | None = None, **options) -> subprocess.Popen:
    """Starts a command from the repository's root. Ended by `stop` or `stop_all`."""
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        **options,
    )
    _live.add(process)
    return process


def run(command: list, limit: float, env: dict | None = None) -> Outcome:
    """Runs a command to its end or its limit. Standard output and error come as one text."""
    began = time.monotonic()
    # A file, not a pipe: a grandchild that keeps a pipe open would keep us waiting.
    with tempfile.TemporaryFile() as output:
        try:
            process = start(command, env, stdout=output, stderr=subprocess.STDOUT)
        except OSError as error:
            return Outcome(127, f"{command[0]}: {error.strerror}", 0.0)
        try:
            code = process.wait(max(limit, 0.1))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(process)
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Outcome(code, text, time.monotonic() - began)


def stop(process: subprocess.Popen) -> None:
    """Ends a process and what it started. One that the kernel does not let go is left behind."""
    for number, wait in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait)
            break
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # what outlived the process itself
    _live.discard(process)


def stop_all() -> None:
    for process in list(_live):
        stop(process)
