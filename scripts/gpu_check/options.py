"""The command line, and the binaries that are checked."""

import argparse
import os
import pathlib
import re
import tarfile

from .process import ROOT

DESCRIPTION = """\
Checks Cartouche on an NVIDIA GPU from a checkout's root, without Rust: kernels against their twins on the CPU,
the engine, gradients, serving and training against the CPU backend, attention against PyTorch, and timings
beside PyTorch's. Needs Python 3.11, a C++ compiler for the twins (g++ or clang++), and PyTorch with CUDA for
what is compared with it. Writes report.md, CSV files and log.txt, also when it is interrupted.

Exit status: 0 every correctness step ran and passed, 1 one failed, 3 none failed but one did not run, 2 usage.
"""
CARD_LIMIT = 570.0  # seconds; a machine may be lent for ten minutes
REHEARSAL_LIMIT = 900.0
SHAPES = ["llama-3.2-3b", "llama-3.2-1b", "llama-3.1-8b"]  # as far as the time goes


def parse(arguments: list[str] | None, steps: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu-check", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", nargs="?", type=pathlib.Path, help="packed binaries: bin/ and MANIFEST.txt")
    parser.add_argument("--bin", type=pathlib.Path, help="folder of binaries instead; cargo's target/debug, too")
    parser.add_argument("--out", type=pathlib.Path, help="[default: benches/results/gpu-check-DATE-CARD]")
    parser.add_argument("--device", default="cuda:0", help="cuda:N [default: cuda:0]")
    parser.add_argument("--rehearse", action="store_true", help="the same steps on the CPU, small")
    parser.add_argument("--seconds", type=float, help=f"limit of the whole run [default: {CARD_LIMIT:.0f}]")
    parser.add_argument("--only", type=words, metavar="STEP,...", help=", ".join(steps))
    parser.add_argument("--skip", type=words, default=[], metavar="STEP,...")
    parser.add_argument("--shapes", type=words, default=SHAPES, help=f"to time [default: {','.join(SHAPES)}]")
    parser.add_argument("--tests", metavar="REGEX", default="", help="test binaries whose names match")
    parser.add_argument("--python", default=None, help="the Python that has PyTorch [default: this one]")
    options = parser.parse_args(arguments)
    if (options.archive is None) == (options.bin is None):
        parser.error("name an archive of binaries, or a folder with --bin")
    for name in [*(options.only or []), *options.skip]:
        if name not in steps:
            parser.error(f"no step {name}: there are {', '.join(steps)}")
    if not re.fullmatch(r"cuda:\d+", options.device):
        parser.error(f"--device {options.device}: not cuda:N")
    if options.seconds is None:
        options.seconds = REHEARSAL_LIMIT if options.rehearse else CARD_LIMIT
    return options


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


class Binaries:
    """A folder of binaries, flat as an archive has it, or as cargo leaves them."""

    def __init__(self, folder: pathlib.Path, manifest: str = ""):
        self.folder, self.manifest = folder.absolute(), manifest

    @classmethod
    def unpack(cls, archive: pathlib.Path, to: pathlib.Path) -> "Binaries":
        with tarfile.open(archive) as packed:
            packed.extractall(to, filter="data")
        manifests = sorted(to.rglob("MANIFEST.txt"))
        folders = sorted(path for path in to.rglob("bin") if path.is_dir())
        if not folders:
            raise ValueError(f"{archive.name} has no folder bin/")
        return cls(folders[0], manifests[0].read_text(errors="replace") if manifests else "")

    def all(self) -> dict[str, pathlib.Path]:
        """By name; of several builds the newest, without cargo's hash."""
        found: dict[str, pathlib.Path] = {}
        paths = [*self.folder.iterdir(), *self.folder.glob("deps/*")] if self.folder.is_dir() else []
        for path in sorted((p for p in paths if p.is_file()), key=lambda p: p.stat().st_mtime):
            name = re.sub(r"-[0-9a-f]{16}$", "", path.name) if path.parent.name == "deps" else path.name
            if "." not in path.name and os.access(path, os.X_OK) and (path.parent.name != "deps" or name != path.name):
                found[name] = path
        # cargo's own name for the program wins over its hashed one, which may be its unit tests.
        program = self.folder / "cartouche"
        return found | ({"cartouche": program} if program.is_file() else {})

    def program(self) -> pathlib.Path:
        path = self.all().get("cartouche")
        if path is None:
            raise FileNotFoundError(f"no program cartouche in {self.folder.name}/")
        return path

    def tests(self, prefix: str, pattern: str) -> dict[str, pathlib.Path]:
        chosen = {n: p for n, p in self.all().items() if n.startswith(prefix) and re.search(pattern, n)}
        return dict(sorted(chosen.items()))


def default_folder(card: str, rehearse: bool, date: str) -> pathlib.Path:
    name = re.sub(r"[^a-z0-9]+", "-", card.lower().replace("nvidia", "")).strip("-") or "unknown"
    return ROOT / "benches/results" / f"gpu-check-{date}-{'rehearsal' if rehearse else name}"
