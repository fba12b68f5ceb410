#!/usr/bin/env python3
"""Compiles every kernel for sm_80 and sm_90 and prints what each needs. Needs nvcc (scripts/cuda_toolkit.sh), no GPU.

Refused: a register spill; a stack frame; more registers or shared memory than let an SM hold as many blocks as the
kernel's __launch_bounds__ promises; a kernel that is not registered by KERNEL, or with other threads.
"""

import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

KERNELS = pathlib.Path(__file__).resolve().parent.parent / "kernels"
REGISTERS = 65536  # of an SM
# Shared memory of an SM, of which each resident block takes 1 KiB for itself; and what one block may have.
ARCHITECTURES = {80: (164 << 10, 163 << 10), 90: (228 << 10, 227 << 10)}


def compile_source(nvcc: str, source: pathlib.Path, arch: int) -> tuple[str, str]:
    """What ptxas says, and the PTX."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, f"-arch=sm_{arch}", "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v"]
        command += ["-cubin", str(source), "-o", f"{folder}/out.cubin", "--keep", "--keep-dir", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{source.name} does not compile for sm_{arch}:\n{done.stdout}{done.stderr}")
        return done.stderr + done.stdout, pathlib.Path(folder, f"{source.stem}.ptx").read_text()


def shapes(ptx: str) -> dict[str, tuple[int, int]]:
    """Threads and dynamic shared bytes by kernel, as KERNEL wrote them."""
    found = {}
    for name, length, values in re.findall(r"\.global .* (\w+)_shape\[(\d+)\] = \{(.*?)\}", ptx):
        raw = [int(value) for value in values.split(",")]
        raw += [0] * (int(length) - len(raw))  # trailing zeroes are left out
        if len(raw) == 8:  # bytes rather than words
            raw = [int.from_bytes(raw[:4], "little"), int.from_bytes(raw[4:], "little")]
        found[name] = (raw[0], raw[1])
    return found


def entries(ptx: str) -> dict[str, tuple[int, int]]:
    """Threads and promised resident blocks by kernel, from its launch bounds."""
    found = {}
    for name, bounds in re.findall(r"\.entry (\w+)\(.*?\)\s*((?:\.\w+ [\d, ]+\s*)*)\{", ptx, re.S):
        threads = re.search(r"\.maxntid (\d+)", bounds)
        resident = re.search(r"\.minnctapersm (\d+)", bounds)
        found[name] = (int(threads[1]) if threads else 0, int(resident[1]) if resident else 1)
    return found


def check(arch: int, said: str, ptx: str) -> list[str]:
    """Prints a line per kernel; the reasons to refuse."""
    of_sm, of_block = ARCHITECTURES[arch]
    known, bounds, wrong = shapes(ptx), entries(ptx), []
    pattern = (
        r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\s+ptxas info\s*: Used (\d+) registers(.*)"
    )
    reports = re.findall(pattern, said)
    if {report[0] for report in reports} != set(bounds):
        wrong.append(f"sm_{arch}: ptxas reports other kernels than the PTX has: {sorted(bounds)}")
    for name, stack, stores, loads, registers, rest in sorted(reports):
        threads, resident = bounds.get(name, (0, 1))
        fixed = int((re.search(r"(\d+) bytes smem", rest) or [0, 0])[1])
        shape = known.get(name)
        if shape is None or shape[0] != threads:
            wrong.append(f"{name}: registered as {shape}, launch bounds of {threads} threads")
            continue
        shared = fixed + shape[1]
        print(f"sm_{arch} {name:34} {registers:>4} {shared:>8} {stores:>4} {loads:>4} {threads:>4} x {resident}")
        if int(stack) or int(stores) or int(loads):
            wrong.append(f"{name}, sm_{arch}: spills (stack {stack}, stores {stores}, loads {loads} bytes)")
        # Registers are given out in units of 8 per thread.
        if -(-int(registers) // 8) * 8 * threads * resident > REGISTERS:
            wrong.append(f"{name}, sm_{arch}: {registers} registers, for {resident} blocks of {threads}")
        if shared > of_block or (shared + 1024) * resident > of_sm:
            wrong.append(f"{name}, sm_{arch}: {shared} bytes of shared memory, for {resident} blocks")
    return wrong


def main() -> None:
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if not nvcc:
        sys.exit("no nvcc on PATH nor in NVCC: scripts/cuda_toolkit.sh installs one")
    jobs = [(arch, source) for arch in ARCHITECTURES for source in sorted(KERNELS.glob("*.cu"))]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: compile_source(nvcc, job[1], job[0]), jobs))
    print(f"{'':6}{'kernel':34} regs   shared spill st/ld  threads x blocks")
    wrong = []
    for (arch, _), (said, ptx) in zip(jobs, results):
        wrong += check(arch, said, ptx)
    if wrong:
        sys.exit("refused:\n" + "\n".join(wrong))


main()
