#!/usr/bin/env bash
# Writes the exact-KV cartridges of the demo documents from the model in assets/demo/model.
# Run it after the model or a document has changed; `cargo test` notices if it was forgotten.
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p assets/demo/cartridges
for document in assets/demo/documents/*/; do
    name=$(basename "$document")
    output=assets/demo/cartridges/$name.safetensors
    # The binary embeds the file, so a first build needs one to exist.
    [ -e "$output" ] || : >"$output"
    cargo run --quiet ${CARGO_PROFILE:+--profile "$CARGO_PROFILE"} -- cartridge prefill \
        --model assets/demo/model --served-model-name cartouche-demo \
        --document "${document}document.txt" --output "$output"
done
