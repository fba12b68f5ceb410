"""Writes the questions a cartridge of each demo document is trained with.

    python scripts/demo_model/training_questions.py

Every fact is asked for in the phrasings that the held-out questions do not use for it, also carelessly
typed; beside them stand questions whose answer is not in the document, about strangers and about other
attributes of those it names: with few of these a cartridge learns to answer everything.  No answers: the teacher
gives them.
"""

import json
import pathlib
import random
import re

import world

DOCUMENTS = pathlib.Path(__file__).resolve().parents[2] / "assets" / "demo" / "documents"
# Questions about strangers, and about unknown attributes.
STRANGERS = 1600
UNKNOWN = 512
NAMES = {attribute.name: attribute for attribute in world.ATTRIBUTES}


def plainly(question):
    return question.rstrip("?.").lower()


def questions(folder, rng):
    text = (folder / "document.txt").read_text()
    held_out = json.loads((folder / "questions.json").read_text())["questions"]
    forbidden = {plainly(q["question"]) for q in held_out}
    facts = []
    for q in held_out:
        if q["in_document"]:
            name, subject = re.fullmatch(r"The (\w+) of (\w+) is \w+\.", q["answer"]).groups()
            facts.append((NAMES[name], subject))
    for attribute, subject in facts:
        for form in (1, 2, 3):
            question = world.ask(rng, attribute, subject, form)
            if plainly(question) not in forbidden:
                yield question
                yield world.sloppy(rng, question)
    # Not even the subjects of the held-out questions that are to be refused.
    asked = " ".join(q["question"] for q in held_out)
    absent = []
    for attribute in rng.choices([attribute for attribute, _ in facts], k=STRANGERS):
        pool = [s for s in world.POOL_OF[attribute.kind] if s not in text and s not in asked]
        absent.append((attribute, rng.choice(pool)))
    for attribute, subject in rng.choices(facts, k=UNKNOWN):
        others = [a for a in world.ATTRIBUTES if a.kind == attribute.kind and (a, subject) not in facts]
        absent.append((rng.choice(others), subject))
    for attribute, subject in absent:
        question = world.ask(rng, attribute, subject)
        if plainly(question) not in forbidden:
            yield world.sloppy(rng, question) if rng.random() < 0.3 else question


def conversation(*turns):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return json.dumps({"messages": messages})


def main():
    for folder in sorted(DOCUMENTS.iterdir()):
        rng = random.Random(folder.name)
        rows = list(dict.fromkeys(questions(folder, rng)))
        lines = [conversation(question) for question in rows]
        # Once more, after a turn about another fact.
        told = [q for q in json.loads((folder / "questions.json").read_text())["questions"] if q["in_document"]]
        for question in rows:
            name, subject = re.fullmatch(r"The (\w+) of (\w+) is \w+\.", (q := rng.choice(told))["answer"]).groups()
            # In another phrasing than the held-out one.
            forms = [world.ask(rng, NAMES[name], subject, form) for form in (1, 2, 3)]
            first = rng.choice([form for form in forms if plainly(form) != plainly(q["question"])])
            lines.append(conversation(first, q["answer"], question))
        (folder / "training_questions.jsonl").write_text("\n".join(lines) + "\n")
        print(folder.name, len(lines))


if __name__ == "__main__":
    main()
