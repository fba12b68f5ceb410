"""PyTorch's attention of training: a prefix that every query sees, then the sequence's own keys, causal."""

import contextlib
import math
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right


def backend(device: str):
    """On a GPU flash attention or an error; a CPU has it for equal lengths only, and chooses itself."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION]) if device.startswith("cuda") else contextlib.nullcontext()


_repeats_heads = False


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`q` `[batch, heads, rows, dim]`; `k`, `v` `[batch, kv_heads, keys, dim]`: row i sees all keys but the last
    `rows - 1 - i`."""
    global _repeats_heads
    if not _repeats_heads:
        try:
            return chosen(q, k, v)
        except RuntimeError as error:
            if "No available kernel" not in str(error) or q.shape[1] == k.shape[1]:
                raise
            print("flash attention takes no grouped heads here: keys and values are repeated", file=sys.stderr)
            _repeats_heads = True
    groups = q.shape[1] // k.shape[1]
    return chosen(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))


def chosen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The form of the call that can become flash attention."""
    rows, keys = q.shape[2], k.shape[2]
    attend = torch.nn.functional.scaled_dot_product_attention
    grouped = q.shape[1] != k.shape[1]
    if rows == 1:
        return attend(q, k, v, enable_gqa=grouped)
    if rows == keys:
        return attend(q, k, v, is_causal=True, enable_gqa=grouped)
    # Chooses flash attention with the mask aligned to the last key where it can.
    return attend(q, k, v, attn_mask=causal_lower_right(rows, keys), enable_gqa=grouped)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same, written out, in the type of its operands."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    rows, keys = scores.shape[2:]
    unseen = torch.ones(rows, keys, dtype=torch.bool, device=q.device).triu(keys - rows + 1)
    return scores.masked_fill(unseen, -math.inf).softmax(-1) @ v


def with_prefix(own: torch.Tensor, prefix: torch.Tensor | None) -> torch.Tensor:
    """`own` `[batch, kv_heads, rows, dim]` behind `prefix` `[kv_heads, keys, dim]`."""
    return own if prefix is None else torch.cat([prefix.expand(own.shape[0], *prefix.shape), own], 2)
