#!/usr/bin/env bash
# Links a program with the archives of scripts/cuda_trampolines.py and checks that calls reach the library they belong to
# with all their arguments, and come to the right error without it. Needs gcc, neither CUDA nor a GPU.
#   scripts/test_cuda_trampolines.sh FOLDER      the toolkit's folder of libraries
set -euo pipefail
archives=$(realpath "${1:?usage: scripts/test_cuda_trampolines.sh FOLDER}")
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
cd "$folder"
# Stand-ins for two libraries: one function with fourteen arguments, eight of them on the stack, and one with floats.
cat >blas.c <<'C'
long cublasSgemm_v2(long a, long b, long c, long d, long e, long f, long g, long h, long i, long j, long k, long l, long m, long n) {
    long all[] = {a, b, c, d, e, f, g, h, i, j, k, l, m, n};
    for (int at = 0; at < 14; at++)
        if (all[at] != 1000 + at) return 1;
    return 0;
}
C
cat >rand.c <<'C'
long curandGenerateNormalDouble(long generator, double *out, long n, double mean, double deviation) {
    *out = mean - deviation;
    return generator == 7 && n == 9 ? 0 : 1;
}
C
cat >main.c <<'C'
#include <stdio.h>
#include <stdlib.h>
int cuInit(unsigned), nvrtcVersion(int *, int *);
const char *nvrtcGetErrorString(int);
long curandGenerateNormalDouble(long, double *, long, double, double);
long cublasSgemm_v2(long, long, long, long, long, long, long, long, long, long, long, long, long, long);
#define EXPECT(what) do { if (!(what)) { printf("line %d: not " #what "\n", __LINE__); exit(1); } } while (0)
int main(void) {
    /* The first call finds the function, the second one knows it. */
    for (int time = 0; time < 2; time++) {
        double out = 0;
        EXPECT(cublasSgemm_v2(1000, 1001, 1002, 1003, 1004, 1005, 1006, 1007, 1008, 1009, 1010, 1011, 1012, 1013) == 0);
        EXPECT(curandGenerateNormalDouble(7, &out, 9, 2.5, 1.0) == 0 && out == 1.5);
        EXPECT(nvrtcVersion(0, 0) == 11 && nvrtcGetErrorString(0) == 0);
        EXPECT(cuInit(0) == 100 || system("nvidia-smi >/dev/null 2>&1") == 0);
    }
}
C
gcc -shared -fPIC -o libcublas.so.13 blas.c
gcc -shared -fPIC -o libcurand.so.10 rand.c
gcc -o main main.c -L"$archives" -lcublas -lcurand -lnvrtc -lcuda
LD_LIBRARY_PATH=$folder ./main 2>said || { cat said; exit 1; }
# A missing library is named once; a missing driver is left to the caller.
grep -c 'libnvrtc.so.13: cannot open' said | grep -qx 1
[ "$(wc -l <said)" = 2 ]
echo 'trampolines: calls arrive'
