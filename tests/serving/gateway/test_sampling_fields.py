"""Fields of sampling and log probabilities, through OpenAI's client, on the embedded engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from scripted_engine import ScriptedEngine, scripted_server
from served_model import TOKENIZER, build_model, render, running_server

from tunewright.data.examples import Message

QUESTION: list[Any] = [{"role": "user", "content": "Which court is this?"}]


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with (
        running_server(build_model()) as url,
        openai.DefaultHttpxClient(trust_env=False) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http) as opened,
    ):
        yield opened


def ask(client: openai.OpenAI, **how: Any) -> Any:
    return client.chat.completions.create(**{"model": "courts", "messages": QUESTION, "max_tokens": 24, **how})


def test_log_probabilities_are_pefts_and_their_tokens_join_to_the_text(client: openai.OpenAI) -> None:
    choice = ask(client, logprobs=True, top_logprobs=3).choices[0]
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == choice.message.content
    assert bytes(byte for token in tokens for byte in token.bytes).decode() == choice.message.content
    prompt = render([Message("user", "Which court is this?")])
    ids = [TOKENIZER.convert_tokens_to_ids(token.token) for token in tokens]
    model = build_model()
    model.set_adapter("one")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    for found, row, own in zip(tokens, logits.log_softmax(-1), ids, strict=True):
        assert found.logprob == pytest.approx(row[own].item(), abs=1e-3)
        assert [top.logprob for top in found.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
        assert found.top_logprobs[0].token == found.token, "greedy"


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
