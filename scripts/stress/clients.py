"""Clients that ask for cartridges at random and check every answer."""

import collections
import http.client
import random
import threading
import time

from .server import Client, Server
from .world import World

# A reply that was not checked to be right or refused as it must be is one of these.
WRONG, STUCK, BROKEN = "wrong answers", "stuck requests", "broken connections"


class Tally:
    """Thread-safe counts, and the first few complaints."""

    def __init__(self):
        self.counts = collections.Counter()
        self.complaints: list[str] = []
        self.seconds: list[float] = []
        self.lock = threading.Lock()

    def count(self, what: str, complaint: str | None = None, seconds: float | None = None):
        with self.lock:
            self.counts[what] += 1
            if complaint and len(self.complaints) < 20:
                self.complaints.append(f"{what}: {complaint}")
            if seconds is not None:
                self.seconds.append(seconds)


def check(world: World, tally: Tally, name: str, forced: bool, asked: float, reply) -> None:
    """A reply about a local file."""
    status, generation, answer = reply
    right = world.right(name, asked, forced)
    if status == 503:
        # All memory is lent to running requests; a client tries again.
        return tally.count("answered busy (503)")
    if status != 200:
        if None in right and (status, answer) == (400, "cartridge_invalid"):
            return tally.count("corrupt files refused")
        return tally.count(WRONG, f"{name}: {status} {answer}, one of {right} was right")
    if generation not in right:
        return tally.count(WRONG, f"{name}: generation {generation}, one of {right} was right")
    if world.answers.get(generation) != answer:
        return tally.count(WRONG, f"{name}: {generation} answered {answer}")
    tally.count("right after a forced reload" if forced else "right", seconds=time.monotonic() - asked)


class LocalClient(threading.Thread):
    """Asks for local cartridges until it is told to stop."""

    def __init__(self, number: int, server: Server, world: World, tally: Tally, stop, deadline: float):
        super().__init__(daemon=True)
        self.random = random.Random(number)
        self.server, self.world, self.tally, self.stop_event = server, world, tally, stop
        self.deadline = deadline

    def run(self):
        client = Client(self.server, self.deadline)
        names = sorted(self.world.versions)
        while not self.stop_event.is_set():
            name, forced = self.random.choice(names), self.random.random() < 0.05
            asked = time.monotonic()
            try:
                reply = client.ask(name, force=forced)
                check(self.world, self.tally, name, forced, asked, reply)
            except TimeoutError:
                self.tally.count(STUCK, f"{name}: nothing within {self.deadline} s")
            except (OSError, http.client.HTTPException, KeyError, ValueError) as error:
                if not self.stop_event.is_set():
                    self.tally.count(BROKEN, f"{name}: {error!r}")


class RemoteClient(threading.Thread):
    """Asks for repositories of the stand-in hub: whatever comes must be an error, or the right answer."""

    def __init__(self, number: int, server: Server, world: World, tally: Tally, stop, deadline: float):
        super().__init__(daemon=True)
        self.random = random.Random(1000 + number)
        self.server, self.world, self.tally, self.stop_event = server, world, tally, stop
        self.deadline = deadline

    def run(self):
        client = Client(self.server, self.deadline)
        while not self.stop_event.is_set():
            owner = self.random.choice(["hang", "error", "corrupt", "missing", "good"])
            name = f"{owner}/r{self.random.randrange(4)}"
            # A client that gives up on a hanging source leaves, as clients do; the server goes on.
            deadline = 2.0 if owner == "hang" else self.deadline
            try:
                status, generation, answer = client.ask(name, "huggingface", self.random.random() < 0.2, deadline)
            except TimeoutError:
                if owner == "hang":
                    self.tally.count("clients that left a hanging source")
                else:
                    self.tally.count(STUCK, f"{name}: nothing within {deadline} s")
                continue
            except (OSError, http.client.HTTPException, KeyError, ValueError) as error:
                if not self.stop_event.is_set():
                    self.tally.count(BROKEN, f"{name}: {error!r}")
                continue
            if status >= 400:
                self.tally.count(f"failing source told ({status})")
                # What is refused at once is not hammered.
                self.stop_event.wait(0.02)
            elif owner == "good" and self.world.answers.get(generation) == answer:
                self.tally.count("right, from a source")
            else:
                self.tally.count(WRONG, f"{name}: {status} {generation} {answer}")


class Changer(threading.Thread):
    """Replaces files by others, by corrupt ones, and back."""

    def __init__(self, world: World, seeds: dict[str, list[int]], tally: Tally, stop, pause: float):
        super().__init__(daemon=True)
        self.random = random.Random(2)
        self.world, self.seeds, self.tally, self.stop_event = world, seeds, tally, stop
        self.pause = pause

    def run(self):
        while not self.stop_event.wait(self.pause):
            name = self.random.choice(sorted(self.seeds))
            seed = self.random.choice(self.seeds[name])
            corrupt = self.random.randrange(3) if self.random.random() < 0.25 else None
            self.world.put(name, seed, corrupt)
            self.tally.count("files replaced" if corrupt is None else "files replaced by corrupt ones")
