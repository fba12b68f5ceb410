# For the CPU:          docker build -t cartouche . && docker run -p 10210:10210 cartouche
# For NVIDIA GPUs:      docker build --target cuda -t cartouche-cuda . && docker run --gpus all -p 10210:10210 cartouche-cuda
# The second is written but has been neither built nor run yet. It needs a driver for CUDA 13 (580 or later); without one, and
# without --gpus, it computes on the CPU.
FROM rust:1.95-slim-bookworm AS source
RUN apt-get update && apt-get install --no-install-recommends -y gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .

# The compiler comes from wheels, as in CI, and the program is linked to open CUDA's libraries when it runs.
FROM source AS cuda-build
# Of candle's kernels, as PTX: 80 runs on every GPU since Ampere.
ARG CUDA_COMPUTE_CAP=80
RUN apt-get update && apt-get install --no-install-recommends -y g++ python3-venv && rm -rf /var/lib/apt/lists/*
RUN scripts/cuda_toolkit.sh /opt/nvcc >/opt/nvcc.env
RUN . /opt/nvcc.env && CUDAFORGE_THREADS=$(nproc) cargo build --release --locked --features cuda

FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04 AS cuda
RUN useradd --create-home cartouche
COPY --from=cuda-build /src/target/release/cartouche /usr/local/bin/cartouche
USER cartouche
WORKDIR /home/cartouche
ENV CARTOUCHE_HOST=0.0.0.0 LD_LIBRARY_PATH=/usr/local/cuda/lib64:$LD_LIBRARY_PATH
EXPOSE 10210
STOPSIGNAL SIGTERM
ENTRYPOINT ["cartouche"]
CMD ["serve"]

FROM source AS build
RUN cargo build --release --locked

FROM debian:bookworm-slim
RUN useradd --create-home cartouche
COPY --from=build /src/target/release/cartouche /usr/local/bin/cartouche
USER cartouche
WORKDIR /home/cartouche
ENV CARTOUCHE_HOST=0.0.0.0
EXPOSE 10210
STOPSIGNAL SIGTERM
ENTRYPOINT ["cartouche"]
CMD ["serve"]
