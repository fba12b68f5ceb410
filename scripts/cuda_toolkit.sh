#!/usr/bin/env bash
# Installs the CUDA compiler (nvcc 13.0) from Python wheels, and what to link with: no GPU, driver or root; 104 MB to
# fetch, 271 MB on disk.
#   scripts/cuda_toolkit.sh FOLDER      prints what to export; then `cargo build --release --features cuda`
# Needs Python 3 with venv, gcc and cargo. Versions are pinned: code of a newer nvcc is refused by drivers of the 580
# series. CUDA_COMPUTE_CAP is for candle's kernels, which become PTX of that architecture: 80 runs on every GPU since
# Ampere. What they do not run as PTX, products with quantised weights, is not used.
set -euo pipefail
folder=${1:?usage: scripts/cuda_toolkit.sh FOLDER}
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check --no-deps \
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 >&2
home=$("$folder/bin/python" -c 'import site; print(site.getsitepackages()[0])')/nvidia/cu13
ln -sfn lib "$home/lib64" # where nvcc's own link step looks
CUDA_HOME=$home "$home/bin/nvcc" --version >&2
if [ "$(uname -m)" = x86_64 ]; then
    "$(dirname "$0")/cuda_trampolines.py" "$home/lib"
else
    echo 'nothing to link with: cuda_trampolines.py knows x86-64 only; cargo check works' >&2
fi
printf 'export CUDA_HOME=%q PATH=%q:"$PATH" CUDA_COMPUTE_CAP=%q\n' "$home" "$home/bin" "${CUDA_COMPUTE_CAP:-80}"
