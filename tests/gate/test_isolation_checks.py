"""The isolation test passes a correct engine and detects every planted bug."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
from engine_kinds import failed, isolation_of, peft_engine, reference_of, vllm_engine

from making.engine_models import write_adapter
from making.planted_bugs import CacheOfTwo, LastSlot, LastVersion, OldVersion, StaleCache
from tunewright.engines.peft import PeftEngine
from tunewright.engines.vllm.engine import VllmSettings
from tunewright.gate.answers import TOKENS, PeftReference


@pytest.fixture(scope="module")
def reference(small_base: Path, small_adapters: dict[str, Path]) -> PeftReference:
    """The reference, which finds the probes once for all tests."""
    found = reference_of(small_base, small_adapters)
    greedy = cache(found.greedy)
    found.greedy = lambda model, prompts, tokens=TOKENS: greedy(model, tuple(prompts), tokens)  # type: ignore[method-assign]
    return found


@contextmanager
def planted(kind: type[PeftEngine], base: Path) -> Iterator[PeftEngine]:
    """An engine with a bug."""
    with peft_engine(base) as engine:
        assert isinstance(engine, PeftEngine)
        engine.__class__ = kind
        yield engine


def test_embedded_engine_is_isolated(
    small_base: Path, small_adapters: dict[str, Path], reference: PeftReference
) -> None:
    with peft_engine(small_base) as engine:
        result = isolation_of(engine, reference, small_adapters)
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
def test_planted_bug_is_detected_by_its_checks(
    bug: type[PeftEngine],
    seen_by: set[str],
    small_base: Path,
    small_adapters: dict[str, Path],
    reference: PeftReference,
) -> None:
    with planted(bug, small_base) as engine:
        result = isolation_of(engine, reference, small_adapters)
    assert result.verdict == "not isolated"
    assert seen_by <= failed(result)
    assert any(failure.like is not None for failure in result.failures), "it says whose answer it was"


def test_verdict_is_cannot_tell_when_two_adapters_are_indistinguishable(
    small_base: Path, tmp_path: Path, small_adapters: dict[str, Path]
) -> None:
    digest, folder = next(iter(small_adapters.items()))
    again, twin = write_adapter(small_base, tmp_path / "twin", seed=1)
    assert again == digest
    (twin / "adapter_config.json").write_text((twin / "adapter_config.json").read_text() + "\n")
    from tunewright.adapters.registry import adapter_digest

    pair = {digest: folder, adapter_digest(twin): twin}
    with peft_engine(small_base) as engine:
        result = isolation_of(engine, reference_of(small_base, pair), pair)
    assert (result.verdict, len(result.alike)) == ("can't tell", 1)
    assert failed(result) == set()


class SlotsLikeAdapters(VllmSettings):
    """Without the slot to spare."""

    @property
    def slots(self) -> int:
        return self.room


@pytest.mark.vllm
def test_isolation_test_detects_vllms_last_slot_bug(
    small_base: Path, small_adapters: dict[str, Path], reference: PeftReference
) -> None:
    with vllm_engine(small_base, SlotsLikeAdapters, room=len(small_adapters)) as engine:
        result = isolation_of(engine, reference, small_adapters)
    assert result.verdict == "not isolated"
    # Either pattern batches the base with adapters; which of them meets in a batch depends on the machine.
    assert failed(result) & {"the base in the mix", "all mixed"}
    wrong = result.failures
    assert {failure.asked for failure in wrong} == {"base"}
    assert all(failure.like is not None and failure.like.startswith("adapter") for failure in wrong if failure.like)
