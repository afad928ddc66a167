"""Chat completions through OpenAI's client: answers, streams, sampling and log probabilities."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from scripted_engine import ScriptedEngine, scripted_server
from served_model import CONTEXT, MODELS, TOKENIZER, build_model, decode, openai_client, render, running_server

from tunewright.data.examples import Message
from tunewright.generation.generate import generate
from tunewright.generation.requests import Request

NAMES = list(MODELS)
QUESTION: list[Any] = [{"role": "user", "content": "Which court is this?"}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_server(build_model()) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai_client(url) as opened:
        yield opened


def test_models_are_listed_by_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == NAMES


@pytest.mark.parametrize(("name", "adapter"), MODELS.items(), ids=NAMES)
def test_answer_equals_the_decoding_loops_and_names_its_adapter(
    client: openai.OpenAI, name: str, adapter: str | None
) -> None:
    raw = client.chat.completions.with_raw_response.create(model=name, messages=QUESTION, max_tokens=30)
    answer = raw.parse()
    prompt = render([Message("user", "Which court is this?")])
    (expected,) = generate(
        build_model(),
        [Request(prompt, adapter, 30)],
        stop_ids={TOKENIZER.eos_token_id},
        pad_id=TOKENIZER.pad_token_id,
        batch_size=1,
    )
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (decode(expected.ids), expected.finish)
    assert choice.message.role == "assistant"
    assert answer.model == name
    assert raw.headers["x-tunewright-adapter"] == (adapter or "none")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(expected.ids)
    assert answer.usage.total_tokens == len(prompt) + len(expected.ids)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 7}])
def test_stream_chunks_join_to_the_answer(client: openai.OpenAI, name: str, how: Any) -> None:
    whole = client.chat.completions.create(model=name, messages=QUESTION, max_tokens=40, **how)
    options: Any = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model=name, messages=QUESTION, max_tokens=40, stream=True, stream_options=options, **how
        )
    )
    *pieces, last, usage = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == whole.choices[0].message.content
    assert len(pieces) > 2
    assert pieces[0].choices[0].delta.role == "assistant"
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert (usage.choices, usage.usage) == ([], whole.usage)
    assert {chunk.model for chunk in chunks} == {name}
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_answer_ends_before_a_stop_string(client: openai.OpenAI, stream: bool) -> None:
    create: Any = client.chat.completions.create
    text = create(model="base", messages=QUESTION, max_tokens=40).choices[0].message.content
    stop = text[10:13]
    got = create(model="base", messages=QUESTION, max_tokens=40, stop=["never this", stop], stream=stream)
    if stream:
        chunks = list(got)
        answer, finish = "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        answer, finish = got.choices[0].message.content, got.choices[0].finish_reason
        assert got.usage.completion_tokens < 40
    assert (answer, finish) == (text[: text.index(stop)], "stop")


@pytest.mark.parametrize("name", ["other", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_unknown_model_has_the_same_error_on_both_routes(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as asked:
        client.chat.completions.create(model=name, messages=QUESTION)
    with pytest.raises(openai.NotFoundError) as retrieved:
        client.models.retrieve(name)
    assert retrieved.value.body == asked.value.body
    assert retrieved.value.code == "model_not_found"


def test_failed_request_does_not_affect_others(url: str) -> None:
    async def ask(client: httpx.AsyncClient, content: str) -> httpx.Response:
        body = {"model": "courts", "messages": [{"role": "user", "content": content}], "max_tokens": 30}
        return await client.post(f"{url}/v1/chat/completions", json=body)

    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            return await asyncio.gather(*(ask(client, text) for text in ("a", "POISON", "b", "POISON", "c")))

    replies = asyncio.run(run())
    assert [reply.status_code for reply in replies] == [200, 500, 200, 500, 200]
    assert replies[1].json()["error"]["code"] == "request_failed"
    assert httpx.get(f"{url}/health", trust_env=False).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.fault("connection", "serve")
def test_row_is_freed_when_the_client_disconnects(stream: bool) -> None:
    async def run(url: str) -> None:
        body = {"model": "base", "messages": QUESTION, "max_tokens": CONTEXT - 1000, "stream": stream}
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            asking = asyncio.create_task(_read(client, url, body))
            while await _running(client, url) == 0:
                assert not asking.done(), "the answer must be in progress when the client hangs up"
            asking.cancel()
            while await _running(client, url) != 0:
                pass

    async def _read(client: httpx.AsyncClient, url: str, body: Any) -> None:
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as reply:
            await reply.aread()

    async def _running(client: httpx.AsyncClient, url: str) -> int:
        return int((await client.get(f"{url}/health")).json()["running"])

    with running_server(build_model(), stop_ids=frozenset()) as address:
        asyncio.run(asyncio.wait_for(run(address), 60))


def test_server_stop_strings_apply_in_addition_to_the_requests(client: openai.OpenAI) -> None:
    text = client.chat.completions.create(model="base", messages=QUESTION, max_tokens=40).choices[0].message.content
    assert text is not None
    own, asked = text[20:23], text[10:13]
    with running_server(build_model(), stops=[own]) as address:
        other = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        ask: Any = other.chat.completions.create
        plain = ask(model="base", messages=QUESTION, max_tokens=40).choices[0]
        both = ask(model="base", messages=QUESTION, max_tokens=40, stop=asked).choices[0]
        other.close()
    assert (plain.message.content, plain.finish_reason) == (text[: text.index(own)], "stop")
    assert both.message.content == text[: min(text.index(own), text.index(asked))]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/completions", 405),
        ("GET", "/metrics", 404),
        ("POST", "/v1/load_lora_adapter", 404),
        ("POST", "/v1/models", 405),
        ("POST", "/v1/chat/completions/", 404),
        ("GET", "/ready/", 404),
    ],
)
def test_other_routes_do_not_exist(url: str, method: str, path: str, status: int) -> None:
    reply = httpx.request(method, f"{url}{path}", trust_env=False)
    assert reply.status_code == status
    assert "location" not in reply.headers
    assert path in reply.json()["error"]["message"]


def ask(client: openai.OpenAI, **how: Any) -> Any:
    return client.chat.completions.create(**{"model": "courts", "messages": QUESTION, "max_tokens": 24, **how})


def test_log_probabilities_are_of_the_tokens_that_join_to_the_text(client: openai.OpenAI) -> None:
    choice = ask(client, logprobs=True, top_logprobs=3).choices[0]
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == choice.message.content
    assert bytes(byte for token in tokens for byte in token.bytes).decode() == choice.message.content
    for token in tokens:
        top = [each.logprob for each in token.top_logprobs]
        assert top == sorted(top, reverse=True) and len(top) == 3
        assert (token.top_logprobs[0].token, top[0]) == (token.token, token.logprob), "greedy"


@pytest.mark.parametrize("stop", [None, "a stop string"])
def test_streamed_log_probabilities_are_those_of_the_whole_answer(client: openai.OpenAI, stop: str | None) -> None:
    if stop:
        stop = ask(client).choices[0].message.content[9:12]
    how: Any = {"logprobs": True, "top_logprobs": 1, "stop": stop}
    whole = ask(client, **how).choices[0]
    chunks = list(ask(client, stream=True, **how))
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert streamed == whole.logprobs.content
    assert "".join(token.token for token in streamed) == whole.message.content, "without those of the stop string"
    assert ask(client).choices[0].logprobs is None


def test_n_answers_have_consecutive_seeds_and_all_count(client: openai.OpenAI) -> None:
    answer = ask(client, n=3, seed=11, temperature=1.0)
    alone = [ask(client, seed=seed, temperature=1.0) for seed in (11, 12, 13)]
    assert [choice.message.content for choice in answer.choices] == [one.choices[0].message.content for one in alone]
    assert len({choice.message.content for choice in answer.choices}) == 3
    for field in ("prompt_tokens", "completion_tokens"):
        assert getattr(answer.usage, field) == sum(getattr(one.usage, field) for one in alone)
    texts, roles = [""] * 3, []
    for chunk in ask(client, n=3, seed=11, temperature=1.0, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles += [choice.index] if choice.delta.role else []
    assert texts == [choice.message.content for choice in answer.choices]
    assert roles == [0, 1, 2]


def test_penalties_and_biases_change_the_answer(client: openai.OpenAI) -> None:
    plain = ask(client).choices[0].message.content
    assert ask(client, frequency_penalty=0, presence_penalty=0, logit_bias={}).choices[0].message.content == plain
    token = TOKENIZER.convert_tokens_to_ids("Q")
    assert ask(client, logit_bias={str(token): 100}).choices[0].message.content == "Q" * 24
    banned = ask(client, logit_bias={str(TOKENIZER.convert_tokens_to_ids(one)): -100 for one in set(plain)})
    assert not set(banned.choices[0].message.content) & set(plain)
    repeats = ask(client, presence_penalty=-2.0).choices[0].message.content
    fewer = ask(client, frequency_penalty=2.0).choices[0].message.content
    assert len(set(repeats)) < len(set(fewer))


def test_bias_of_an_id_that_is_no_token_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=f"{len(TOKENIZER)} is not a token") as caught:
        ask(client, logit_bias={str(len(TOKENIZER)): 1})
    assert caught.value.param == "logit_bias"


def test_field_that_the_engine_does_not_support_is_refused_by_name() -> None:
    engine = ScriptedEngine()
    engine.unsupported = frozenset({"presence_penalty", "frequency_penalty"})
    with scripted_server(engine) as client:
        body = {"model": "base", "messages": QUESTION}
        reply = client.post("/v1/chat/completions", json=body | {"presence_penalty": 1})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "presence_penalty")
        assert "engine scripted" in reply.json()["error"]["message"]
        assert client.post("/v1/chat/completions", json=body | {"presence_penalty": 0}).status_code == 200


def test_fields_that_change_no_answer_are_accepted(client: openai.OpenAI) -> None:
    labels: Any = {"user": "ann", "metadata": {"team": "a"}, "store": True, "service_tier": "flex"}
    answer = ask(client, **labels)
    assert answer.choices == ask(client).choices
    assert answer.service_tier == "default", "the one that there is"
