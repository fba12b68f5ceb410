#!/bin/sh
# Makes COUNT different cartridges of about TOKENS tokens each, named bench-0, bench-1, ..., for
#
#   cartouche serve --model MODEL --cartridge-dir DIR
#   cartouche bench --scenario distinct --prefix cartridge --cartridge 'bench-{client}' --clients COUNT
#
# The other half of the comparison, the same clients with their texts in the prompt, needs no files:
#
#   cartouche bench --scenario distinct --prefix text --prefix-tokens N --clients fill
#
# usage: scripts/bench_capacity.sh DIR COUNT TOKENS [options of `cartouche cartridge prefill`: --model ...]
set -eu
[ $# -ge 3 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
dir=$1 count=$2 tokens=$3
shift 3
cartouche=${CARTOUCHE:-cartouche}
text=$(mktemp)
trap 'rm -f "$text"' EXIT
i=0
while [ "$i" -lt "$count" ]; do
    awk -v seed="$i" -v words="$tokens" 'BEGIN {
        n = split("the of and to in is was he for it with as his on be at by had not are but from", word, " ")
        srand(seed + 1)
        for (w = 0; w < words; w++) printf "%s ", word[int(rand() * n) + 1]
    }' > "$text"
    mkdir -p "$dir/bench-$i"
    "$cartouche" cartridge prefill --document "$text" -o "$dir/bench-$i/cartridge.safetensors" "$@"
    i=$((i + 1))
done
