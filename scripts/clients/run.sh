#!/usr/bin/env bash
# Starts the server on a free port with the demo model and lets real clients at it.
# Usage: scripts/clients/run.sh [path of the cartouche binary]
set -euo pipefail
cd "$(dirname "$0")/../.."
binary=${1:-target/release/cartouche}
python=${PYTHON:-python3}
log=$(mktemp) server=
trap 'kill "$server" 2>/dev/null || true; rm -f "$log"' EXIT
start() {
    : >"$log"
    "$binary" serve --port 0 >"$log" &
    server=$!
    for _ in $(seq 100); do
        url=$(sed -n 's/^Cartouche .* on \(http[^ ]*\)$/\1/p' "$log")
        [ -n "$url" ] && break
        kill -0 "$server" || { echo 'the server did not start'; exit 1; }
        sleep 0.1
    done
    [ -n "$url" ] || { echo 'the server did not announce itself within 10 s'; exit 1; }
}
start
"$python" scripts/clients/printed_commands.py "$log"
"$python" scripts/clients/openai_client.py "$url/v1" --cartridge local:harbour-log
"$python" scripts/clients/teacher_client.py "$url" --model cartouche-demo \
    --cartridge local:harbour-log --cartridge wandb:harbour-log --cartridge huggingface:harbour-log
kill -TERM "$server"
wait "$server"
CARTOUCHE_API_KEY='another-key,client-key' start
"$python" scripts/clients/openai_client.py "$url/v1" --cartridge local:harbour-log --api-key client-key
kill -TERM "$server"
wait "$server"
echo 'real clients: all passed, and the server stopped cleanly'
