#!/usr/bin/env python3
"""Makes libraries to link the CUDA build with, so that it starts on any machine.

    scripts/cuda_trampolines.py FOLDER      scripts/cuda_toolkit.sh calls it with the toolkit's folder of libraries

candle asks the linker for -lcuda, -lcublas and so on, and a program linked with the real ones does not start without them.
The linker takes an archive where it finds no shared library: those written here hold a function for each name, which opens the
real library on its first call and jumps into it. Where there is no such library, the function returns the API's error:
without a driver, that there is no device.

The names are those of cudarc's bindings, the only callers, for all versions of CUDA. The undefined symbols of the objects to be
linked would be fewer, but are known only after a build that fails. A jump needs no signatures; it is written for x86-64.
"""

import json
import pathlib
import platform
import re
import subprocess
import sys
import tempfile

# Library for the linker: cudarc's module, the shared library of CUDA 13, the status when it cannot be opened.
LIBRARIES = {
    "cuda": ("driver", "libcuda.so.1", 100),  # CUDA_ERROR_NO_DEVICE
    "cublas": ("cublas", "libcublas.so.13", 1),  # CUBLAS_STATUS_NOT_INITIALIZED
    "cublasLt": ("cublaslt", "libcublasLt.so.13", 1),  # the same
    "curand": ("curand", "libcurand.so.10", 203),  # CURAND_STATUS_INITIALIZATION_FAILED
    "nvrtc": ("nvrtc", "libnvrtc.so.13", 11),  # NVRTC_ERROR_INTERNAL_ERROR
}
STATUS = {"CUresult", "cublasStatus_t", "curandStatus_t", "nvrtcResult"}

# Entries leave their index in r11, which no call passes anything in; the arguments are kept while `find` runs.
SOURCE = r"""
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

static long status(void) { return @STATUS@; }
__attribute__((unused)) static long nothing(void) { return 0; }
static const struct { const char *name; long (*otherwise)(void); } entries[] = {@ENTRIES@};
__attribute__((used)) static void *found[sizeof entries / sizeof *entries];

/* Threads that come together do the same and store the same. */
__attribute__((used)) static void *find(unsigned index) {
    static int told;
    void *library = dlopen("@SONAME@", RTLD_NOW);
    void *function = library ? dlsym(library, entries[index].name) : NULL;
    /* A machine without a driver is nothing to complain of: the caller decides. */
    if (!function && (library || strcmp("@SONAME@", "libcuda.so.1")) && !told) {
        told = 1;
        fprintf(stderr, "%s\nneeded: a driver for CUDA 13, and LD_LIBRARY_PATH with its libraries\n", dlerror());
    }
    if (!function) function = (void *)entries[index].otherwise;
    __atomic_store_n(&found[index], function, __ATOMIC_RELEASE);
    return function;
}

__asm__(
    ".text\n"
    "first_call:\n"
    "  push %rdi\n  push %rsi\n  push %rdx\n  push %rcx\n  push %r8\n  push %r9\n"
    "  sub $136, %rsp\n" /* eight vectors, and 16-byte alignment for the call */
    "  movups %xmm0, (%rsp)\n  movups %xmm1, 16(%rsp)\n  movups %xmm2, 32(%rsp)\n  movups %xmm3, 48(%rsp)\n"
    "  movups %xmm4, 64(%rsp)\n  movups %xmm5, 80(%rsp)\n  movups %xmm6, 96(%rsp)\n  movups %xmm7, 112(%rsp)\n"
    "  mov %r11d, %edi\n  call find\n  mov %rax, %r11\n"
    "  movups (%rsp), %xmm0\n  movups 16(%rsp), %xmm1\n  movups 32(%rsp), %xmm2\n  movups 48(%rsp), %xmm3\n"
    "  movups 64(%rsp), %xmm4\n  movups 80(%rsp), %xmm5\n  movups 96(%rsp), %xmm6\n  movups 112(%rsp), %xmm7\n"
    "  add $136, %rsp\n"
    "  pop %r9\n  pop %r8\n  pop %rcx\n  pop %rdx\n  pop %rsi\n  pop %rdi\n"
    "  jmp *%r11\n"
    ".macro ENTRY name index\n"
    "  .globl \\name\n  .type \\name, @function\n"
    "\\name:\n"
    "  mov found+8*\\index(%rip), %r11\n  test %r11, %r11\n  jz 1f\n  jmp *%r11\n"
    "1: mov $\\index, %r11d\n  jmp first_call\n"
    ".endm\n"
@TRAMPOLINES@);
"""


def cudarc() -> pathlib.Path:
    """The folder of cudarc's sources, fetched if needed."""
    command = ["cargo", "metadata", "--locked", "--format-version=1", "--features=cuda"]
    command += ["--filter-platform=x86_64-unknown-linux-gnu"]
    crate = pathlib.Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=crate, stdout=subprocess.PIPE, check=True)
    (package,) = [p for p in json.loads(done.stdout)["packages"] if p["name"] == "cudarc"]
    return pathlib.Path(package["manifest_path"]).parent


def functions(bindings: str) -> dict[str, str]:
    """Names of foreign functions, and what they return."""
    pattern = r'extern "C" \{\s*fn (\w+)\([^{};]*?\)(?: -> ([^;{}]+))?;'
    return {name: returns for name, returns in re.findall(pattern, bindings)}


def source(names: dict[str, str], soname: str, status: int) -> str:
    entries = [f'{{"{name}", {"status" if returns in STATUS else "nothing"}}}' for name, returns in names.items()]
    trampolines = [f'    "ENTRY {name} {index}\\n"' for index, name in enumerate(names)]
    text = SOURCE.replace("@STATUS@", str(status)).replace("@SONAME@", soname)
    return text.replace("@ENTRIES@", ", ".join(entries)).replace("@TRAMPOLINES@", "\n".join(trampolines))


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if platform.machine() != "x86_64":
        sys.exit(f"libraries to link with are made for x86-64 only; this is {platform.machine()}")
    folder, bindings = pathlib.Path(sys.argv[1]), cudarc() / "src"
    for library, (module, soname, status) in LIBRARIES.items():
        names = functions((bindings / module / "sys/mod.rs").read_text())
        if len(names) < 20:
            sys.exit(f"cudarc's {module} bindings are not written as this script expects: {len(names)} functions found")
        with tempfile.TemporaryDirectory() as build:
            path = pathlib.Path(build, f"{library}.c")
            path.write_text(source(names, soname, status))
            subprocess.run(["cc", "-O2", "-fPIC", "-Wall", "-c", path.name], cwd=build, check=True)
            archive = folder.resolve() / f"lib{library}.a"
            archive.unlink(missing_ok=True)
            subprocess.run(["ar", "rcs", archive, f"{library}.o"], cwd=build, check=True)
        print(f"{archive}: {len(names)} functions", file=sys.stderr)
    # The CUDA runtime is there whole; it opens the driver itself.
    runtime = folder / "libcudart.a"
    runtime.unlink(missing_ok=True)
    runtime.symlink_to("libcudart_static.a")


main()
