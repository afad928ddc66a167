"""Runs of the isolation test over a tiny base."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from pathlib import Path

from engine_kinds import TOKENIZER

from tunewright.core.progress import LogReporter
from tunewright.engines.protocol import Engine
from tunewright.gate.answers import Digest, PeftReference
from tunewright.gate.isolation import TOLERANCE, check_isolation
from tunewright.gate.results import IsolationResult

PROMPTS = tuple(
    tuple(TOKENIZER(text).input_ids)
    for text in ("Mobile County", "Where is it?", "a", "The quick brown fox", "Give the citation.", "42 U.S.C.")
)


def result_of(engine: Engine, reference: PeftReference, adapters: dict[str, Path]) -> IsolationResult:
    """The test's result on an engine that has nothing loaded yet."""

    async def load() -> None:
        for digest, folder in adapters.items():
            await engine.load(digest, folder)

    asyncio.run(load())
    names: dict[Digest, str] = {None: "base", **{digest: f"adapter {digest[:6]}" for digest in adapters}}
    return check_isolation(
        lambda: nullcontext(engine),
        reference,
        adapters,
        PROMPTS,
        context=engine.context_length,
        tolerance=TOLERANCE["float32"],
        names=names,
        reporter=LogReporter(),
    )


def failed(result: IsolationResult) -> set[str]:
    """The checks that failed."""
    return {check.name for check in result.checks if check.wrong}
