"""The Qwen2 layout in plain PyTorch, shaped for training on many questions.

A training row is one prefix (the system message with the document) and many
branches: short conversations that each continue the prefix and do not see each
other.  Every branch is therefore exactly the prompt a single question makes,
yet the document is computed once.  Branch tokens count their positions from
the end of the prefix, or from 0 where a branch has no document.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 384
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q)
        self.k_proj = nn.Linear(c.hidden_size, kv)
        self.v_proj = nn.Linear(c.hidden_size, kv)
        self.o_proj = nn.Linear(q, c.hidden_size, bias=False)

    def keys(self, x, rope):
        b, t, _ = x.shape
        c = self.c
        k = self.k_proj(x).view(b, t, c.num_key_value_heads, c.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, c.num_key_value_heads, c.head_dim).transpose(1, 2)
        groups = c.num_attention_heads // c.num_key_value_heads
        return rotate(k, *rope).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)

    def queries(self, x, rope):
        b, t, _ = x.shape
        c = self.c
        q = self.q_proj(x).view(b, t, c.num_attention_heads, c.head_dim).transpose(1, 2)
        return rotate(q, *rope)

    def merge(self, y):
        b, _, t, _ = y.shape
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))

    def prefix(self, x, rope, k, v):
        return self.merge(F.scaled_dot_product_attention(self.queries(x, rope), k, v, is_causal=True))

    def branches(self, x, rope, kp, vp, mask, shape):
        """Branch tokens see the prefix (under `mask`) and their own branch."""
        b, n, l = shape
        h, d = self.c.num_attention_heads, self.c.head_dim
        q = self.queries(x, rope) / math.sqrt(d)
        k, v = self.keys(x, rope)
        q5, k5, v5 = (z.view(b, h, n, l, d) for z in (q, k, v))
        own = q5 @ k5.transpose(-1, -2)
        own = own.masked_fill(torch.ones(l, l, dtype=torch.bool).triu(1), float("-inf"))
        far = q @ kp.transpose(-1, -2) + mask
        p = torch.softmax(torch.cat((far, own.reshape(b, h, n * l, l)), dim=-1), dim=-1)
        p, own = p.split((kp.shape[2], l), dim=-1)
        y = p @ vp + (own.reshape(b, h, n, l, l) @ v5).view(b, h, n * l, d)
        return self.merge(y)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)


class Model(nn.Module):
    """Parameter names follow the Hugging Face checkpoint, below "model."."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.init()

    def frequencies(self):
        d = self.c.head_dim
        # Written as transformers does: the last bit of it shows at position 1,000.
        return 1.0 / self.c.rope_theta ** (torch.arange(0, d, 2, dtype=torch.float32) / d)

    def init(self):
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=m.in_features ** -0.5)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        # A token must stay readable beside what the layers add to it, so the
        # embedding is larger than 1/sqrt(size), and the final norm takes the
        # factor back out of the tied logits.
        nn.init.normal_(self.embed_tokens.weight, std=0.25)
        nn.init.constant_(self.norm.weight, 0.25)
        for layer in self.layers:
            layer.self_attn.o_proj.weight.data.mul_(0.5)
            layer.mlp.down_proj.weight.data.mul_(0.5)
        self.look_back()

    def look_back(self, strength=5.0):
        """Layer 0 starts with heads that look exactly 1, 2, 4 and 6 tokens back.

        2 and 4 lead from a value to its subject; 6 leads from the end of the
        prompt, over "?<|im_end|>, newline, <|im_start|>assistant, newline", to the
        subject of the question, where answering or refusing is decided.

        With key bias (c, 0) in every rotary pair and query bias
        c * (cos kw, -sin kw) the score depends on the distance alone and peaks
        at k.  Everything after that is training; without this start the
        circuit for recall takes far longer to form.
        """
        attn, w = self.layers[0].self_attn, self.frequencies()
        zero = torch.zeros_like(w)
        with torch.no_grad():
            key = torch.cat((strength + zero, zero))
            attn.k_proj.bias.copy_(key.repeat(self.c.num_key_value_heads))
            attn.q_proj.bias.copy_(torch.cat([
                torch.cat((strength * torch.cos(k * w), -strength * torch.sin(k * w)))
                for k in (1, 2, 4, 6)[:self.c.num_attention_heads]]))

    def rope(self, positions):
        """cos and sin, [batch, 1, tokens, head_dim], of integer positions."""
        angle = positions[:, None, :, None].float() * self.frequencies()
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos(), angle.sin()

    def logits(self, x):
        return self.norm(x) @ self.embed_tokens.weight.T

    def plain(self, ids):
        """Logits of ordinary causal sequences, [batch, tokens, vocabulary]."""
        x = self.embed_tokens(ids)
        rope = self.rope(torch.arange(ids.shape[1])[None])
        for layer in self.layers:
            h = layer.input_layernorm(x)
            x = x + layer.self_attn.prefix(h, rope, *layer.self_attn.keys(h, rope))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.logits(x)

    def forward(self, prefix, lengths, branches, no_prefix, where):
        """Final hidden states at the branch tokens listed in `where` (flat indices).

        prefix [B, T] and its true lengths [B]; branches [B, n, l];
        no_prefix [B, n]: branches that stand alone.
        """
        b, n, l = branches.shape
        t = prefix.shape[1]
        x = self.embed_tokens(prefix)
        y = self.embed_tokens(branches.reshape(b, n * l))
        rope_x = self.rope(torch.arange(t)[None])
        start = lengths[:, None].masked_fill(no_prefix, 0)
        rope_y = self.rope((start[:, :, None] + torch.arange(l)).reshape(b, n * l))
        hidden = (torch.arange(t)[None, None] >= lengths[:, None, None]) | no_prefix[:, :, None]
        mask = torch.zeros(b, n, t).masked_fill(hidden, float("-inf"))
        mask = mask.repeat_interleave(l, 1)[:, None]
        for i, layer in enumerate(self.layers):
            attn = layer.self_attn
            h = layer.input_layernorm(x)
            k, v = attn.keys(h, rope_x)
            y = y + attn.branches(layer.input_layernorm(y), rope_y, k, v, mask, (b, n, l))
            if i + 1 == len(self.layers):   # nothing reads the prefix any more,
                y = y.reshape(b * n * l, -1)[where]   # nor the other branch tokens
                y = y + layer.mlp(layer.post_attention_layernorm(y))
                break
            y = y + layer.mlp(layer.post_attention_layernorm(y))
            x = x + attn.prefix(h, rope_x, k, v)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return y
