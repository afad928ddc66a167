"""Probes, checked against the shortfall of every answer."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import nullcontext
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import ScriptedEngine

from making.property_examples import examples
from tunewright.core.progress import LogReporter
from tunewright.engines.protocol import Delta
from tunewright.gate.answers import END, Digest, GreedyAnswer, Ids, ModelAnswer
from tunewright.gate.isolation import PER_MODEL, PROBE_MARGIN, check_isolation, find_probes
from tunewright.generation.requests import Request

TOKENS, VOCABULARY, STOP = 4, 5, 0
TOLERANCE = 0.5


class TableOracle:
    """Models whose logits are drawn by a seed for each text; some answer as another one does."""

    def __init__(self, seed: int, spread: float, kept_pair_key: dict[Digest, Digest] | None = None) -> None:
        self._seed = seed
        self._spread = spread
        self._stands_for = kept_pair_key or {}
        self.answered = 0
        self.judged = 0

    def _logits(self, model: Digest, prompt: Ids, before: Ids) -> list[float]:
        model = self._stands_for.get(model, model)
        common = random.Random(f"{self._seed} {prompt} {before}")
        own = random.Random(f"{self._seed} {model} {prompt} {before}")
        return [common.gauss(0, 1) + own.gauss(0, self._spread) for _ in range(VOCABULARY)]

    def greedy(self, model: Digest, prompts: Sequence[Ids], tokens: int = TOKENS) -> list[GreedyAnswer]:
        self.answered += len(prompts)
        return [self._greedy(model, prompt, tokens) for prompt in prompts]

    def _greedy(self, model: Digest, prompt: Ids, tokens: int = TOKENS) -> GreedyAnswer:
        ids: list[int] = []
        behind = []
        while len(ids) < tokens:
            logits = self._logits(model, prompt, tuple(ids))
            best = max(logits)
            gaps = {token: best - logit for token, logit in enumerate(logits)}
            behind.append({**gaps, END: gaps[STOP]})
            ids.append(logits.index(best))
            if ids[-1] == STOP:
                return GreedyAnswer(ModelAnswer(tuple(ids[:-1]), "stop"), tuple(behind))
        return GreedyAnswer(ModelAnswer(tuple(ids), "length"), tuple(behind))

    def shortfalls(self, model: Digest, prompt: Ids, answers: Sequence[ModelAnswer]) -> list[float]:
        self.judged += len(answers)
        return [self.shortfall(model, prompt, answer) for answer in answers]

    def unload(self) -> None:
        pass

    def shortfall(self, model: Digest, prompt: Ids, answer: ModelAnswer) -> float:
        tokens = (*answer.ids, STOP) if answer.finish == "stop" else answer.ids
        worst = 0.0
        for place, token in enumerate(tokens):
            logits = self._logits(model, prompt, tokens[:place])
            worst = max(worst, max(logits) - logits[token])
        return worst


MODELS: list[Digest] = [None, "a", "b", "c", "d", "e"]
PROMPTS = [(number,) for number in range(12)]


@examples(25)
@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.0, 0.2, 1.0, 3.0]), twins=st.booleans())
def test_probes_separate_every_pair_of_models_or_list_it(seed: int, spread: float, twins: bool) -> None:
    reference = TableOracle(seed, spread, {"d": "b", "e": None} if twins else None)
    found = find_probes(reference, MODELS, PROMPTS, TOLERANCE)

    def tells(model: Digest, other: Digest, prompt: Ids) -> bool:
        return reference.shortfall(model, prompt, reference._greedy(other, prompt).answer) >= PROBE_MARGIN * TOLERANCE

    for model in MODELS:
        assert len(found.prompts[model]) >= 1
        for other in set(MODELS) - {model}:
            by_its_own = any(tells(model, other, prompt) for prompt in found.prompts[model])
            by_any = any(tells(model, other, prompt) for prompt in PROMPTS)
            assert by_its_own == by_any == ((model, other) not in found.alike)
    assert all(answer == reference._greedy(model, prompt).answer for (model, prompt), answer in found.answers.items())
    if twins:
        assert {("b", "d"), ("d", "b"), (None, "e"), ("e", None)} <= found.alike


@examples(25)
@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.2, 1.0, 3.0]))
def test_shortfall_at_divergence_is_at_most_that_of_the_whole_answer(seed: int, spread: float) -> None:
    reference = TableOracle(seed, spread)
    for prompt in PROMPTS:
        one, other = (reference._greedy(model, prompt) for model in ("a", "b"))
        short = one.shortfall(other.answer)
        assert 0 <= short <= reference.shortfall("a", prompt, other.answer) + 1e-12
        assert (short > 0) == (one.answer != other.answer)


def test_unlisted_token_is_at_least_as_unlikely_as_the_last_listed_one() -> None:
    own = GreedyAnswer(ModelAnswer((7,), "length"), ({7: 0.0, 8: 1.5, 9: 2.5, END: 30.0},))
    shortfalls = [own.shortfall(ModelAnswer((token,), "length")) for token in (7, 8, 1)]
    assert shortfalls == [0.0, 1.5, 2.5]
    assert own.shortfall(ModelAnswer((), "stop")) == 30.0


def test_reference_passes_grow_with_models_and_not_with_pairs() -> None:
    def passes(count: int) -> tuple[int, int]:
        reference = TableOracle(1, 6.0)
        found = find_probes(reference, [None, *map(str, range(count - 1))], PROMPTS, 0.25)
        assert not found.alike
        assert all(len(prompts) >= PER_MODEL for prompts in found.prompts.values())
        return reference.answered, reference.judged

    (few, _), (many, judged) = passes(8), passes(64)
    assert many <= 12 * 64
    assert many <= 8 * few * 2
    assert judged <= 64 * 2, "of 4,032 pairs"


class TableEngine(ScriptedEngine):
    """Answers as the table says, and counts."""

    def __init__(self, reference: TableOracle) -> None:
        super().__init__()
        self._reference = reference
        self.requests = self.changes = 0

    async def deltas(self, request: Request) -> AsyncGenerator[Delta, None]:
        self.requests += 1
        answer = self._reference._greedy(request.adapter, request.prompt_ids).answer
        yield Delta(answer.ids, answer.finish)

    async def load(self, digest: str, folder: Path) -> None:
        self.changes += 1

    async def unload(self, digest: str) -> None:
        self.changes += 1


def test_engine_requests_grow_with_adapters_and_not_with_pairs() -> None:
    def asked(adapters: int) -> tuple[int, int]:
        reference = TableOracle(1, 6.0)
        engine = TableEngine(reference)
        folders = {str(number): Path(str(number)) for number in range(adapters)}
        names: dict[Digest, str] = {digest: f"model {digest}" for digest in (None, *folders)}
        result = check_isolation(
            lambda: nullcontext(engine),
            reference,
            folders,
            PROMPTS,
            context=engine.context_length,
            tolerance=0.25,
            names=names,
            reporter=LogReporter(),
            long=3,
        )
        assert result.verdict == "isolated"
        assert min(check.asked for check in result.checks) > adapters
        return engine.requests, engine.changes

    (few, fewer), (many, more) = asked(8), asked(64)
    assert more == 8 * fewer == 6 * 64
    # Each further prompt that it takes to tell one of more adapters from the others is asked of all.
    assert many <= 8 * few * 2
