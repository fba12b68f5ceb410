"""Cartridges for the built-in demo model: random numbers of a seed, so that each gives answers of its own."""

import functools
import hashlib
import json
import os
import pathlib
import random
import struct

# Of the demo model.
LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 64
BYTES_PER_TOKEN = 2 * LAYERS * KV_HEADS * HEAD_DIM * 4
# The exponent of every number: 0.5 to 2 and their negatives, never infinite.
HIGH_BYTES = bytes(0x3F if byte < 128 else 0xBF for byte in range(256))


def tokens_of(mib: float) -> int:
    """Tokens of a cartridge that takes so much memory."""
    return max(1, int(mib * 2**20) // BYTES_PER_TOKEN)


def numbers(seed: int, count: int) -> bytes:
    """So many f32, little-endian."""
    source = random.Random(seed)
    out = bytearray(4 * count)
    for place in range(3):
        out[place::4] = source.randbytes(count)
    out[3::4] = source.randbytes(count).translate(HIGH_BYTES)
    return bytes(out)


@functools.cache
def header(tokens: int, generation: str) -> bytes:
    size = KV_HEADS * tokens * HEAD_DIM * 4
    entries = {"__metadata__": {
        "format": "cartouche.cartridge", "format_version": "1", "generation": generation,
        "tokens": str(tokens), "frozen_tokens": "1"}}
    for i in range(2 * LAYERS):
        name = f"layers.{i // 2}.{('keys', 'values')[i % 2]}"
        entries[name] = {"dtype": "F32", "shape": [KV_HEADS, tokens, HEAD_DIM],
                         "data_offsets": [i * size, (i + 1) * size]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def make(seed: int, tokens: int) -> tuple[str, bytes]:
    """The generation and the file of a cartridge."""
    data = numbers(seed, 2 * LAYERS * KV_HEADS * tokens * HEAD_DIM)
    digest = hashlib.sha256(b"cartouche cartridge v1\0")
    digest.update(struct.pack("<5Q", LAYERS, KV_HEADS, tokens, HEAD_DIM, 1))
    digest.update(b"f32\0" + bytes(LAYERS))
    digest.update(data)
    generation = digest.hexdigest()
    return generation, header(tokens, generation) + data


def corrupt(file: bytes, how: int) -> bytes:
    """A file that must be refused: other numbers than its digest says, one that is not finite, cut short."""
    if how % 3 == 0:
        return file[:-1] + bytes([file[-1] ^ 1])
    if how % 3 == 1:
        return file[:-4] + struct.pack("<f", float("nan"))
    return file[: len(file) // 2]


def put(folder: pathlib.Path, file: bytes) -> None:
    """Replaces the cartridge of a folder by rename."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".new-{random.getrandbits(32):08x}"
    temporary.write_bytes(file)
    os.replace(temporary, folder / "cartridge.safetensors")
