#!/bin/bash
# Trains cartridges of several sizes for a demo document and writes their held-out scores as CSV.
#
# usage: scripts/train_curve.sh CSV [TOKENS ...]     (default 92 46 23 12: 10, 20, 40 and 80 times fewer)
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
cartouche=${CARTOUCHE:-$root/target/release/cartouche}
csv=$1
shift
[ $# -gt 0 ] || set -- 92 46 23 12
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "tokens,teacher,no_cartridge,cartridge,loss,kl,seconds" > "$csv"
for tokens in "$@"; do
    start=$(date +%s)
    "$cartouche" train --config "$root/configs/train-demo.yaml" --tokens "$tokens" --run-dir "$work/$tokens" \
        --cartridge-dir "$work/cartridges"
    python3 - "$work/$tokens/metrics.jsonl" "$tokens" $(($(date +%s) - start)) >> "$csv" <<'PY'
import json, sys

rows = [json.loads(line) for line in open(sys.argv[1])]
last = lambda name: [row[name] for row in rows if name in row][-1]
scores = [last(f"generate_{who}/score") for who in ("teacher", "no_cartridge", "cartridge")]
print(sys.argv[2], *(f"{x:.4f}" for x in (*scores, last("train/loss"), last("train/kl"))), sys.argv[3], sep=",")
PY
    tail -1 "$csv"
done
