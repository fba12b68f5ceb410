"""The demo served on the card, asked the same as a server on the CPU.

How far log-probabilities may be apart: PyTorch (transformers, on a CPU) in bf16 differs from itself in f32, with
this model and these ways of asking (22 questions each, the 20 likeliest tokens of each position), by at most 0.85
in one log-probability, 0.05 on average and 0.04 for the chosen token, and gives the same text every time. Rounding
the f16 weights to bf16 does most of it. Allowed is twice that. A text may differ where the CPU has the two tokens
within twice 0.04 of each other, which is then said.
"""

import concurrent.futures
import json
import math

from .process import ROOT
from .server import Server

CLIENTS = 8
QUESTIONS = 8  # of each document
MOST, MEAN, CHOSEN = 1.7, 0.1, 0.08
DOCUMENTS = ["harbour-log", "expedition"]
TOP = 20


def serving(check, step) -> None:
    servers = {}
    try:
        for device in dict.fromkeys([check.device, "cpu"]):
            servers[device] = Server(check, device, check.left(step))
        table = step.table(
            "Greedy answers against `--device cpu`; differences of natural log-probabilities over the 20 likeliest",
            ["asked", "requests", "same text", "near ties", "right", "right on the CPU", "most", "mean", "chosen"],
            file="serving",
        )
        problems = []
        for way, bodies in requests().items():
            problems += compare(table, way, bodies, servers[check.device], servers["cpu"], check.left(step))
        problems += streams(step, servers[check.device])
        problems += [
            f"{path} is not 200"
            for path in ("/health/live", "/health/ready", "/v1/models", "/metrics")
            if servers[check.device].get(path) != 200
        ]
    except Exception:
        for device, server in servers.items():
            step.excerpt(f"The server on {device}", server.output())
        raise
    finally:
        for device, server in servers.items():
            check.report.log(f"serve --device {device}", server.output())
            server.stop()
    step.notes.append((__doc__ or "").split("\n\n", 1)[1].replace("\n", " "))
    if problems:
        step.failed("; ".join(problems))
    else:
        asked = sum(row[1] for row in table.rows)
        step.passed(f"{asked} answers as on the CPU, {CLIENTS} at a time; streams give the same text")


def requests() -> dict[str, list[tuple[dict, str | None]]]:
    """Ways of asking, each with bodies and the answer of each where the document has it."""
    ways: dict[str, list] = {
        "plainly": [],
        "trained cartridge": [],
        "exact cartridge": [],
        "document in the prompt": [],
    }
    for name in DOCUMENTS:
        folder = ROOT / "assets/demo/documents" / name
        document = (folder / "document.txt").read_text(encoding="utf-8").rstrip()
        for question in json.loads((folder / "questions.json").read_text(encoding="utf-8"))["questions"][:QUESTIONS]:
            user = {"role": "user", "content": question["question"]}
            body = {"messages": [user], "temperature": 0, "max_tokens": 48, "logprobs": True, "top_logprobs": TOP}
            answer = question["answer"]
            ways["plainly"].append((body, None))
            ways["trained cartridge"].append((body | named(f"{name}-small"), answer))
            ways["exact cartridge"].append((body | named(name), answer))
            system = {"role": "system", "content": document}
            ways["document in the prompt"].append((body | {"messages": [system, user]}, answer))
    return ways


def named(cartridge: str) -> dict:
    return {"cartridges": [{"id": cartridge, "source": "local"}]}


def compare(table, way: str, bodies: list, ours: Server, cpu: Server, seconds: float) -> list[str]:
    """Asks both servers everything, several at a time, and adds a row; what is wrong."""
    pool = concurrent.futures.ThreadPoolExecutor(CLIENTS)
    try:
        answers = [list(pool.map(s.chat, (b for b, _ in bodies), timeout=max(seconds, 1))) for s in (ours, cpu)]
    finally:
        # Requests that hang end with their server.
        pool.shutdown(wait=False, cancel_futures=True)
    same = ties = 0
    differences, chosen, problems = [], [], []
    for got, want in zip(*answers):
        agree = shared_length(got["tokens"], want["tokens"])
        if got["text"] == want["text"]:
            same += 1
        elif near_tie(got["tokens"], want["tokens"], agree):
            ties += 1
        else:
            problems.append(f"{way}: {got['text']!r} instead of {want['text']!r}")
        for (_, logprob, top), (_, want_logprob, want_top) in zip(got["tokens"][:agree], want["tokens"][:agree]):
            chosen.append(abs(logprob - want_logprob))
            differences += [abs(top[id] - want_top[id]) for id in top.keys() & want_top.keys()]
    for value in differences + chosen:
        if not math.isfinite(value):
            return [*problems, f"{way}: a log-probability is not finite"]
    if not differences:
        return [*problems, f"{way}: no log-probabilities to compare"]
    most, mean, worst = max(differences), sum(differences) / len(differences), max(chosen)
    right = [sum(a["text"] == answer for a, (_, answer) in zip(given, bodies)) for given in answers]
    told = right if bodies[0][1] else [None, None]
    table.rows.append([way, len(bodies), same, ties, *told, most, mean, worst])
    for value, limit, what in ((most, MOST, "most"), (mean, MEAN, "mean"), (worst, CHOSEN, "chosen token")):
        if value > limit:
            problems.append(f"{way}: log-probabilities differ by {value:.3f} ({what}), allowed {limit}")
    return problems


def shared_length(ours: list, theirs: list) -> int:
    pairs = zip(ours, theirs)
    return next((i for i, (a, b) in enumerate(pairs) if a[0] != b[0]), min(len(ours), len(theirs)))


def near_tie(ours: list, theirs: list, at: int) -> bool:
    """Whether the CPU, too, found the tokens where the texts part nearly as likely as each other."""
    if at >= min(len(ours), len(theirs)):
        return False
    _, logprob, top = theirs[at]
    return logprob - top.get(ours[at][0], -math.inf) <= CHOSEN


def streams(step, server: Server) -> list[str]:
    """A stream gives the text of the whole reply."""
    problems = []
    for way, bodies in requests().items():
        body = bodies[0][0]
        whole = server.chat(body)["text"]
        text, ended = server.streamed(body)
        if text != whole or not ended:
            problems.append(f"{way}: streamed {text!r}, whole {whole!r}, ended as it should: {ended}")
    return problems
