"""Sends what the self-study teacher client of HazyResearch/cartridges sends (its Tokasaurus client, one
request at a time) and reads the reply the way it does, checking every array.

    python scripts/clients/teacher_client.py http://localhost:10210 [--model NAME] [--cartridge local:ID]...

`--cartridge` may be repeated: the real client sends the source `wandb` or `huggingface`.

Exits with 0 when every check holds. Needs: pip install numpy
"""

import argparse
import base64
import json
import urllib.request

import numpy as np

TOP = 20


def call(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=90) as response:
        return json.load(response)


def probe(url, model):
    """The client's start-up check: one model, whose id is the configured name in any letter case."""
    data = call(f"{url}/v1/models")["data"]
    assert len(data) == 1, f"expected exactly one model, got {data}"
    assert model in (None, "default") or data[0]["id"].lower() == model.lower(), data[0]["id"]
    return data[0]["id"]


def array(text, dtype):
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=dtype)


def check_end(url, choice, ids):
    """The client trains on the end token too: it must be among the ids, and not in the text."""
    if choice["finish_reason"] != "stop":
        return
    text = call(f"{url}/detokenize", {"tokens": ids.tolist()})["prompt"]
    end = call(f"{url}/detokenize", {"tokens": [int(ids[-1])]})["prompt"]
    assert end and text == choice["message"]["content"] + end, (text, choice["message"]["content"])


def sample(url, model, messages, cartridges, temperature, top):
    body = {
        "model": model,
        "messages": messages,
        "temperature": temperature,
        "max_completion_tokens": 48,
        "apply_chat_template_overrides": {},
        "logprobs_in_fingerprint": True,
    }
    if top:
        body |= {"logprobs": True, "top_logprobs": top}
    path = "/v1/chat/completions"
    if cartridges:
        path = "/custom/cartridge/chat/completions"
        body["cartridges"] = cartridges
    reply = call(url + path, body)

    choice = reply["choices"][0]
    assert isinstance(choice["message"]["content"], str)
    assert choice["logprobs"] is None, "they are in the fingerprint"
    assert reply["usage"]["prompt_tokens"] > 0
    fingerprint = json.loads(reply["system_fingerprint"])
    ids = np.array(fingerprint["completion_ids"][0])
    assert len(ids) == reply["usage"]["completion_tokens"]
    check_end(url, choice, ids)
    chosen = array(fingerprint["packed_chosen_logprobs"][0], "<f4")
    assert chosen.shape == ids.shape and (chosen <= 0).all()
    if not top:
        assert fingerprint["packed_topk_indices"] is None
        assert fingerprint["packed_topk_logprobs"] is None
        return reply, ids, chosen, None, None

    flat_ids = array(fingerprint["packed_topk_indices"][0], "<i4")
    flat_logprobs = array(fingerprint["packed_topk_logprobs"][0], "<f4")
    # The client knows no K: it divides by the number of chosen log-probabilities.
    top_ids = flat_ids.reshape(len(chosen), -1)
    top_logprobs = flat_logprobs.reshape(len(chosen), -1)
    assert top_ids.shape == top_logprobs.shape == (len(ids), top)
    assert (np.diff(top_logprobs, axis=1) <= 0).all(), "descending"
    assert (np.exp(top_logprobs.astype(np.float64)).sum(axis=1) <= 1 + 1e-4).all()
    assert (top_ids >= 0).all() and all(len(set(row)) == top for row in top_ids)
    for token, logprob, row_ids, row in zip(ids, chosen, top_ids, top_logprobs):
        found = np.flatnonzero(row_ids == token)
        if len(found):
            assert abs(row[found[0]] - logprob) < 1e-5, "the chosen token is described twice alike"
        else:
            assert logprob <= row[-1] + 1e-5
    if temperature == 0:
        assert (top_ids[:, 0] == ids).all(), "greedy takes the first"
    return reply, ids, chosen, top_ids, top_logprobs


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="without /v1")
    parser.add_argument("--model", help="the configured model name")
    parser.add_argument(
        "--cartridge", action="append", default=[], help="source:id of a cartridge the server has"
    )
    args = parser.parse_args()
    model = probe(args.url, args.model)
    assert call(f"{args.url}/ping") == {"message": "pong"}
    messages = [
        {"role": "system", "content": "You answer questions about a ship's log."},
        {"role": "user", "content": "Which ship came in last?"},
    ]
    for temperature in (0, 0.6, 1):
        for top in (None, TOP):
            sample(args.url, model, messages, None, temperature, top)
    plain = sample(args.url, model, messages, None, 0, TOP)
    assert plain[0]["choices"][0]["finish_reason"] == "stop", "this question is answered to its end"
    for cartridge in args.cartridge:
        source, name = cartridge.split(":", 1)
        cartridges = [{"id": name, "source": source, "force_redownload": False}]
        reply, *arrays = sample(args.url, model, messages, cartridges, 0, TOP)
        assert reply["usage"]["prompt_tokens"] == plain[0]["usage"]["prompt_tokens"]
        assert not np.array_equal(arrays[-1], plain[-1]), "the cartridge changes the distribution"
        again, *same = sample(args.url, model, messages, cartridges, 0, TOP)
        assert all(np.array_equal(a, b) for a, b in zip(arrays, same))
    print(f"teacher client: all checks passed on {model}")


if __name__ == "__main__":
    main()
