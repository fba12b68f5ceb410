#!/usr/bin/env bash
# Lints all code of the CUDA build, `flash-attn` included, on a machine without CUDA: a stand-in for nvcc writes empty files,
# so that candle's kernels (7 minutes of processor time) and those of flash-attn (hours) are left out. Ours are compiled by
# scripts/check_kernels.py.
set -euo pipefail
cd "$(dirname "$0")/.."
# A folder of its own: a real build must not find the empty files.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/cuda-lint
mkdir -p "$CARGO_TARGET_DIR/stand-in"
folder=$(realpath "$CARGO_TARGET_DIR/stand-in")
cat >"$folder/nvcc" <<'STAND_IN'
#!/usr/bin/env bash
# With `-o FILE`, or `--output-directory FOLDER` and the source last.
while [ "$#" -gt 1 ]; do
    [ "$1" != -o ] || : >"$2"
    [ "$1" != --output-directory ] || : >"$2/$(basename "${@: -1}" .cu).ptx"
    shift
done
STAND_IN
chmod +x "$folder/nvcc"
# flash-attn's build script is content with a repository at the right commit.
commit=7d49e6c7e2f8896c47f586706e67e1fb215529dc
cutlass=$folder/git/checkouts/cutlass-${commit:0:16}
mkdir -p "$cutlass/include"
git init --quiet "$cutlass"
echo "$commit" >"$cutlass/.git/HEAD"
NVCC=$folder/nvcc CUDAFORGE_HOME=$folder CUDARC_CUDA_VERSION=13000 CUDA_COMPUTE_CAP=80 \
    cargo clippy --locked --features flash-attn -- -D warnings
