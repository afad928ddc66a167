"""Releases at a running server: the adapter of an alias, before and after."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import openai
import pytest
from served_model import expected_answer
from tenant_server import ASKED, QUESTION, SHIP, Running, Stored, ask, deploy, tenant_server, until

from tunewright.serving.tenants import Candidate, State

pytest_plugins = ["two_tenants"]


@pytest.mark.slow
def test_release_drops_no_request(
    server: Running, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored], reference: Any
) -> None:
    answers: list[tuple[str, str, str]] = []
    over = threading.Event()

    def keep_asking(worker: int) -> None:
        client = server.client(two_tenants["acme"])
        for number in range(10_000):
            if over.is_set():
                return
            content = f"{worker} {number % 3}"
            answers.append((content, *ask(client, "courts", content, 8)))

    threads = [threading.Thread(target=keep_asking, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    try:
        for name in ("two", "three", "one"):
            deploy(state, "courts", adapters[name])
            digest = adapters[name].digest
            until(lambda digest=digest: any(by == digest for *_, by in answers[-4:]))  # type: ignore[misc]
    finally:
        over.set()
        for thread in threads:
            thread.join()
    by_digest = {stored.digest: name for name, stored in adapters.items()}
    known: dict[tuple[str, str], str] = {}
    for content, text, digest in answers:
        name = by_digest[digest]
        if (content, name) not in known:
            known[content, name] = expected_answer(reference, name, content, 8)
        assert text == known[content, name], (content, name)
    assert {by_digest[digest] for *_, digest in answers} == {"one", "two", "three"}
    # What nothing answers with any more is no longer in memory; recipes still answers with "two".
    until(lambda: server.loaded == {adapters["one"].digest, adapters["two"].digest})


@pytest.mark.slow
def test_running_answer_keeps_its_adapter_during_a_release(
    state_url: str, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored], reference: Any
) -> None:
    with tenant_server(state_url, adapters, stop_ids=frozenset()) as running:
        client = running.client(two_tenants["acme"])
        begun = client.chat.completions.with_raw_response.create(
            model="courts", messages=ASKED, max_tokens=700, stream=True
        )
        with begun.parse() as chunks:
            text = "".join(next(chunks).choices[0].delta.content or "" for _ in range(3))
            deploy(state, "courts", adapters["three"])
            until(lambda: ask(client, "courts", max_tokens=4)[1] == adapters["three"].digest)
            assert adapters["one"].digest in running.loaded
            text += "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert begun.headers["x-tunewright-adapter"] == adapters["one"].digest
        assert text == expected_answer_without_stop(reference, "one", QUESTION, 700)
        until(lambda: adapters["one"].digest not in running.loaded)


def expected_answer_without_stop(reference: Any, adapter: str, content: str, max_tokens: int) -> str:
    from served_model import TOKENIZER, decode, render

    from tunewright.data.examples import Message
    from tunewright.generation.generate import generate
    from tunewright.generation.requests import Request

    request = Request(render([Message("user", content)]), adapter, max_tokens)
    (answer,) = generate(reference, [request], stop_ids=(), pad_id=TOKENIZER.pad_token_id, batch_size=1)
    return decode(answer.ids)


def test_withdrawn_alias_looks_unknown_and_its_adapter_is_unloaded(
    server: Running, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored]
) -> None:
    client = server.client(two_tenants["acme"])
    ask(client, "courts")
    state.releases.undeploy("courts")
    until(lambda: "courts" not in [model.id for model in client.models.list()])
    with pytest.raises(openai.NotFoundError) as undeployed:
        ask(client, "courts")
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(client, "nothing")
    assert undeployed.value.message == unknown.value.message.replace("nothing", "courts")
    until(lambda: adapters["one"].digest not in server.loaded)
    state.releases.rollback("courts")
    until(lambda: "courts" in [model.id for model in client.models.list()])
    assert ask(client, "courts")[1] == adapters["one"].digest


def test_release_that_fails_to_load_keeps_the_one_before_it_live(
    server: Running, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored]
) -> None:
    client = server.client(two_tenants["acme"])
    state.releases.deploy("courts", "elsewhere", "f" * 64, SHIP)
    until(lambda: any("failed to load release 2; release 1 stays live" in m for m in server.reported.messages))
    assert ask(client, "courts")[1] == adapters["one"].digest
    state.releases.rollback("courts")
    until(lambda: any("courts: release 3 is live" in m for m in server.reported.messages))
    assert ask(client, "courts")[1] == adapters["one"].digest


@pytest.mark.slow
def test_canary_answers_its_share_and_keeps_its_conversations(
    server: Running, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored], reference: Any
) -> None:
    client = server.client(two_tenants["acme"])
    state.releases.start_candidate("courts", Candidate("three", adapters["three"].digest, 0.5), SHIP)
    until(lambda: any("release 2 is live" in message for message in server.reported.messages))
    first = [ask(client, "courts", f"case {number}", 4) for number in range(24)]
    again = [ask(client, "courts", f"case {number}", 4) for number in range(24)]
    assert first == again
    share = [digest for _, digest in first].count(adapters["three"].digest) / 24
    assert 0.1 < share < 0.9  # all but 4 in 100,000 draws
    for number, (text, digest) in enumerate(first):
        name = "three" if digest == adapters["three"].digest else "one"
        assert text == expected_answer(reference, name, f"case {number}", 4)
    state.releases.promote("courts")
    until(lambda: any("release 3 is live" in message for message in server.reported.messages))
    assert {ask(client, "courts", f"case {number}", 4)[1] for number in range(10)} == {adapters["three"].digest}


@pytest.mark.parametrize("stream", [False, True])
def test_shadow_answers_are_recorded_and_never_returned(
    server: Running,
    state: State,
    two_tenants: dict[str, str],
    adapters: dict[str, Stored],
    reference: Any,
    stream: bool,
) -> None:
    client = server.client(two_tenants["acme"])
    state.releases.start_candidate("courts", Candidate("three", adapters["three"].digest, None), SHIP)
    until(lambda: any("release 2 is live" in message for message in server.reported.messages))
    for number in range(3):
        expected = expected_answer(reference, "one", f"case {number}", 9)
        if stream:
            messages: list[Any] = [{"role": "user", "content": f"case {number}"}]
            chunks = client.chat.completions.create(model="courts", messages=messages, max_tokens=9, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        else:
            assert ask(client, "courts", f"case {number}", 9) == (expected, adapters["one"].digest)
    until(lambda: len(state.usage.shadow_lines("courts")) == 3)
    for number, line in enumerate(state.usage.shadow_lines("courts")):
        assert line.answer == expected_answer(reference, "one", f"case {number}", 9)
        assert line.shadow_answer == expected_answer(reference, "three", f"case {number}", 9)
        assert (line.tenant, line.candidate, line.why_not) == ("acme", "three", None)
    assert [line.digest for line in state.usage.lines()] == [adapters["one"].digest] * 3  # not billed


def test_alias_released_later_is_served(
    tmp_path: Path, state_url: str, state: State, adapters: dict[str, Stored]
) -> None:
    state.tenants.add("acme", ["courts"])
    key, _ = state.keys.create("acme")
    with tenant_server(state_url, adapters) as running:
        client = running.client(key)
        assert list(client.models.list()) == []
        deploy(state, "courts", adapters["one"])
        until(lambda: [model.id for model in client.models.list()] == ["courts"])
        assert ask(client, "courts")[1] == adapters["one"].digest
