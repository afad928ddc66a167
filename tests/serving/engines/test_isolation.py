"""The isolation test finds nothing in an engine that keeps its adapters apart, and every planted way to mix them up."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from engine_kinds import STOPS, TOKENIZER, peft_engine

from planted_bugs import CacheOfTwo, LastSlot, LastVersion, OldVersion, StaleCache
from small_models import write_adapter
from tunewright.core.progress import LogReporter
from tunewright.engines.protocol import Engine
from tunewright.models.bases import Base
from tunewright.serving.canaries import Digest
from tunewright.serving.engines.peft import PeftEngine
from tunewright.serving.isolation import TOLERANCE, IsolationResult, check_isolation
from tunewright.serving.oracle import PeftOracle

PROMPTS = tuple(
    tuple(TOKENIZER(text).input_ids)
    for text in ("Mobile County", "Where is it?", "a", "The quick brown fox", "Give the citation.", "42 U.S.C.")
)


@pytest.fixture(scope="module")
def oracle(small_base: Path, small_adapters: dict[str, Path]) -> PeftOracle:
    base = Base("small", small_base, None, "LlamaForCausalLM", {})
    return PeftOracle(base, "float32", "none", small_adapters, stop_ids=STOPS)


def result_of(engine: Engine, oracle: PeftOracle, adapters: dict[str, Path]) -> IsolationResult:
    """The test's result on an engine that has nothing loaded yet."""

    async def load() -> None:
        for digest, folder in adapters.items():
            await engine.load(digest, folder)

    asyncio.run(load())
    names: dict[Digest, str] = {None: "base", **{digest: f"adapter {digest[:6]}" for digest in adapters}}
    return check_isolation(
        lambda: nullcontext(engine),
        oracle,
        adapters,
        PROMPTS,
        context=engine.context_length,
        tolerance=TOLERANCE["float32"],
        names=names,
        reporter=LogReporter(),
    )


@contextmanager
def planted(kind: type[PeftEngine], base: Path) -> Iterator[PeftEngine]:
    """An engine with a bug."""
    with peft_engine(base) as engine:
        assert isinstance(engine, PeftEngine)
        engine.__class__ = kind
        yield engine


def failed(result: IsolationResult) -> set[str]:
    """The checks that failed."""
    return {check.name for check in result.checks if check.failures}


def test_the_embedded_engine_keeps_adapters_apart(
    small_base: Path, small_adapters: dict[str, Path], oracle: PeftOracle
) -> None:
    with peft_engine(small_base) as engine:
        result = result_of(engine, oracle, small_adapters)
    assert (result.verdict, failed(result), result.alike) == ("isolated", set(), ())
    assert all(check.asked >= 8 for check in result.checks)
    # float32 with another order of additions: nothing that a tolerance of 0.05 nats has to forgive.
    assert max(check.worst for check in result.checks) < 1e-3


@pytest.mark.parametrize(
    ("bug", "seen_by"),
    [
        (LastSlot, {"all mixed", "the base in the mix"}),
        (StaleCache, {"prefixes warm", "a new version"}),
        (CacheOfTwo, {"prefixes warm", "a new version"}),
        (OldVersion, {"evicted and reloaded", "a new version"}),
        (LastVersion, {"a new version"}),
    ],
)
def test_a_planted_bug_is_found_by_the_checks_that_are_for_it(
    bug: type[PeftEngine], seen_by: set[str], small_base: Path, small_adapters: dict[str, Path], oracle: PeftOracle
) -> None:
    with planted(bug, small_base) as engine:
        result = result_of(engine, oracle, small_adapters)
    assert result.verdict == "not isolated"
    assert seen_by <= failed(result)
    failures = [failure for check in result.checks for failure in check.failures]
    assert any(failure.like is not None for failure in failures), "it says whose answer it was"


def test_adapters_that_answer_alike_cannot_be_told_apart_and_it_says_so(
    small_base: Path, tmp_path: Path, small_adapters: dict[str, Path]
) -> None:
    digest, folder = next(iter(small_adapters.items()))
    again, twin = write_adapter(small_base, tmp_path / "twin", seed=1)
    assert again == digest
    (twin / "adapter_config.json").write_text((twin / "adapter_config.json").read_text() + "\n")
    from tunewright.adapters.registry import adapter_digest

    pair = {digest: folder, adapter_digest(twin): twin}
    base = Base("small", small_base, None, "LlamaForCausalLM", {})
    with peft_engine(small_base) as engine:
        result = result_of(engine, PeftOracle(base, "float32", "none", pair, stop_ids=STOPS), pair)
    assert (result.verdict, len(result.alike)) == ("can't tell", 1)
    assert failed(result) == set()
