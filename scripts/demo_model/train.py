"""Train the demo model from scratch, export it, and write the demo documents.

    python scripts/demo_model/train.py --out assets/demo

Two stages, in this order and not mixed: first only the copying of random
strings, until it is all but perfect (that builds the induction circuit), then
recall from documents, from few facts to many.  On one CPU core the whole
run takes about 50 minutes.
"""

import argparse
import math
import random
import time
from collections import deque
from pathlib import Path

import torch
import torch.nn.functional as F

import batches
import tokenizer as tok
import words
from model import Config, Model


def log(text):
    print(time.strftime("%H:%M:%S"), text, flush=True)


class Trainer:
    def __init__(self, args, vocab):
        torch.manual_seed(args.seed)
        self.args = args
        self.rng = random.Random(args.seed)
        self.model = Model(Config(vocab_size=vocab, num_hidden_layers=args.layers,
                                  intermediate_size=args.intermediate))
        # A helper for training only, see recall(); it is not exported.
        size = self.model.c.hidden_size
        self.hint = torch.nn.Linear(size, size, bias=False)
        torch.nn.init.eye_(self.hint.weight)
        self.new_optimizer()

    def new_optimizer(self):
        args = self.args
        decay = [p for p in self.model.parameters() if p.dim() > 1]
        rest = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay + [self.hint.weight], "weight_decay": 0.01},
             {"params": rest, "weight_decay": 0.0}],
            lr=args.lr, betas=(0.9, 0.98))

    def save(self, path, **more):
        torch.save({"model": self.model.state_dict(), "config": self.model.c.__dict__,
                    "hint": self.hint.state_dict(), "optimizer": self.optimizer.state_dict(),
                    "rng": self.rng.getstate(), "seed": self.args.seed, **more}, path)

    def restore(self, saved):
        self.model.load_state_dict(saved["model"])
        self.hint.load_state_dict(saved["hint"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.rng.setstate(saved["rng"])

    def step(self, loss, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def copying(self, vocab, low, high):
        ids, n = batches.copying(self.rng, vocab, low, high, self.args.copy_tokens)
        logits, target = self.model.plain(ids)[:, n:-1], ids[:, n + 1:]
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1))
        return loss, (logits.argmax(-1) == target).float().mean().item()

    def recall(self, batch, hint_weight=1.0):
        """Loss of one recall batch, and its logits.

        Whether to answer or refuse is decided at the first token of the answer,
        before the value is due.  "Is there a match anywhere?" alone gives next to
        no gradient until attention already finds the match, and stayed at chance
        for hundreds of steps.  So in training the same position must also name the
        value (or the refusal's first word), read through one extra matrix.
        """
        inputs, tokens, weights, _, hints = batch
        hidden = self.model(*inputs)
        logits = self.model.logits(hidden)
        loss = (F.cross_entropy(logits, tokens, reduction="none") * weights).sum() / weights.sum()
        named = self.model.logits(self.hint(hidden[hints[:, 0]]))
        return loss + hint_weight * F.cross_entropy(named, hints[:, 1]), logits

    def stage_one(self, vocab):
        """Copying alone, until three reports in a row are good."""
        start, good, recent = time.time(), 0, []
        for s in range(1, 1501):
            loss, accuracy = self.copying(vocab, 8, 64)
            self.step(loss, self.args.lr * min(1.0, s / 50))
            recent.append(accuracy)
            if s % 10 == 0:
                mean = sum(recent) / len(recent)
                recent = []
                good = good + 1 if mean > 0.95 else 0
                log(f"copying {s}: loss {loss.item():.3f} accuracy {mean:.3f} "
                    f"({time.time() - start:.0f} s)")
                if good == 3:
                    return s
        raise SystemExit("copying was not learned; the circuit did not form")


def measure(encoder, logits, batch, values):
    """Accuracies of one recall batch, and how values were missed."""
    _, tokens, _, whats, _ = batch
    guess = logits.argmax(-1)
    right = (guess == tokens).tolist()
    refusal = encoder("I")[0]
    out = {k: [0, 0] for k in ("value", "answer", "refuse")}
    other = 0
    for i, what in enumerate(whats):
        if what == "text":
            continue
        key = what if what == "value" else ("refuse" if tokens[i] == refusal else "answer")
        out[key][0] += right[i]
        out[key][1] += 1
        if what == "value" and not right[i]:
            other += guess[i].item() in values
    return out, other


class Curriculum:
    """How many facts a document has: more of them as recall gets better.

    Both skills must keep up, recalling values and knowing what is not there:
    the second is learned later, and hardly at all once documents are long.
    """

    def __init__(self, rng, top):
        self.rng, self.top, self.facts = rng, top, 4
        self.recent = deque(maxlen=15)

    def draw(self):
        if self.facts < self.top and self.rng.random() < 0.6:
            return int(self.facts)
        if self.facts == self.top and self.rng.random() < 0.5:
            return self.rng.randint(self.top // 3, self.top * 3 // 4)
        return int(round(math.exp(self.rng.uniform(math.log(3), math.log(self.facts)))))

    def mean(self, key):
        return sum(r[key][0] for r in self.recent) / max(1, sum(r[key][1] for r in self.recent))

    def record(self, count, out):
        if count == int(self.facts) and count < self.top:
            self.recent.append(out)
            value, answer, refuse = (self.mean(k) for k in ("value", "answer", "refuse"))
            if len(self.recent) >= 8 and value > 0.9 and answer + refuse > 1.7:
                self.facts = min(self.top, self.facts * 1.5)
                self.recent.clear()


def stage_two(trainer, encoder, vocab, checkpoint, curriculum, first, before, copying_steps):
    args, rng = trainer.args, trainer.rng
    values = {encoder(" " + v)[0] for pool in words.VALUES.values() for v in pool}
    total = {k: [0, 0] for k in ("value", "answer", "refuse")}
    other, copied, start = 0, [], time.time()
    for s in range(first, args.steps + 1):
        done = s / args.steps
        lr = args.lr * min(1.0, s / 50) * (0.05 + 0.95 * min(1.0, (1 - done) / 0.6))
        if s % 8 == 0:
            loss, accuracy = trainer.copying(vocab, 8, 96)
            copied.append(accuracy)
            trainer.step(loss, lr)
        else:
            count, now = curriculum.draw(), curriculum.facts
            # Another attribute of a known subject is the hardest thing to refuse.
            # Much of it early blurs "is the subject there at all?"; so it comes last.
            wrong = 0.0 if now < 60 else 0.08 if done < 0.72 else 0.35
            batch = batches.recall(
                rng, encoder, count, args.tokens,
                mixed=0.15 if now < 16 else 0.3 if now < 40 else 0.6,
                wrong_attribute=wrong)
            loss, logits = trainer.recall(batch)
            trainer.step(loss, lr)
            out, missed = measure(encoder, logits, batch, values)
            curriculum.record(count, out)
            other += missed
            for key in total:
                total[key] = [a + b for a, b in zip(total[key], out[key])]
        if s % 25 == 0:
            shown = " ".join(f"{k} {a / max(1, b):.3f}" for k, (a, b) in total.items())
            wrong = total["value"][1] - total["value"][0]
            log(f"{s}: facts {int(curriculum.facts)} {shown} other-value {other}/{wrong} "
                f"copying {sum(copied) / len(copied):.3f} loss {loss.item():.3f} "
                f"{(time.time() - start) / (s - first + 1):.2f} s/step")
            total, other, copied = {k: [0, 0] for k in total}, 0, []
        if s % 100 == 0 or s == args.steps:
            trainer.save(checkpoint, step=s, facts=curriculum.facts, copying_steps=copying_steps,
                         seconds=before + time.time() - start)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--out", type=Path, required=True, help="folder of the demo assets")
    p.add_argument("--work", type=Path, default=Path("target/demo_model"), help="folder for checkpoints")
    p.add_argument("--seed", type=int, default=20)
    p.add_argument("--layers", type=int, default=3)
    p.add_argument("--intermediate", type=int, default=384)
    p.add_argument("--facts", type=int, default=128, help="most facts in a document")
    p.add_argument("--steps", type=int, default=2150, help="steps of the second stage")
    p.add_argument("--tokens", type=int, default=6000, help="tokens in a recall batch")
    p.add_argument("--copy-tokens", type=int, default=4000)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--resume", type=Path, help="go on from this checkpoint")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)      # sharp attention is full of them, and they are slow
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = tok.train()
    vocab, encoder = tokenizer.get_vocab_size(), tok.Encoder(tokenizer)
    trainer = Trainer(args, vocab)
    log(f"vocabulary {vocab}, {sum(x.numel() for x in trainer.model.parameters())} parameters")
    begun = time.time()
    curriculum = Curriculum(trainer.rng, args.facts)
    if args.resume:
        saved = torch.load(args.resume)
        trainer.restore(saved)
        curriculum.facts, copying_steps = saved["facts"], saved["copying_steps"]
        first, before = saved["step"] + 1, saved["seconds"]
    else:
        copying_steps = trainer.stage_one(vocab)
        log(f"copying learned in {copying_steps} steps")
        trainer.new_optimizer()
        first, before = 1, time.time() - begun
        trainer.save(args.work / "copying.pt", step=0, facts=4.0, copying_steps=copying_steps,
                     seconds=before)
    stage_two(trainer, encoder, vocab, args.work / "checkpoint.pt", curriculum, first, before,
              copying_steps)
    import export
    export.main(args.work, args.out)


if __name__ == "__main__":
    main()
