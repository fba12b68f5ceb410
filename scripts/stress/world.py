"""What is in the cartridge directory, when it changed, and which answers are right."""

import dataclasses
import pathlib
import threading
import time

from . import cartridges

# A file that another program changed may be served this long (seconds): `DEFAULT_REVALIDATE_MILLISECONDS`
# in src/limits.rs, and some for the clock.
STALE_SECONDS = 1.25


@dataclasses.dataclass
class Version:
    """One state of a file. No generation: it must be refused."""

    generation: str | None
    since: float
    until: float = float("inf")


class World:
    """Thread-safe. `answers` are right by the digest of the content alone."""

    def __init__(self, folder: pathlib.Path, mib: float):
        self.folder, self.tokens = folder, cartridges.tokens_of(mib)
        self.answers: dict[str, tuple] = {}
        self.versions: dict[str, list[Version]] = {}
        self.lock = threading.Lock()
        self.changing: dict[str, threading.Lock] = {}

    def put(self, name: str, seed: int, corrupt: int | None = None) -> str | None:
        """Replaces the file of `name`. The old content counts until it is surely gone."""
        generation, file = cartridges.make(seed, self.tokens)
        if corrupt is not None:
            generation, file = None, cartridges.corrupt(file, corrupt)
        with self.lock:
            changing = self.changing.setdefault(name, threading.Lock())
        with changing:
            new = Version(generation, time.monotonic())
            with self.lock:
                self.versions.setdefault(name, []).append(new)
            cartridges.put(self.folder / name, file)
            with self.lock:
                now = time.monotonic()
                for version in self.versions[name][:-1]:
                    version.until = min(version.until, now)
        return generation

    def right(self, name: str, asked: float, forced: bool) -> set[str | None]:
        """The generations that a request of that time may have been answered with."""
        since = asked if forced else asked - STALE_SECONDS
        with self.lock:
            return {v.generation for v in self.versions[name] if v.until >= since}
