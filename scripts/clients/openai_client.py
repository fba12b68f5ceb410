"""Drives a running server with the openai package and checks what comes back.

    python scripts/clients/openai_client.py http://localhost:10210/v1 [--cartridge local:harbour-log]

Exits with 0 when every check holds. Needs: pip install openai
"""

import argparse
import json

import openai

MESSAGES = [{"role": "user", "content": "Hello, who are you?"}]


def check_models(client):
    models = client.models.list().data
    assert len(models) == 1, models
    assert client.models.retrieve(models[0].id).id == models[0].id
    return models[0].id


def check_chat(client, model):
    reply = client.chat.completions.create(
        model=model, messages=MESSAGES, max_completion_tokens=8, temperature=0, n=2,
        logprobs=True, top_logprobs=5, extra_body={"priority": "batch"},
        extra_headers={"X-Request-Id": "openai-client"},
    )
    assert reply._request_id == "openai-client"
    assert [c.index for c in reply.choices] == [0, 1]
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == reply.choices[1].message.content
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    ids = json.loads(reply.system_fingerprint)["completion_ids"]
    assert sum(map(len, ids)) == reply.usage.completion_tokens
    for choice in reply.choices:
        for token in choice.logprobs.content:
            values = [t.logprob for t in token.top_logprobs]
            assert len(values) == 5 and values == sorted(values, reverse=True)
            assert token.logprob == values[0], "greedy takes the most likely token"
            assert token.token.startswith("bytes:") or bytes(token.bytes) == token.token.encode()
    return reply.choices[0].message.content


def check_stream(client, model, expected):
    text, finishes, usage = "", [], None
    stream = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=8, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finishes.append(choice.finish_reason)
    assert text == expected, (text, expected)
    assert [f for f in finishes if f] in (["stop"], ["length"])
    assert usage.completion_tokens > 0
    # The SDK's own accumulator accepts the chunks too.
    with client.chat.completions.stream(
        model=model, messages=MESSAGES, max_tokens=8, temperature=0
    ) as stream:
        assert stream.get_final_completion().choices[0].message.content == expected


def check_stop(client, model):
    full = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=12, temperature=0,
        extra_body={"ignore_eos": True},
    )
    text = full.choices[0].message.content
    stop = text[3:5]
    cut = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=12, temperature=0, stop=[stop],
        extra_body={"ignore_eos": True},
    )
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def check_seed(client, model):
    def sample(seed):
        reply = client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=12, temperature=1.5, seed=seed,
            extra_body={"ignore_eos": True, "top_k": 50, "min_p": 0.0},
        )
        return json.loads(reply.system_fingerprint)["completion_ids"]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def check_completions(client, model):
    reply = client.completions.create(
        model=model, prompt=["Hello", "The log"], max_tokens=4, temperature=0, n=2, logprobs=2,
    )
    assert [c.index for c in reply.choices] == [0, 1, 2, 3]
    lists = reply.choices[0].logprobs
    assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.text_offset)
    # What lm-evaluation-harness does to score a continuation.
    prompt = "Hello, who are you?"
    scored = client.completions.create(
        model=model, prompt=prompt, max_tokens=0, temperature=0, logprobs=1, echo=True, seed=1
    ).choices[0]
    assert scored.text == prompt
    assert scored.logprobs.token_logprobs[0] is None
    for value, top in zip(scored.logprobs.token_logprobs[1:], scored.logprobs.top_logprobs[1:]):
        assert value <= max(top.values()) and value in top.values()
    text = ""
    for chunk in client.completions.create(
        model=model, prompt="Hello", max_tokens=4, temperature=0, stream=True
    ):
        text += chunk.choices[0].text
    assert text == reply.choices[0].text


def check_errors(client, model):
    def refused(kind, **fields):
        request = {"model": model, "messages": MESSAGES, "max_tokens": 4, **fields}
        try:
            client.chat.completions.create(**request)
        except kind as error:
            return error
        raise AssertionError(f"{fields} was not refused")

    error = refused(openai.BadRequestError, top_logprobs=3)
    assert error.param == "top_logprobs", error.body
    error = refused(openai.BadRequestError, max_tokens=10_000_000)
    assert error.code == "context_length_exceeded", error.body
    error = refused(openai.BadRequestError, response_format={"type": "json_object"})
    assert error.param == "response_format", error.body
    missing = {"cartridges": [{"id": "there-is-no-such-cartridge", "source": "local"}]}
    error = refused(openai.NotFoundError, extra_body=missing)
    assert error.code == "cartridge_not_found", error.body


def check_key(base_url, model):
    """Only with a key: a wrong one is what the package calls an authentication error."""
    stranger = openai.OpenAI(base_url=base_url, api_key="wrong-key", max_retries=0)
    for call in (
        stranger.models.list,
        lambda: stranger.chat.completions.create(model=model, messages=MESSAGES, stream=True),
    ):
        try:
            call()
        except openai.AuthenticationError as error:
            assert error.status_code == 401 and error.code == "invalid_api_key", error.body
            assert error.response.headers["www-authenticate"].startswith("Bearer")
            assert "wrong-key" not in str(error.body)
        else:
            raise AssertionError("a stranger was served")


def check_cartridge(client, model, source, name):
    plain = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True
    )
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True,
        extra_body={"cartridges": [{"id": name, "source": source}]},
    )
    reply = raw.parse()
    used = reply.model_extra["cartridges"]
    assert [c["id"] for c in used] == [name]
    assert raw.headers["x-cartouche-cartridges"].endswith(used[0]["generation"])
    details = reply.usage.prompt_tokens_details.model_extra
    assert details["cartridge_tokens"] == used[0]["tokens"] > 0
    assert reply.usage.prompt_tokens == plain.usage.prompt_tokens

    block = json.dumps({"id": name, "source": source})
    by_block = client.chat.completions.create(
        model=model, max_tokens=4, temperature=0, logprobs=True,
        messages=[{"role": "system", "content": f"<cartridge>{block}</cartridge>"}, *MESSAGES],
    )
    assert by_block.model_extra["cartridges"] == used
    if source == "local":
        by_name = client.chat.completions.create(
            model=f"{model}:{name}", messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True
        )
        assert by_name.choices[0].logprobs == reply.choices[0].logprobs


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base_url", help="with /v1 at the end")
    parser.add_argument("--cartridge", help="source:id of a cartridge the server has")
    parser.add_argument("--api-key", help="one the server has; without it, the server must need none")
    args = parser.parse_args()
    key = args.api_key or "none"
    client = openai.OpenAI(base_url=args.base_url, api_key=key, max_retries=0)
    model = check_models(client)
    if args.api_key:
        check_key(args.base_url, model)
    text = check_chat(client, model)
    check_stream(client, model, text)
    check_stop(client, model)
    check_seed(client, model)
    check_completions(client, model)
    check_errors(client, model)
    if args.cartridge:
        source, name = args.cartridge.split(":", 1)
        check_cartridge(client, model, source, name)
    print(f"openai {openai.__version__}: all checks passed on {model}")


if __name__ == "__main__":
    main()
