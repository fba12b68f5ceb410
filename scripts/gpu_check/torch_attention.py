"""PyTorch's attention of training: a prefix that every query sees, then the sequence's own keys, causal."""

import contextlib
import math

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right


def backend(device: str):
    """On a GPU flash attention or an error; a CPU has it for equal lengths only, and chooses itself."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION]) if device.startswith("cuda") else contextlib.nullcontext()


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`q` `[batch, heads, rows, dim]`; `k`, `v` `[batch, kv_heads, keys, dim]`: row i sees all keys but the last
    `rows - 1 - i`."""
    rows, keys = q.shape[2], k.shape[2]
    attend = torch.nn.functional.scaled_dot_product_attention
    if rows == 1:
        return attend(q, k, v, enable_gqa=True)
    if rows == keys:
        return attend(q, k, v, is_causal=True, enable_gqa=True)
    # Chooses flash attention with the mask aligned to the last key where it can.
    return attend(q, k, v, attn_mask=causal_lower_right(rows, keys), enable_gqa=True)


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
