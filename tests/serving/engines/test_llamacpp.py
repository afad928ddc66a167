"""llama.cpp as an engine: isolation, cache, crashes and files."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from engine_kinds import PIECES, PROMPTS, TOKENIZER, llamacpp_engine, load_all, reference_of

from making.engine_models import write_adapter
from making.tiny_bases import chat_of
from making.vllm_child import alive, wait_until
from tunewright.adapters.registry import adapter_digest
from tunewright.config import Config
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.engines.child import Plan
from tunewright.engines.llamacpp import BLOCK, LlamaCppEngine, LlamaCppSettings
from tunewright.engines.protocol import Engine, EngineStoppedError, stream
from tunewright.gate.answers import ModelAnswer, PeftReference
from tunewright.gate.isolation import TOLERANCE
from tunewright.generation.requests import Request
from tunewright.models.bases import Base
from tunewright.serving.engine_start import EngineSpec, base_file, start_engine


@pytest.fixture(scope="module")
def reference(small_base: Path, small_adapters: dict[str, Path]) -> PeftReference:
    return reference_of(small_base, small_adapters)


async def _ids(engine: Engine, request: Request) -> list[int]:
    async with aclosing(stream(engine, request)) as deltas:
        return [token async for delta in deltas for token in delta.ids]


def _answer(ids: list[int], limit: int) -> ModelAnswer:
    return ModelAnswer(tuple(ids), "length" if len(ids) == limit else "stop")


class WithPromptCache(LlamaCppSettings):
    """llama.cpp's prompt cache on, the default."""

    def plan(self, folder: Path, loras: Any) -> Plan:
        plan = super().plan(folder, loras)
        program = (
            "import sys, xllamacpp\n"
            "from tunewright.engines import llamacpp_worker as worker\n"
            "kept = {'cache_prompt', 'cache_ram_mib', 'cache_idle_slots', 'slot_prompt_similarity'}\n"
            "class Default(xllamacpp.CommonParams):\n"
            "    def __setattr__(self, name, value):\n"
            "        if name not in kept:\n"
            "            super().__setattr__(name, value)\n"
            "xllamacpp.CommonParams = Default\n"
            "worker.main(sys.argv[1])\n"
        )
        return replace(plan, command=[sys.executable, "-c", program, plan.command[-1]])


class TakesFromCache(LlamaCppEngine):
    """Requests take what is in the cache."""

    def _body(self, *asked: Any) -> dict[str, Any]:
        return {**super()._body(*asked), "cache_prompt": True}


@pytest.mark.parametrize("ours", [True, False])
def test_llama_cpp_reuses_another_adapters_prefix_with_its_defaults_but_not_with_our_settings(
    ours: bool, small_base: Path, small_adapters: dict[str, Path], reference: PeftReference
) -> None:
    """llama.cpp issue 26207: its cache of prompts does not know which adapter computed them."""
    (one, first), (two, second), _ = small_adapters.items()
    prompt, other, third = (prompt * 12 for prompt in (PROMPTS[3], PROMPTS[0], PROMPTS[1]))
    kinds = (LlamaCppEngine, LlamaCppSettings) if ours else (TakesFromCache, WithPromptCache)
    with llamacpp_engine(small_base, *kinds, max_num_seqs=1) as engine:

        async def ask() -> list[int]:
            await engine.load(one, first)
            await engine.load(two, second)
            for digest, before in ((one, prompt), (one, other), (two, third)):
                await _ids(engine, Request(before, digest, 8))
            return await _ids(engine, Request(prompt, two, 8))

        ids = asyncio.run(asyncio.wait_for(ask(), 300))
    (short,) = reference.shortfalls(two, prompt, [_answer(ids, 8)])
    assert (short <= TOLERANCE["float32"]) == ours


def test_answers_resume_when_the_cache_was_full(small_base: Path, small_adapters: dict[str, Path]) -> None:
    digest, folder = next(iter(small_adapters.items()))
    asked = [Request((*PROMPTS[n % 6], 5 + n), digest, 500 - 24) for n in range(5)]
    # Four of the five find room for what they begin with, and none of them for its full length.
    with llamacpp_engine(small_base, tokens=2 * 512 + 256, stop_ids={0}) as engine:

        async def ask() -> list[list[int]]:
            await engine.load(digest, folder)
            return list(await asyncio.gather(*(_ids(engine, request) for request in asked)))

        answers = asyncio.run(asyncio.wait_for(ask(), 300))
    assert max(map(len, answers)) > BLOCK
    base = Base("small", small_base, None, "LlamaForCausalLM", {})
    reference = PeftReference(base, "float32", "none", {digest: folder}, stop_ids={0})
    for request, ids in zip(asked, answers, strict=True):
        # Tokens that are read again are added up in another order; one left out or said twice would be seen.
        (short,) = reference.shortfalls(digest, request.prompt_ids, [_answer(ids, 500 - 24)])
        assert short <= TOLERANCE["float32"]


def test_running_answer_continues_while_adapters_change_and_the_old_process_ends_after_it(
    small_base: Path, small_adapters: dict[str, Path]
) -> None:
    (one, first), (two, second), _ = small_adapters.items()
    with llamacpp_engine(small_base) as engine:
        assert isinstance(engine, LlamaCppEngine)

        async def change() -> None:
            await engine.load(one, first)
            request = Request(PROMPTS[1], one, 300)
            expected = await _ids(engine, request)
            old = engine._now.child.process_id
            assert old is not None
            deltas = stream(engine, request)
            ids = list((await anext(deltas)).ids)
            await engine.load(two, second)
            assert engine._now.child.process_id != old
            assert await _ids(engine, Request(PROMPTS[0], two, 4))
            ids += [token async for delta in deltas for token in delta.ids]
            assert ids == expected
            await asyncio.to_thread(wait_until, lambda: not alive(old))
            assert engine.in_flight == (0, 0)

        asyncio.run(asyncio.wait_for(change(), 300))


@pytest.mark.fault("engine", "serve")
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_llama_cpp_restarts_and_fails_running_requests_when_it_crashes_or_hangs(
    number: signal.Signals, small_base: Path, small_adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if number == signal.SIGSTOP:
        for name, seconds in (("PROBE_SECONDS", 0.05), ("PATIENCE_SECONDS", 2)):
            monkeypatch.setattr(f"tunewright.engines.child.{name}", seconds)
    with llamacpp_engine(small_base) as engine:
        assert isinstance(engine, LlamaCppEngine)

        async def ask() -> None:
            await load_all(engine, small_adapters)
            request = Request(PROMPTS[1], next(iter(small_adapters)), 8)
            before = await _ids(engine, request)
            waiting = asyncio.create_task(_ids(engine, Request(PROMPTS[0], None, 400)))
            while not engine.in_flight[0]:
                await asyncio.sleep(0)
            assert engine._now.child.process_id is not None
            os.kill(engine._now.child.process_id, number)
            with pytest.raises(EngineStoppedError):
                await waiting
            await asyncio.to_thread(wait_until, lambda: engine._now.child.starts == 2 and not engine.stopped)
            assert await _ids(engine, request) == before

        asyncio.run(asyncio.wait_for(ask(), 300))


def test_base_file_has_texts_of_whole_characters_and_our_stop_tokens(small_base: Path, tmp_path: Path) -> None:
    base = Base("small", small_base, None, "LlamaForCausalLM", {})
    pieces = [*PIECES]
    pieces[10:15] = [b"a b", "é".encode(), b"\xe9", b"</s>", b"a b"]

    def write(stop_ids: set[int]) -> Path:
        return base_file(tmp_path, base, pieces, stop_ids, 7, "q8_0", LogReporter())

    path = write({7, 3, 5, 9})
    reader = gguf.GGUFReader(path)

    def field(name: str) -> Any:
        return reader.fields[f"tokenizer.{name}"].contents()

    assert field("ggml.tokens")[10:15] == ["aĠb", "Ã©", "[12]", "[13]", "[14]"]
    assert field("ggml.pre") == "smollm", "with gpt-2, llama.cpp would drop the space of the token ' .'"
    assert field("ggml.token_type")[10:15] == [1, 1, 3, 3, 3]
    assert field("ggml.tokens")[7] == "[7]", "an end token has no text"
    assert [field(f"ggml.{name}_token_id") for name in ("eos", "eot", "eom")] == [3, 7, 5]
    assert "tokenizer.chat_template" not in reader.fields
    assert write({9, 7, 5, 3}) == path, "it is made once"
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(UserError, match=r"weights\.gguf"):
        write({3, 5, 7, 9})


def test_stop_token_without_a_gguf_name_ends_an_answer(small_base: Path) -> None:
    with llamacpp_engine(small_base, stop_ids={0}) as engine:
        answers = {prompt: asyncio.run(_ids(engine, Request(prompt, None, 40))) for prompt in PROMPTS}
    prompt = max(PROMPTS, key=lambda prompt: len(answers[prompt]))
    whole = answers[prompt]
    unused = sorted(set(range(len(TOKENIZER))) - set(whole))[:3]
    fourth = max(whole)
    with llamacpp_engine(small_base, stop_ids={*unused, fourth}) as engine:
        cut = asyncio.run(_ids(engine, Request(prompt, None, 40)))
    assert max(unused) < fourth
    assert cut == whole[: whole.index(fourth)]


def test_load_refuses_a_bad_file_with_llama_cpps_log_and_other_adapters_keep_answering(
    small_base: Path, tmp_path: Path, small_adapters: dict[str, Path]
) -> None:
    digest, folder = next(iter(small_adapters.items()))
    (tmp_path / "no.gguf").write_bytes(b"GGUF, or not")
    with llamacpp_engine(small_base) as engine:
        assert isinstance(engine, LlamaCppEngine)
        engine._settings = replace(engine._settings, lora_file=lambda digest, folder: tmp_path / "no.gguf")

        async def load() -> None:
            with pytest.raises(UserError, match="cannot load it") as caught:
                await engine.load(digest, folder)
            assert "no.gguf" in caught.value.what
            assert await _ids(engine, Request(PROMPTS[0], None, 4))

        asyncio.run(load())


def released(base: Path, folders: Iterable[Path]) -> LlamaCppEngine:
    """The engine of a server whose live releases have these adapters."""
    small = Base("small", base, None, "LlamaForCausalLM", {})
    spec = EngineSpec(small, chat_of(TOKENIZER), "none", {}, to_come=tuple(folders))
    engine = start_engine("llamacpp", Config(), spec, LogReporter())
    assert isinstance(engine, LlamaCppEngine)
    return engine


def test_start_loads_all_live_releases_without_a_restart(
    small_base: Path, small_adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = released(small_base, small_adapters.values())
    try:
        first = engine._now
        asyncio.run(load_all(engine, small_adapters))
        assert engine._now is first
        assert set(first.numbers) == set(small_adapters)
    finally:
        engine.stop()


def test_start_leaves_live_releases_to_be_loaded_one_by_one_when_one_is_bad(
    small_base: Path, small_adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _, bad = write_adapter(small_base, tmp_path / "biased", seed=1)
    config = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps({**config, "bias": "all"}))
    digest, good = next(iter(small_adapters.items()))
    engine = released(small_base, [good, bad])

    async def load() -> None:
        await engine.load(digest, good)
        with pytest.raises(UserError, match="bias"):
            await engine.load(adapter_digest(bad), bad)
        assert await _ids(engine, Request(PROMPTS[0], digest, 4))

    try:
        asyncio.run(load())
    finally:
        engine.stop()


def test_start_names_the_package_when_llama_cpp_is_not_installed(
    small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunewright.serving.engine_start.find_spec", lambda name: None)
    spec = EngineSpec(Base("small", small_base, None, "LlamaForCausalLM", {}), None, "none", {})  # type: ignore[arg-type]
    with pytest.raises(UserError) as caught:
        start_engine("llamacpp", Config(), spec, LogReporter())
    assert (caught.value.fix or "").endswith("pip install 'tunewright[llamacpp]'")
