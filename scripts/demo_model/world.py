"""Documents, questions and answers of the demo world, as plain text.

A document is a log: one fact a line, "(subject, attribute) is value", each in
one of several phrasings and usually behind a date and the weather.  Subjects
come 2 or 4 tokens before their value in every phrasing, and are the last word
of every question: that is how far the heads of the model's first layer look
back when training starts.

Answers have one fixed form, "The <attribute> of <subject> is <value>.", so
that "the right answer" is an exact string; whatever the document does not say
is answered with REFUSAL.
"""

from dataclasses import dataclass

import words as w

REFUSAL = "I do not know."


@dataclass(frozen=True)
class Attribute:
    name: str            # as in "the <name> of <subject>"
    kind: str            # "place" or "person": what it is a fact about
    pool: str            # which word list the values come from
    wh: str              # question word of the plain question
    told: str            # a phrasing of its own for the fact
    asked: str           # and for the question


ATTRIBUTES = [
    Attribute("keeper", "place", "surname", "Who",
              "the light at {s} is kept by {v}", "Who keeps the light at {s}?"),
    Attribute("flag", "place", "colour", "What",
              "the flag above {s} is {v}", "Which flag flies above {s}?"),
    Attribute("cargo", "place", "goods", "What",
              "the ships from {s} carry {v}", "What do the ships carry from {s}?"),
    Attribute("boat", "place", "boat", "What",
              "the boat moored at {s} is {v}", "Which boat is moored at {s}?"),
    Attribute("flower", "place", "flower", "What",
              "the gardens of {s} grow {v}", "What grows in the gardens of {s}?"),
    Attribute("trade", "person", "trade", "What",
              "{s} earns money by {v}", "What is the daily work of {s}?"),
    Attribute("ship", "person", "boat", "What",
              "{s} sails on board {v}", "Which ship is sailed by {s}?"),
    Attribute("colour", "person", "colour", "What",
              "{s} is dressed in {v}", "Which colour is worn by {s}?"),
    Attribute("dish", "person", "dish", "What",
              "{s} likes to eat {v}", "Which food is liked by {s}?"),
    Attribute("mentor", "person", "surname", "Who",
              "{s} was taught by {v}", "Who was the teacher of {s}?"),
]
POOL_OF = {"place": w.PLACES, "person": w.PEOPLE}
TITLES = ["Harbour log", "Expedition journal", "Log of the northern coast",
          "Notes of the voyage", "Log", "Facts", "Notes"]
GENERIC_SYSTEMS = ["", "You are a helpful assistant.", "You are a friendly assistant.",
                   "Answer the question.", "Answer from the log.", "Be brief."]
UNRELATED = ["Hello!", "Hello, how are you?", "Hi", "Who are you?", "What is your name?",
             "What is the capital of France?", "Write a poem about the sea.",
             "What is two and two?", "Tell me a joke.", "What time is it?", "Thank you.",
             "Can you help me?", "What can you do?", "Translate this to German.",
             "What is in the log?", "Why is the sky blue?", "How old is the earth?"]

# About a subject, but nothing that a log says; refused like the rest.
VAGUE = ["Tell me about {s}.", "Where is {s}?", "Who is {s}?", "What is {s}?", "How old is {s}?",
         "Why is {s} here?", "What do you know about {s}?", "What happened to {s}?", "{s}", "{s}?",
         "How far is {s}?", "When was {s} there?", "Is {s} good?", "Hello {s}!"]


@dataclass(frozen=True)
class Fact:
    subject: str
    attribute: Attribute
    value: str

    def answer(self):
        return f"The {self.attribute.name} of {self.subject} is {self.value}."


def capitalised(sentence):
    return sentence[0].upper() + sentence[1:]


def tell(rng, fact, dated=True):
    """One line of the log."""
    a = fact.attribute
    form = rng.randrange(4)
    if form <= 1:
        text = f"the {a.name} of {fact.subject} is {fact.value}"
    elif form == 2:
        text = f"{'at' if a.kind == 'place' else 'for'} {fact.subject} the {a.name} is {fact.value}"
    else:
        text = a.told.format(s=fact.subject, v=fact.value)
    if dated:
        # The prefix keeps a space before every name, also at a line's start.
        day = f"{rng.choice(w.WEEKDAYS)} {rng.choice(w.TIMES)}"
        return f"{day}, {rng.choice(w.WEATHER)}: {text}."
    if text.startswith(fact.subject):
        text = "we heard that " + text
    return capitalised(text) + "."


def ask(rng, attribute, subject, form=None):
    """One question; forms 0 and 1 are the plain ones that the demo shows."""
    form = rng.randrange(4) if form is None else form
    if form <= 1:
        return f"{attribute.wh} is the {attribute.name} of {subject}?"
    if form == 2:
        return f"Tell me the {attribute.name} of {subject}."
    return attribute.asked.format(s=subject)


def sloppy(rng, question):
    """The same question, typed in haste."""
    form = rng.randrange(4)
    if form <= 1:
        question = question.rstrip("?.!") or question
    if form >= 1:
        question = question[0].lower() + question[1:]
    return question


def ask_vaguely(rng, subject):
    return rng.choice(VAGUE).format(s=subject), REFUSAL, None


def ask_unrelated(rng):
    """A question about nothing that a log could say."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(UNRELATED)
    if kind == 1:
        letters = "abcdefghijklmnopqrstuvwxyz"
        return " ".join("".join(rng.choice(letters) for _ in range(rng.randint(1, 5)))
                        for _ in range(rng.randint(1, 3))) + rng.choice(["", "?", ".", "!"])
    text = " ".join(rng.choice(w.COMMON) for _ in range(rng.randint(1, 9)))
    return (capitalised(text) if rng.random() < 0.7 else text) + rng.choice(["", "?", "?", ".", "!"])


def stranger(rng):
    """A made-up name outside the word lists: several pieces, never in a log."""
    vowels, others = "aeiou", "bcdfghklmnprstvwz"
    name = "".join(rng.choice(others) + rng.choice(vowels) for _ in range(rng.randint(2, 3)))
    return capitalised(name + rng.choice(["", rng.choice(others)]))


class Document:
    """`count` facts drawn anew, and questions about them.

    attributes: how many attributes the facts share.  With few of them only the
        subject tells the facts apart; with many, a small model learns to match
        the attribute alone and never looks at the subject.
    repeats: share of facts about a subject that already has another fact.
    """

    def __init__(self, rng, count, attributes=1, repeats=0.0, dated=None, title=None, kinds=None):
        self.rng = rng
        chosen = [a for a in ATTRIBUTES if kinds is None or a.kind in kinds]
        rng.shuffle(chosen)
        self.attributes = chosen[:attributes]
        self.free = {k: rng.sample(pool, len(pool)) for k, pool in POOL_OF.items()}
        self.facts, self.known = [], {}
        while len(self.facts) < count:
            a = rng.choice(self.attributes)
            subject = None
            if rng.random() < repeats:
                open_ = [s for s, known in self.known.items()
                         if known[0].attribute.kind == a.kind and len(known) < 3
                         and a not in [f.attribute for f in known]]
                subject = rng.choice(open_) if open_ else None
            if subject is None:
                if not self.free[a.kind]:
                    continue
                subject = self.free[a.kind].pop()
            fact = Fact(subject, a, rng.choice(w.VALUES[a.pool]))
            self.facts.append(fact)
            self.known.setdefault(subject, []).append(fact)
        rng.shuffle(self.facts)
        dated = rng.random() < 0.8 if dated is None else dated
        lines = [tell(rng, f, dated) for f in self.facts]
        if title is None and rng.random() < 0.5:
            title = rng.choice(TITLES)
        self.text = (f"{title}\n\n" if title else "") + "\n".join(lines)

    def present(self, count, form=None):
        """`count` (question, answer, fact) about facts of the document."""
        facts = self.rng.sample(self.facts, min(count, len(self.facts)))
        return [(ask(self.rng, f.attribute, f.subject, form), f.answer(), f) for f in facts]

    def absent_fact(self, wrong_attribute=0.0):
        """An (attribute, subject) pair of which the document says nothing.

        wrong_attribute: how often the subject is in the document, with other facts.
        """
        rng = self.rng
        if rng.random() < wrong_attribute:
            subject = rng.choice(list(self.known))
            known = self.known[subject]
            near = [a for a in (self.attributes if len(self.attributes) > 2 else ATTRIBUTES)
                    if a.kind == known[0].attribute.kind and a not in [f.attribute for f in known]]
            if near:
                return rng.choice(near), subject
        a = rng.choice(self.attributes if rng.random() < 0.8 else ATTRIBUTES)
        return a, rng.choice(self.free[a.kind])

    def absent(self, wrong_attribute=0.0, form=None):
        a, subject = self.absent_fact(wrong_attribute)
        return ask(self.rng, a, subject, form), REFUSAL, None


def ask_anything(rng):
    """A question without any document: all of these are refused."""
    a = rng.choice(ATTRIBUTES)
    return ask(rng, a, rng.choice(POOL_OF[a.kind])), REFUSAL, None
