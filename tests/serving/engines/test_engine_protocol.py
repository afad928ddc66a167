"""The engine protocol: the same tests for every engine."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncGenerator, Collection, Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from engine_kinds import (
    COMPILER,
    KINDS,
    PROMPTS,
    STOPS,
    TOKENIZER,
    failed,
    isolation_of,
    load_all,
    reference_of,
)
from peft import PeftModel
from transformers import LlamaForCausalLM

from tunewright.core.errors import UserError
from tunewright.engines.child import START_SECONDS
from tunewright.engines.protocol import (
    ConstraintFailedError,
    Delta,
    Engine,
    EngineStoppedError,
    RequestFailedError,
    checked,
    stream,
)
from tunewright.engines.vllm.engine import VllmEngine, list_adapters
from tunewright.gate.answers import ModelAnswer
from tunewright.gate.isolation import TOLERANCE
from tunewright.generation.constraints import Grammar
from tunewright.generation.generate import generate
from tunewright.generation.requests import Finish, Request
from tunewright.generation.sampling import mask_logits

FOUR = PROMPTS[:4]
SOON = 120


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, small_base: Path, small_adapters: dict[str, Path]) -> Iterator[Engine]:
    with request.param(small_base) as engine:
        asyncio.run(load_all(engine, small_adapters))
        yield engine


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, SOON))


async def _deltas(engine: Engine, request: Request) -> list[Delta]:
    async with aclosing(stream(engine, request)) as deltas:
        return [delta async for delta in deltas]


async def _answer(engine: Engine, request: Request) -> tuple[tuple[int, ...], str | None]:
    deltas = await _deltas(engine, request)
    assert [bool(delta.finish) for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    return tuple(token for delta in deltas for token in delta.ids), deltas[-1].finish


def _expected(base: Path, folder: Path | None, prompt: tuple[int, ...], tokens: int) -> tuple[tuple[int, ...], str]:
    """transformers' own greedy answer."""
    model: Any = LlamaForCausalLM.from_pretrained(base).eval()
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder).eval()
    ids = torch.tensor([prompt])
    whole = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=list(STOPS),
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    return (tuple(whole[:-1]), "stop") if whole[-1] in STOPS else (tuple(whole), "length")


def test_each_model_answers_as_transformers_generate(
    engine: Engine, small_base: Path, small_adapters: dict[str, Path]
) -> None:
    models: list[tuple[str | None, Path | None]] = [(None, None), *small_adapters.items()]

    async def ask() -> list[Any]:
        return await asyncio.gather(
            *(_answer(engine, Request(prompt, digest, 12)) for digest, _ in models for prompt in FOUR)
        )

    expected = [_expected(small_base, folder, prompt, 12) for _, folder in models for prompt in FOUR]
    assert _run(ask()) == expected
    assert len(set(expected)) > len(expected) * 0.9, "the models differ, or this would show nothing"


def test_answer_ends_before_a_stop_token_with_finish_stop(
    small_base: Path, small_adapters: dict[str, Path], engine: Engine
) -> None:
    async def ask() -> list[Any]:
        asked = [Request(FOUR[seed % 4], None, 60, temperature=1.5, seed=seed) for seed in range(24)]
        return await asyncio.gather(*(_answer(engine, request) for request in asked))

    answers = _run(ask())
    for ids, finish in answers:
        assert not STOPS & set(ids)
        assert (finish == "stop") == (len(ids) < 60)
    assert {finish for _, finish in answers} == {"stop", "length"}


def test_equal_seeds_sample_equal_answers_and_different_seeds_do_not(engine: Engine) -> None:
    def sampled(seed: int) -> Any:
        return _run(_answer(engine, Request(FOUR[0], None, 20, temperature=1.0, top_p=0.9, seed=seed)))

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(4)}) > 1


def test_closing_a_stream_early_aborts_its_request(engine: Engine) -> None:
    async def leave() -> None:
        deltas = stream(engine, Request(FOUR[1], None, 400))
        await anext(deltas)
        assert sum(engine.in_flight) == 1
        await deltas.aclose()
        while sum(engine.in_flight):
            await asyncio.sleep(0.01)

    _run(leave())


def test_adapter_that_is_not_loaded_is_refused_and_never_answered_by_the_base(
    engine: Engine, small_adapters: dict[str, Path]
) -> None:
    async def ask() -> None:
        for digest in ("0" * 64, "../adapter-1", "base", str(next(iter(small_adapters.values())))):
            with pytest.raises(RequestFailedError, match="not loaded"):
                await _answer(engine, Request(FOUR[0], digest, 5))

    _run(ask())


def test_unloaded_adapter_is_refused_and_answers_as_before_when_reloaded(
    engine: Engine, small_adapters: dict[str, Path]
) -> None:
    digest, folder = next(iter(small_adapters.items()))
    request = Request(FOUR[0], digest, 8)

    async def there_and_gone() -> None:
        before = await _answer(engine, request)
        await engine.load(digest, folder)  # again: nothing happens
        await engine.unload(digest)
        with pytest.raises(RequestFailedError, match="not loaded"):
            await _answer(engine, request)
        await engine.unload(digest)  # again: nothing happens
        await engine.load(digest, folder)
        assert await _answer(engine, request) == before

    _run(there_and_gone())


def test_load_refuses_files_that_do_not_match_the_digest_and_running_answers_continue(
    engine: Engine, tmp_path: Path, small_adapters: dict[str, Path]
) -> None:
    digest, folder = next(iter(small_adapters.items()))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with (tmp_path / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")

    async def ask() -> None:
        # Room for it, so that it is refused for what it is.
        await engine.unload(digest)
        with pytest.raises(UserError, match="changed"):
            await engine.load(digest, tmp_path)
        with pytest.raises(RequestFailedError, match="not loaded"):
            await _answer(engine, Request(FOUR[0], digest, 5))
        await engine.load(digest, folder)
        assert await _answer(engine, Request(FOUR[0], digest, 5))

    _run(ask())


SCHEMA = {
    "type": "object",
    "properties": {
        "court": {"type": "string", "pattern": "^[ -~]{0,6}$"},
        "number": {"type": "integer", "maximum": 99},
    },
    "required": ["court", "number"],
    "additionalProperties": False,
}
GRAMMARS = {
    "choices": Grammar.choices(["Ala.", "Alaska", "Fla."]),
    "regex": Grammar.regex(r"[A-Z][a-z]{2,5} (1st|2d) \d{2}"),
    "schema": Grammar.json_schema(SCHEMA),
    "lark": Grammar.lark('start: "(" start ")" | word\nword: /[p-w]+/'),
}


def test_constrained_answers_are_those_of_the_decoding_loop(engine: Engine, small_base: Path) -> None:
    model: Any = LlamaForCausalLM.from_pretrained(small_base).eval()
    constraints = [COMPILER.compile(grammar) for grammar in GRAMMARS.values()]
    requests = [Request(prompt, None, 40, constraint=each) for each in constraints for prompt in FOUR]
    free = [Request(prompt, None, 12) for prompt in FOUR]
    expected = generate(model, [*requests, *free], stop_ids=STOPS, pad_id=0, batch_size=4)

    async def ask() -> list[Any]:
        return await asyncio.gather(*(_answer(engine, request) for request in [*requests, *free]))

    answers = _run(ask())
    for request, answer, completion in zip([*requests, *free], answers, expected, strict=True):
        if answer != (completion.ids, completion.finish):
            assert engine.name == "llamacpp", "its weights have 16 bits, and its rounding depends on the batch"
            assert max(_shortfalls(small_base, request, answer[0])) < 0.02, "a tie to within 16 bits at most"
    for request, (ids, finish) in zip(requests, answers, strict=False):
        assert request.constraint is not None
        assert request.constraint.matches(TOKENIZER.decode(ids)) or finish == "length"
    assert sum(finish == "stop" for _, finish in answers[: len(requests)]) >= len(requests) / 2


def test_constrained_answer_cut_at_its_limit_has_finish_length(engine: Engine) -> None:
    constraint = COMPILER.compile(Grammar.regex("[a-z]{30}"))
    ids, finish = _run(_answer(engine, Request(FOUR[0], None, 10, constraint=constraint)))
    assert (len(ids), finish) == (10, "length")
    assert len(_run(_answer(engine, Request(FOUR[0], None, 30, constraint=constraint)))[0]) == 30


def _log_probabilities(base: Path, folder: Path, prompt: tuple[int, ...], ids: tuple[int, ...]) -> torch.Tensor:
    """Return PEFT's own at each token of an answer."""
    model: Any = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double(), -1)


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "seed": 3}, {"logit_bias": ((70, 8.0),)}])
def test_log_probabilities_are_those_of_the_model_at_each_token(
    engine: Engine, small_base: Path, small_adapters: dict[str, Path], how: dict[str, Any]
) -> None:
    digest, folder = next(iter(small_adapters.items()))
    deltas = _run(_deltas(engine, Request(FOUR[0], digest, 8, logprobs=3, **how)))
    ids = tuple(token for delta in deltas for token in delta.ids)
    found = [logprob for delta in deltas for logprob in delta.logprobs]
    expected = _log_probabilities(small_base, folder, FOUR[0], ids)
    assert len(found) == len(ids)
    for token, logprob, row in zip(ids, found, expected, strict=True):
        assert logprob.logprob == pytest.approx(row[token].item(), abs=0.05)
        assert [value for _, value in logprob.top[:3]] == pytest.approx(row.topk(3).values.tolist(), abs=0.05)
    plain = _run(_deltas(engine, Request(FOUR[0], digest, 8, logprobs=0)))
    assert all(logprob.top[:0] == () and logprob.logprob < 0 for delta in plain for logprob in delta.logprobs)


def _shortfalls(base: Path, request: Request, ids: tuple[int, ...]) -> list[float]:
    """Return how far each token of a greedy answer is from the likeliest one, in a plain loop with OpenAI's formula."""
    model: Any = LlamaForCausalLM.from_pretrained(base).eval()
    guide = request.constraint.start() if request.constraint else None
    found = []
    for place, token in enumerate(ids):
        before = ids[:place]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*request.prompt_ids, *before]])).logits[0, -1]
        for used in set(before):
            logits[used] -= before.count(used) * request.frequency_penalty + request.presence_penalty
        for biased, bias in request.logit_bias:
            logits[biased] += bias
        if guide is not None:
            logits = mask_logits(logits[None], [guide.allowed()])[0]
            guide.advance(token)
        found.append(float(logits.max() - logits[token]))
    return found


@pytest.mark.parametrize(
    "how",
    [
        {"frequency_penalty": 1.5},
        {"presence_penalty": 2.0},
        {"presence_penalty": -2.0, "frequency_penalty": -0.3},
        {"logit_bias": ((40, 3.0), (41, -100.0))},
        {"logit_bias": ((66, 100.0),)},
    ],
)
def test_penalties_and_biases_change_the_answer_by_openais_formula(
    engine: Engine, small_base: Path, how: dict[str, Any]
) -> None:
    if engine.unsupported & set(how):
        pytest.skip("the gateway refuses them for this engine")
    asked = [Request(prompt, None, 16, **how) for prompt in FOUR]

    async def ask() -> list[Any]:
        return await asyncio.gather(*(_answer(engine, request) for request in asked))

    answers = [ids for ids, _ in _run(ask())]
    for request, ids in zip(asked, answers, strict=True):
        assert max(_shortfalls(small_base, request, ids)) < 0.02, "a tie to within 16 bits at most"
    free = [_expected(small_base, None, prompt, 16)[0] for prompt in FOUR]
    assert answers != free


ISOLATED = [
    kind if kind.id == "pool" else pytest.param(*kind.values, id=kind.id, marks=[*kind.marks, pytest.mark.slow])
    for kind in KINDS
]


@pytest.mark.parametrize("engine", ISOLATED, indirect=True)
def test_engine_is_isolated(engine: Engine, small_base: Path, small_adapters: dict[str, Path]) -> None:
    result = isolation_of(engine, reference_of(small_base, small_adapters), small_adapters)
    assert (result.verdict, failed(result), result.alike) == ("isolated", set(), ())
    assert all(check.asked >= 8 for check in result.checks)


def _vllm(engine: Engine) -> VllmEngine:
    if not isinstance(engine, VllmEngine):
        pytest.skip("of vLLM")
    return engine


class NamedByAlias(VllmEngine):
    """Adapters called by an alias, from one folder, as is usual: a new version takes the old one's name and path."""

    place: Path

    async def load(self, digest: str, folder: Path) -> None:
        alias = self.place / "alias"
        await asyncio.to_thread(shutil.copytree, folder, alias, dirs_exist_ok=True)
        self._listed[digest] = {}
        list_adapters(self.child.folder, {"alias": {"path": str(alias), "files": {}}})

    async def unload(self, digest: str) -> None:
        self._listed.pop(digest, None)
        (await self.child.client().delete("/tunewright/adapters/alias")).raise_for_status()

    def _body(self, request: Request, stop_ids: Collection[int], tenant: str) -> dict[str, Any]:
        body = super()._body(request, stop_ids, tenant)
        return body if request.adapter is None else {**body, "model": "alias"}


def test_isolation_test_detects_a_stale_prefix_cache_of_vllm(
    engine: Engine, small_base: Path, small_adapters: dict[str, Path], tmp_path: Path
) -> None:
    """The keys of vLLM's prefix cache are name and path: with both the same, it takes the old version's."""
    vllm: Any = _vllm(engine)
    (old, first), (new, second), _ = small_adapters.items()
    reference = reference_of(small_base, {old: first, new: second})
    prompt = PROMPTS[3] * 12  # more than a block of the cache, which holds whole blocks only

    async def empty() -> None:
        for digest in small_adapters:
            await vllm.unload(digest)

    async def replace() -> tuple[Any, Any]:
        await engine.load(old, first)
        before = await _answer(engine, Request(prompt, old, 8))
        await engine.unload(old)
        await engine.load(new, second)
        return before, await _answer(engine, Request(prompt, new, 8))

    _run(empty())
    vllm.__class__ = NamedByAlias
    try:
        vllm.place = tmp_path
        before, after = _run(replace())
        _run(vllm.unload(new))
    finally:
        vllm.__class__ = VllmEngine
    _run(load_all(vllm, small_adapters))
    (right,) = reference.shortfalls(old, prompt, [ModelAnswer(*before)])
    (wrong,) = reference.shortfalls(new, prompt, [ModelAnswer(*after)])
    assert right <= TOLERANCE["float32"] < wrong


@pytest.mark.fault("engine", "serve")
def test_vllm_answers_equally_after_a_crash_of_its_core(engine: Engine, small_adapters: dict[str, Path]) -> None:
    vllm = _vllm(engine)
    requests = [Request(PROMPTS[0], digest, 8) for digest in (None, *small_adapters)]
    before = [_run(_answer(vllm, request)) for request in requests]
    _run(_lose_core(vllm))
    until = time.monotonic() + START_SECONDS
    while vllm.child.starts < 2 or vllm.stopped is not None:
        assert time.monotonic() < until
        time.sleep(0.05)
    # The resolver loads them again as they are asked for.
    assert [_run(_answer(vllm, request)) for request in requests] == before


async def _lose_core(engine: VllmEngine) -> None:
    """Kill vLLM's core process while requests are running."""
    waiting = [asyncio.create_task(_answer(engine, Request(PROMPTS[0], None, 480))) for _ in range(2)]
    while engine.in_flight[0] < 2:
        await asyncio.sleep(0)
    children = psutil.Process(engine.child.process_id).children()
    next(child for child in children if child.name().startswith("VLLM::EngineCor")).kill()
    for outcome in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(outcome, EngineStoppedError), outcome
    while True:
        with pytest.raises(EngineStoppedError, match="restarting"):
            await _answer(engine, Request(PROMPTS[0], None, 2))
        if engine.stopped is not None:
            return


def test_stopped_engine_fails_running_and_new_requests(engine: Engine, small_base: Path) -> None:
    """The last test of the engine: it ends it."""

    async def ask() -> None:
        # Four times as many as decode at once: some are unfinished whenever the engine ends.
        asking = [asyncio.create_task(_answer(engine, Request(FOUR[1], None, 480))) for _ in range(64)]
        while not sum(engine.in_flight):
            await asyncio.sleep(0)
        await asyncio.to_thread(engine.stop)
        outcomes = await asyncio.gather(*asking, return_exceptions=True)
        lost = [outcome for outcome in outcomes if isinstance(outcome, EngineStoppedError)]
        complete = [outcome for outcome in outcomes if isinstance(outcome, tuple)]
        assert lost
        assert len(lost) + len(complete) == len(outcomes), outcomes
        assert engine.stopped
        with pytest.raises(EngineStoppedError):
            await _answer(engine, Request(FOUR[0], None, 5))

    _run(ask())


@pytest.mark.parametrize(
    ("text", "finish", "outcome"),
    [
        ("abcabc", "length", "abc"),  # nothing can follow, whatever the engine sends
        ("ab", "stop", None),
        ("ab", "length", "ab"),
        ("axc", "length", None),
    ],
)
def test_deltas_of_an_engine_with_its_own_grammar_are_checked(text: str, finish: Finish, outcome: str | None) -> None:
    request = Request((1,), None, 6, constraint=COMPILER.compile(Grammar.regex("abc")))

    async def deltas() -> AsyncGenerator[Delta, None]:
        ids = TOKENIZER.convert_tokens_to_ids(list(text))
        for place, token in enumerate(ids, 1):
            yield Delta((token,), finish if place == len(ids) else None)

    async def ask() -> list[Delta]:
        return [delta async for delta in checked(deltas(), request)]

    if outcome is None:
        with pytest.raises(ConstraintFailedError):
            _run(ask())
    else:
        got = _run(ask())
        assert TOKENIZER.decode([token for delta in got for token in delta.ids]) == outcome
        assert got[-1].finish == ("stop" if outcome == "abc" else finish)
