#!/usr/bin/env bash
# Installs the CUDA compiler (nvcc 13.0) from Python wheels: no GPU, driver or root; 104 MB to fetch, 271 MB on disk.
#   scripts/cuda_toolkit.sh FOLDER      prints what to export
# Needs Python 3 with venv, and g++ or clang++ for what nvcc leaves to the host. Versions are pinned: code of a newer
# nvcc is refused by drivers of the 580 series.
set -euo pipefail
folder=${1:?usage: scripts/cuda_toolkit.sh FOLDER}
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check --no-deps \
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 >&2
home=$("$folder/bin/python" -c 'import site; print(site.getsitepackages()[0])')/nvidia/cu13
ln -sfn lib "$home/lib64" # where nvcc's own link step looks
CUDA_HOME=$home "$home/bin/nvcc" --version >&2
printf 'export CUDA_HOME=%q PATH=%q:"$PATH"\n' "$home" "$home/bin"
