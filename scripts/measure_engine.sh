#!/bin/bash
# Measures the engine; one CSV (or folder) per part under DIR. Build first: cargo build --release --benches
#
#   demo      decode tokens/s of the demo model at 1, 8 and 32 clients, engine alone
#   shared    a cartridge of 2,048 tokens: none, one for all grouped, one for all not grouped, private copies
#   group     the same for 1, 2, 3, 4 and 8 clients: from how many on does grouping pay
#   overhead  the same load in the engine alone and over HTTP; of MODEL too, if it is given
#   capacity  clients with a prefix each and a full KV cache: 1,235 tokens of text against 32 of cartridge
#
# usage: scripts/measure_engine.sh DIR "PART ..." [MODEL]
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
out=$1 parts=$2 model=${3:-}
mkdir -p "$out"
root=$(cd "$(dirname "$0")/.." && pwd)
cartouche=${CARTOUCHE:-$root/target/release/cartouche}
engine=$(ls -t "$root"/target/release/deps/engine-* | grep -v '\.d$' | head -1)
work=$(mktemp -d)
server=
stop() { [ -z "$server" ] || { kill "$server"; wait "$server" || true; server=; }; }
trap 'stop; rm -rf "$work"' EXIT

serve() { # options...
    "$cartouche" serve --port 10391 "$@" > "$work/serve.log" 2>&1 &
    server=$!
    for _ in $(seq 600); do
        curl -sf http://127.0.0.1:10391/health/ready > "$work/ready" && return
        sleep 0.1
    done
    cat "$work/serve.log" >&2
    exit 1
}
bench() { # name, options...
    local name=$1
    shift
    "$cartouche" bench --url http://127.0.0.1:10391 --out "$work/$name" "$@"
    cp "$work/$name/bench.csv" "$out/$name.csv"
}
# Without the header after the first of a file.
table() { if [ -s "$1" ]; then tail -n +2 >> "$1"; else cat > "$1"; fi; }

for part in $parts; do
    case $part in
    demo)
        "$engine" --model demo --clients 1,8,32 --repeat 9 | tee "$out/engine-demo.csv" ;;
    shared)
        rm -f "$out/engine-shared-cartridge.csv"
        for options in "--cartridge-tokens 0" "--cartridge-tokens 2048" \
            "--cartridge-tokens 2048 --group-min-sequences 100000" "--cartridge-tokens 2048 --private"; do
            # shellcheck disable=SC2086
            "$engine" --model demo --clients 1,4,16,64 --repeat 3 $options | tee /dev/stderr |
                table "$out/engine-shared-cartridge.csv"
        done ;;
    group)
        rm -f "$out/engine-group-threshold.csv"
        for min in 2 100000; do
            "$engine" --model demo --clients 1,2,3,4,8 --repeat 7 --cartridge-tokens 2048 \
                --group-min-sequences $min | tee /dev/stderr | table "$out/engine-group-threshold.csv"
        done ;;
    overhead)
        "$engine" --model demo --clients 1,8,32 --repeat 9 | tee "$out/overhead-demo-engine.csv"
        serve --model demo --no-prefix-cache
        bench overhead-demo-http --endpoint completions --clients 1,8,32 --prompt-tokens 16 --output-tokens 128 \
            --requests 9
        stop
        if [ -n "$model" ]; then
            "$engine" --model "$model" --clients 1,8 --prompt-tokens 32 --output-tokens 32 --repeat 3 |
                tee "$out/overhead-1b-engine.csv"
            serve --model "$model" --no-prefix-cache
            bench overhead-1b-http --endpoint completions --clients 1,8 --prompt-tokens 32 --output-tokens 32 \
                --requests 3 --warmup 0
            stop
        fi ;;
    capacity)
        # 64 MiB are 21,845 tokens of the demo model: 16 texts, or 256 cartridges with 32 + 32 tokens each.
        CARTOUCHE=$cartouche "$root/scripts/bench_capacity.sh" "$work/cartridges" 256 32 --model demo
        serve --model demo --kv-cache-mib 64 --max-running-sequences 256 --cartridge-dir "$work/cartridges"
        for tokens in 32 128; do
            load="--scenario distinct --prompt-tokens 16 --output-tokens $tokens --requests 3 --repeat 3"
            # shellcheck disable=SC2086
            bench "capacity-text-$tokens" $load --prefix text --prefix-tokens 1235 --clients fill
            # shellcheck disable=SC2086
            bench "capacity-cartridge-$tokens" $load --prefix cartridge --cartridge 'bench-{client}' --clients 256
        done
        stop
        serve --model demo --kv-cache-mib 64 --max-running-sequences 256 --no-prefix-cache
        bench capacity-text-first-use --scenario distinct --prompt-tokens 16 --output-tokens 32 --requests 3 --repeat 3 \
            --prefix text --prefix-tokens 1235 --clients fill
        stop ;;
    *) echo "no part $part" >&2; exit 2 ;;
    esac
done
