"""The machine, the card, the libraries, the compiler, PyTorch. Finds what later steps need."""

import glob
import json
import os
import platform
import re
import shutil
import sys

from .process import run

CARD_FIELDS = [
    ("card", "name"),
    ("driver", "driver_version"),
    ("compute capability", "compute_cap"),
    ("memory, MiB", "memory.total"),
    ("memory in use, MiB", "memory.used"),
    ("SM clock, MHz", "clocks.sm"),
    ("SM clock at most, MHz", "clocks.max.sm"),
    ("memory clock, MHz", "clocks.mem"),
    ("power limit, W", "power.limit"),
    ("temperature, C", "temperature.gpu"),
    ("ECC", "ecc.mode.current"),
]
# What the program opens when it first calls CUDA. The version in a name is the major one of its toolkit.
LIBRARIES = ["libcuda.so.1", "libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10"]
FOLDERS = [
    "{site}/nvidia/cu13/lib",
    "{site}/nvidia/*/lib",
    "/usr/local/cuda/lib64",
    "/usr/local/cuda*/lib64",
    "/usr/local/cuda*/targets/*/lib",
    "/usr/local/nvidia/lib64",
    "/usr/local/nvidia/lib",
    "/usr/lib/*-linux-gnu",
]
OPEN = "import ctypes, sys\nfor name in sys.argv[1:]:\n try: ctypes.CDLL(name)\n except OSError: print(name)"
TORCH = """import json, sys, torch
there = torch.cuda.is_available()
name = torch.cuda.get_device_name(int(sys.argv[1])) if there else ""
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "card": name}))"""


def machine(check, step) -> None:
    table = step.table("", ["what", "value"])

    def row(what: str, value) -> None:
        table.rows.append([what, value])

    row("processor", f"{processor()}, {os.cpu_count()} threads")
    row("memory, GiB", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    row("system", f"{platform.system()} {platform.machine()}, glibc {platform.libc_ver()[1]}")
    row("Python", platform.python_version())
    torch(check, step, row)
    missing = card(check, step, row)
    libraries(check, step, row)
    compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
    row("C++ compiler", run([compiler, "--version"], 10).output.splitlines()[0] if compiler else "NONE")
    sanitizer = find_sanitizer()
    row("compute-sanitizer", "found" if sanitizer else "none")
    if not compiler:
        step.notes.append(
            "**No C++ compiler.** The kernels' twins are compiled where the tests run: without g++ or clang++ "
            "(apt-get install g++, or name one in CXX) the kernel tests fail."
        )
    names = sorted(check.binaries.all())
    row("binaries", ", ".join(names) or "NONE")
    if check.binaries.manifest:
        step.excerpt("MANIFEST.txt", check.binaries.manifest)
    if not check.rehearse and missing:
        return step.failed(missing)
    if not names:
        return step.failed("no binaries")
    step.passed("the CPU, as rehearsal" if check.rehearse else check.card)


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return re.search(r"model name\s*:\s*(.*)", file.read())[1]
    except (OSError, TypeError):
        return platform.processor() or "unknown"


def card(check, step, row) -> str:
    """Fills the table; why there is no card."""
    fields = query(check)
    if fields is None:
        row("nvidia-smi", "NONE")
        step.notes.append("**No nvidia-smi that answers.** The card and its clocks are unknown.")
        return "" if check.card else "no NVIDIA GPU: nvidia-smi does not answer, nor does PyTorch see one"
    for (what, _), value in zip(CARD_FIELDS, fields):
        row(what, value)
    check.card = fields[0]
    return ""


def query(check) -> list[str] | None:
    index = check.device.removeprefix("cuda:") if check.device.startswith("cuda") else "0"
    names = ",".join(field for _, field in CARD_FIELDS)
    found = run(["nvidia-smi", "-i", index, f"--query-gpu={names}", "--format=csv,noheader,nounits"], 20)
    lines = found.output.strip().splitlines()
    fields = [field.strip() for field in lines[-1].split(",")] if found.ok and lines else []
    return fields if len(fields) == len(CARD_FIELDS) else None


def libraries(check, step, row) -> None:
    """Sets LD_LIBRARY_PATH for the program where the loader does not find CUDA's libraries by itself."""
    missing = cannot_open(check)
    site = run([check.python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], 20).output.split(
        "\n"
    )[0]
    for pattern in FOLDERS:
        for folder in sorted(glob.glob(pattern.format(site=site or "/nonexistent"))):
            if any(os.path.exists(os.path.join(folder, name)) for name in missing):
                known = check.library_path()
                check.env["LD_LIBRARY_PATH"] = f"{known}:{folder}" if known else folder
                missing = cannot_open(check)
    row("CUDA libraries", "all found" if not missing else f"MISSING: {', '.join(missing)}")
    if missing and not check.rehearse:
        step.notes.append("**CUDA libraries are missing**: add their folder to LD_LIBRARY_PATH.")


def cannot_open(check) -> list[str]:
    return run([sys.executable, "-c", OPEN, *LIBRARIES], 30, check.env).output.split()


def torch(check, step, row) -> None:
    index = "0" if check.rehearse else check.device.removeprefix("cuda:")
    found = run([check.python, "-c", TORCH, index], 120)
    # Warnings may stand before it.
    lines = [line for line in found.output.splitlines() if line.startswith("{")]
    if not found.ok or not lines:
        row("PyTorch", "NONE")
        step.notes.append(
            "**NO PYTORCH.** Nothing is compared with PyTorch: no errors beside SDPA's, no ratios. "
            "Name a Python that has it with --python."
        )
        return
    said = json.loads(lines[-1])
    row("PyTorch", f"{said['version']}, CUDA {said['cuda']}, {'uses the card' if said['card'] else 'CPU only'}")
    if check.rehearse or said["card"]:
        check.torch, check.card = said["version"], "" if check.rehearse else said["card"]
    else:
        check.no_torch = "PYTORCH WITHOUT A GPU"
        step.notes.append("**PYTORCH WITHOUT A GPU.** It is there but sees no card: nothing is compared with it.")


def find_sanitizer() -> str | None:
    places = ["/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", *glob.glob("/usr/local/cuda-*/bin")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=":".join(places))


def under_load(check) -> str:
    """Clocks while or just after the card worked, in words."""
    fields = query(check)
    if fields is None:
        return "unknown"
    named = dict(zip((what for what, _ in CARD_FIELDS), fields))
    return f"SM {named['SM clock, MHz']} MHz, memory {named['memory clock, MHz']} MHz, {named['temperature, C']} C"
