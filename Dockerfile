# docker build -t cartouche . && docker run -p 10210:10210 cartouche
FROM rust:1.95-slim-bookworm AS build
RUN apt-get update && apt-get install --no-install-recommends -y gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
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
