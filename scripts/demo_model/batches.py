"""Training batches: random strings to copy, and documents with questions."""

import random

import torch

import world

ROUND = 64   # lengths are padded to multiples of this: few shapes, flat memory


def round_up(n, to):
    return -(-n // to) * to


def copying(rng, vocab, low, high, tokens):
    """Random strings, each written twice; the second half is to be predicted.

    The length varies from batch to batch: with one fixed length a model learns
    to look back by that distance, which is no recall at all.
    """
    n = rng.randint(low, high)
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    half = torch.randint(3, vocab, (max(2, tokens // (2 * n)), n), generator=generator)
    return torch.cat((half, half), dim=1), n


class Branch:
    """One or more question/answer turns after a document (or after none)."""

    def __init__(self, encoder, turns, weight, system=None, alone=False):
        self.alone = alone
        self.ids, self.targets = [], []     # (position, token, weight, what, hint)
        if system is not None:
            self.ids += encoder.message("system", system)
        for question, answer, fact in turns:
            self.ids += encoder.message("user", question) + encoder.open_answer()
            reply = encoder(answer) + encoder.im_end
            hint = encoder(" " + fact.value)[0] if fact else reply[0]
            for i, token in enumerate(reply):
                what = "text"
                if i == 0:
                    what = "first"          # answer or refuse is decided here
                elif fact is not None and i == len(reply) - 3:
                    what = "value"
                self.targets.append((len(self.ids) - 1 + i, token,
                                     1.0 if what == "text" else weight, what, hint))
            self.ids += reply + encoder.newline
        self.last = turns[-1]


def rows(encoder, made, width=None):
    """Tensors of [(document text, branches)], see Model.forward.

    The last one lists (index among the targets, hint) for every first token of
    an answer; the hint is the value that will follow, or the refusal's first word.
    """
    prefixes = [encoder.message("system", text) for text, _ in made]
    t = round_up(max(map(len, prefixes)), ROUND)
    n = max(len(branches) for _, branches in made)
    l = round_up(max(len(b.ids) for _, bs in made for b in bs), 8)
    prefix = torch.zeros(len(made), t, dtype=torch.long)
    branches = torch.zeros(len(made), n, l, dtype=torch.long)
    alone = torch.zeros(len(made), n, dtype=torch.bool)
    where, tokens, weights, whats, hints = [], [], [], [], []
    for r, (ids, (_, bs)) in enumerate(zip(prefixes, made)):
        prefix[r, :len(ids)] = torch.tensor(ids)
        for j, b in enumerate(bs):
            branches[r, j, :len(b.ids)] = torch.tensor(b.ids)
            alone[r, j] = b.alone
            for position, token, weight, what, hint in b.targets:
                if what == "first":
                    hints.append((len(where), hint))
                where.append((r * n + j) * l + position)
                tokens.append(token)
                weights.append(weight)
                whats.append(what)
    lengths = torch.tensor([len(ids) for ids in prefixes])
    return (prefix, lengths, branches, alone, torch.tensor(where)), \
        torch.tensor(tokens), torch.tensor(weights), whats, torch.tensor(hints)


def recall(rng, encoder, count, tokens, mixed, wrong_attribute, refuse=0.4, weight=5.0):
    """Documents of `count` facts with questions, about `tokens` tokens in all.

    refuse: share of questions that the document does not answer.
    mixed: how often the facts of a document have many attributes.
    wrong_attribute: how often an absent question asks for another attribute of
        a subject that the document knows; such documents repeat subjects too.
    """
    per_document = max(3, min(20, count))
    size = max(1, tokens // (count * 13 + per_document * 30))
    turns_each = 1 if rng.random() < 0.9 else 2     # alike in a batch: less padding
    made = []
    for _ in range(size):
        many = rng.random() < mixed
        document = world.Document(
            rng, count, attributes=rng.choice([3, 5, 10]) if many else rng.choice([1, 1, 2]),
            repeats=rng.choice([0.0, 0.3]) if many and wrong_attribute else 0.0)
        wrong = wrong_attribute if many else wrong_attribute / 4
        branches = []
        for _ in range(per_document):
            kind, turns, system, alone = rng.random(), [], None, False
            if kind < 0.08:       # no document at all, or a system message without facts
                alone = True
                system = rng.choice(world.GENERIC_SYSTEMS) if rng.random() < 0.5 else None
                turns = [world.ask_anything(rng) if rng.random() < 0.6 else
                         (world.ask_unrelated(rng), world.REFUSAL, None)]
            elif kind < 0.11:
                turns = [(world.ask_unrelated(rng), world.REFUSAL, None)]
            elif kind < 0.14:
                turns = [world.ask_vaguely(rng, rng.choice(document.facts).subject)]
            elif kind < 0.16:
                a = rng.choice(document.attributes)
                turns = [(world.ask(rng, a, world.stranger(rng)), world.REFUSAL, None)]
            else:
                for _ in range(turns_each):
                    turns += [document.absent(wrong)] if rng.random() < refuse else document.present(1)
            if rng.random() < 0.08:
                turns = [(world.sloppy(rng, q), a, f) for q, a, f in turns]
            branches.append(Branch(encoder, turns, weight, system, alone))
        made.append((document.text, branches))
    return rows(encoder, made)
