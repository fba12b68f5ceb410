"""A training step of a cartridge in PyTorch: a decoder with frozen random weights in bf16, the prefix learned
through autograd, scaled dot-product attention. Logits are computed of supervised rows only, weights get no
gradients, Adam is the fused one: the fastest plain form that was found."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .torch_attention import sdpa, with_prefix


class Llama:
    """`config`: the members of a `config.json` of Llama or Qwen3. Positions are rotated without scaling, which
    costs the same."""

    def __init__(self, config: dict, device: str, layers: int):
        self.hidden, self.heads = config["hidden_size"], config["num_attention_heads"]
        self.kv_heads, self.dim = config["num_key_value_heads"], config["head_dim"]
        self.eps, self.layers, self.device = config["rms_norm_eps"], layers, device
        self.norms_heads = config["model_type"] == "qwen3"
        mlp, vocab = config["intermediate_size"], config["vocab_size"]
        generator = torch.Generator(device).manual_seed(1)

        def weight(rows: int, columns: int) -> torch.Tensor:
            values = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
            return values.normal_(0, columns**-0.5, generator=generator)

        self.embedding = weight(vocab, self.hidden)
        self.head = self.embedding if config["tie_word_embeddings"] else weight(vocab, self.hidden)
        self.weights = [
            {
                "q": weight(self.heads * self.dim, self.hidden),
                "k": weight(self.kv_heads * self.dim, self.hidden),
                "v": weight(self.kv_heads * self.dim, self.hidden),
                "o": weight(self.hidden, self.heads * self.dim),
                "gate": weight(mlp, self.hidden),
                "up": weight(mlp, self.hidden),
                "down": weight(self.hidden, mlp),
            }
            for _ in range(layers)
        ]
        self.ones = torch.ones(max(self.hidden, self.dim), dtype=torch.bfloat16, device=device)
        self.frequencies = 10000.0 ** (-torch.arange(0, self.dim, 2, device=device) / self.dim)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.ones[: x.shape[-1]], self.eps)

    def rotate(self, x: torch.Tensor, angles: tuple) -> torch.Tensor:
        cos, sin = angles
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def layer(
        self, index: int, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, angles: tuple
    ) -> torch.Tensor:
        w = self.weights[index]
        batch, rows, _ = x.shape

        def heads(name: str, count: int) -> torch.Tensor:
            return F.linear(normed, w[name]).view(batch, rows, count, self.dim).transpose(1, 2)

        normed = self.norm(x)
        q, k, v = heads("q", self.heads), heads("k", self.kv_heads), heads("v", self.kv_heads)
        if self.norms_heads:
            q, k = self.norm(q), self.norm(k)
        q, k = self.rotate(q, angles), self.rotate(k, angles)
        attended = sdpa(q, with_prefix(k, keys), with_prefix(v, values))
        x = x + F.linear(attended.transpose(1, 2).reshape(batch, rows, -1), w["o"])
        normed = self.norm(x)
        return x + F.linear(F.silu(F.linear(normed, w["gate"])) * F.linear(normed, w["up"]), w["down"])

    def hidden_states(self, ids: torch.Tensor, prefix: list, recompute: bool) -> torch.Tensor:
        x = F.embedding(ids, self.embedding)
        positions = torch.arange(ids.shape[1], device=self.device) + prefix[0][0].shape[1]
        turns = positions[:, None] * self.frequencies
        angles = (turns.cos().to(x.dtype), turns.sin().to(x.dtype))
        for index, (keys, values) in enumerate(prefix):
            operands = (index, x, keys.to(x.dtype), values.to(x.dtype), angles)
            x = checkpoint(self.layer, *operands, use_reentrant=False) if recompute else self.layer(*operands)
        return self.norm(x)


class TrainStep:
    """`sequences` of `length` tokens, the last `targets` rows of each with `top` entries of a distribution."""

    def __init__(self, model: Llama, sequences: int, length: int, targets: int, top: int, prefix: int, recompute: bool):
        self.model, self.targets, self.recompute = model, targets, recompute
        device, vocab = model.device, model.head.shape[0]
        generator = torch.Generator(device).manual_seed(2)

        def learned() -> torch.Tensor:
            values = torch.randn(model.kv_heads, prefix, model.dim, device=device, generator=generator)
            return values.requires_grad_()

        self.prefix = [(learned(), learned()) for _ in range(model.layers)]
        flat = [tensor for pair in self.prefix for tensor in pair]
        self.adam = torch.optim.Adam(flat, lr=1e-3, fused=True)
        self.ids = torch.randint(vocab, (sequences, length), device=device, generator=generator)
        self.entries = torch.randint(vocab, (sequences * targets, top), device=device, generator=generator)
        self.probability = 1.0 / top

    def run(self) -> None:
        hidden = self.model.hidden_states(self.ids, self.prefix, self.recompute)
        rows = hidden[:, -self.targets :].reshape(-1, self.model.hidden)
        logits = F.linear(rows, self.model.head)
        # In place of log_softmax of all: only the entries and the normaliser are needed.
        chosen = logits.gather(1, self.entries).float().sum(1) * self.probability
        loss = (torch.logsumexp(logits.float(), 1) - chosen).mean()
        loss.backward()
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
