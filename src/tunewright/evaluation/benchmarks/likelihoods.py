"""Suites that are measured by likelihoods, with their controls: multiple choice, and the base's own conversations.

For its own conversations (see training/self_samples.py) the measure is the adapter's increase in loss on what the
base wrote: the negative log-likelihood of the answers, in nats per token. The samples are disjoint from replay's.
An adapter that answers like the base scores 0; the mean over such answers is the divergence between the two.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tunewright.adapters.registry import Adapter
from tunewright.chat import Tokens
from tunewright.config.evaluate import FileSuite
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.core.progress import Task
from tunewright.data.examples import Example, Message, normalised
from tunewright.data.versions import DatasetVersion
from tunewright.evaluation.benchmarks.bench import (
    CONTROL_ITEMS,
    Bench,
    Floats,
    above_chance,
    above_floor,
    derangement,
    draw,
    expected_text,
    file_identity,
    item_lines,
    items_that_fit,
    suite_of,
)
from tunewright.evaluation.generations import Generator
from tunewright.evaluation.losses import answer_losses, head_of, judged_batches, whole_model
from tunewright.evidence.benchmarks import Control, Suite
from tunewright.evidence.non_inferiority import items_needed, ratio_drop
from tunewright.models.families import decoder_layers
from tunewright.models.loading import context_length, text_settings
from tunewright.training.rows import trained_spans
from tunewright.training.self_samples import Drawn, Sampler, sample_filter


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question, its choices and the index of the right one."""

    text: str
    choices: tuple[str, ...]
    gold: int
    group: str | None = None
    """A passage or the like that the question shares with others; None if the file does not say."""

    @property
    def revealed(self) -> ChoiceQuestion:
        """The question after its right answer, for a control."""
        return replace(self, text=f"The right answer is: {self.choices[self.gold]}\n{self.text}")


def read_questions(path: Path) -> list[ChoiceQuestion]:
    """Load the questions of a JSONL file of objects with ``query``, ``choices`` and ``gold``.

    The format is from MosaicML's llm-foundry. A ``group`` marks questions that belong together.
    """
    questions = []
    for where, line in item_lines(path):
        try:
            row = json.loads(line)
            choices, group = tuple(map(str, row["choices"])), row.get("group")
            question = ChoiceQuestion(
                str(row["query"]), choices, int(row["gold"]), None if group is None else str(group)
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"Expected a question with query, choices and gold ({error})", where=where) from None
        if not 0 <= question.gold < len(question.choices) or not all(question.choices):
            raise UserError("gold must be the index of a choice, and no choice may be empty", where=where)
        questions.append(question)
    return questions


def likeliest(by_character: Sequence[float]) -> int:
    """Return the index of the likeliest choice, the first of equals."""
    return max(range(len(by_character)), key=by_character.__getitem__)


def likelihoods(model: Any, tokenizer: Any, questions: Sequence[ChoiceQuestion], task: Task) -> list[list[float]]:
    """Return each choice's log-likelihood after "…\nAnswer:" divided by its characters.

    Follows lm-eval's ``acc_norm``, without a chat template. The tokenizer decides whether BOS comes first.
    """
    rows = {
        (number, place): _row(tokenizer, question, choice)
        for number, question in enumerate(questions)
        for place, choice in enumerate(question.choices)
    }
    left = [len(question.choices) for question in questions]
    found = [[0.0] * len(question.choices) for question in questions]
    for part in answer_losses(model, rows, tokenizer.pad_token_id):
        for (number, place), loss in part.items():
            tokens = sum(rows[number, place].loss_mask)
            found[number][place] = -loss * tokens / len(questions[number].choices[place])
            left[number] -= 1
            task.advance(int(left[number] == 0))
    return found


def _row(tokenizer: Any, question: ChoiceQuestion, choice: str) -> Tokens:
    before = f"{question.text}\nAnswer:"
    whole: list[int] = tokenizer(f"{before} {choice}")["input_ids"]
    start = len(tokenizer(before)["input_ids"])
    assert 0 < start < len(whole)
    return Tokens(tuple(whole), tuple(place >= start for place in range(len(whole))))


_CHOICES = "choices-1"
_KEPT_AT_ONCE = 32  # questions
_TOLD_ITEMS = 50
_TOLD_AT_LEAST = 0.9


class ChoicesSuite:
    """A file of questions; an item scores 1 if the likeliest choice per character is right (acc_norm)."""

    def __init__(self, settings: FileSuite, root: Path, margin: float, seed: int) -> None:
        path = root / settings.file
        everything = read_questions(path)
        if len(everything) < 2:
            raise UserError(f"{len(everything)} questions are too few for a suite (at least 2)", where=str(path))
        self.name = Path(settings.file).stem
        self.questions = draw(everything, settings.limit, seed)
        self.margin = margin
        self.identity: dict[str, Any] = file_identity(_CHOICES, path, settings, margin)

    def expected(self) -> str:
        """Return a message on the number of items that the margin requires."""
        return expected_text(self.name, len(self.questions), self.margin)

    def measure(self, bench: Bench) -> Suite:
        """Measure the questions and the controls with the adapter off, then the questions with it on."""
        limit, tokenizer = context_length(bench.generator.base), bench.generator.chat.tokenizer

        def fits(question: ChoiceQuestion) -> bool:
            # The control that reveals the answer makes the longest rows.
            return all(len(_row(tokenizer, question.revealed, choice).ids) <= limit for choice in question.choices)

        long = f"questions are longer than the base's context of {limit:,} tokens"
        asked, left_out = items_that_fit(self.name, self.questions, fits, long, bench)
        if len(asked) < 2:
            raise UserError(f"No two questions fit the base's context of {limit:,} tokens", where=self.name)
        clusters = bench.clusters(self.name, [q.text for q in asked], [q.group for q in asked])
        base = self._scores(bench, asked, None, "adapter off")
        controls = self._controls(bench, asked, base, clusters)
        tuned = self._scores(bench, asked, bench.adapter, "adapter on")
        return suite_of(
            name=self.name,
            kind="choices",
            metric="acc_norm",
            base=base,
            tuned=tuned,
            clusters=clusters,
            margin=self.margin,
            controls=controls,
            seed=bench.seed,
            left_out=left_out,
        )

    def _controls(
        self, bench: Bench, asked: Sequence[ChoiceQuestion], base: Floats, clusters: Sequence[str]
    ) -> list[Control]:
        chance = float(np.mean([1 / len(q.choices) for q in asked]))
        some = asked[:CONTROL_ITEMS]
        others = [
            replace(q, text=some[other].text) for q, other in zip(some, derangement(len(some), bench.seed), strict=True)
        ]
        mixed_up = self._scores(bench, others, None, "questions dealt to other choices")
        scores = self._scores(bench, [q.revealed for q in some[:_TOLD_ITEMS]], None, "answers given")
        return [
            Control(
                name="the right answer given before the question",
                score=float(scores.mean()),
                items=len(scores),
                wanted=f"at least {_TOLD_AT_LEAST:.0%}",
                passed=bool(scores.mean() >= _TOLD_AT_LEAST),
            ),
            above_chance(base, clusters, chance, self.margin),
            above_floor(
                "choices under another question",
                base[: len(some)],
                mixed_up,
                clusters[: len(some)],
                self.margin,
                bench.seed,
            ),
        ]

    def _scores(self, bench: Bench, asked: Sequence[ChoiceQuestion], adapter: Adapter | None, what: str) -> Floats:
        """Return 1 where the likeliest choice is the right one, [items]; known results are not computed again."""
        kept = bench.kept(_CHOICES, adapter)
        names = [digest([q.text, list(q.choices)]) for q in asked]
        missing = list(dict(pair for pair in zip(names, asked, strict=True) if pair[0] not in kept.known).items())
        if missing:
            with (
                bench.reporter.task(f"{self.name}, {what}", len(missing), "questions") as task,
                bench.generator.answering(adapter) as model,
            ):
                for start in range(0, len(missing), _KEPT_AT_ONCE):
                    part = missing[start : start + _KEPT_AT_ONCE]
                    found = likelihoods(model, bench.generator.chat.tokenizer, [q for _, q in part], task)
                    kept.add(dict(zip([name for name, _ in part], found, strict=True)))
        right = [likeliest(kept.known[name]) == q.gold for name, q in zip(names, asked, strict=True)]
        return np.array(right, dtype=np.float64)


# The base's own conversations


_SAMPLES = "samples-1"
_CONTROL_SAMPLES = 8
_NOTHING = 1e-3  # nats per token, of the base against itself

Answering = Callable[[], AbstractContextManager[Any]]
Compared = list[float]
"""Per answer, in nats per token: loss under the first, loss under the second, divergence from first to second."""


class OwnSamples:
    """Held-out samples of a generator's base, none of which resembles the domain; the project's folder keeps them."""

    def __init__(self, project: ProjectFolder, version: DatasetVersion, generator: Generator, wanted: int) -> None:
        self.project = project
        self.version = version
        self.generator = generator
        self.wanted = wanted

    @cached_property
    def drawn(self) -> Drawn:
        """The held-out samples."""
        generator, config = self.generator, self.project.config
        sampler = Sampler(
            generator.base,
            generator.chat,
            generator.inputs,
            generator.write,
            config.seed,
            "held-out",
            self.project.work,
            generator.reporter,
            self.wanted,
        )
        limit = min(config.train.max_length, context_length(generator.base))
        screen = sample_filter(self.project, self.version, generator.chat, limit, generator.reporter)
        return sampler.draw(self.wanted, screen, finished=False)

    def unseen(self, adapter: Adapter) -> dict[str, Tokens]:
        """Return the samples' rows by pair key, without rows that this adapter was trained on."""
        seen = {normalised(Example.from_dicts(messages).input_text) for messages in adapter.replayed}
        return {key: row for key, (asked, row) in self._encoded.items() if asked not in seen}

    @cached_property
    def _encoded(self) -> dict[str, tuple[str, Tokens]]:
        """The prompt and the encoded row of each sample, by pair key."""
        chat = self.generator.chat
        probe = chat.encode([Message("user", "x"), Message("assistant", "x")])
        end = probe.ids[trained_spans(probe)[-1][1] - 1]
        rows = {}
        for sample in self.drawn.used:
            prompt = chat.prompt(sample.example.prompt)
            answer = (*sample.ids, end) if sample.stopped else sample.ids
            mask = (False,) * len(prompt) + (True,) * len(answer)
            rows[sample.example.pair_key] = (normalised(sample.instruction), Tokens((*prompt, *answer), mask))
        return rows


class SamplesSuite:
    """A suite of samples that the base wrote; the margin is in nats per token."""

    name = "the base's own samples"

    def __init__(self, wanted: int, margin: float | None) -> None:
        self.wanted = wanted
        self.margin = margin
        self.identity: dict[str, Any] = {"engine": _SAMPLES, "samples": wanted, "margin": margin}

    def expected(self) -> str:
        """Return a message: the variance of the samples is not known beforehand."""
        margin = "" if self.margin is None else f", against a margin of {self.margin:g} nats per token"
        return f"{self.name}: {self.wanted} of them{margin}."

    def measure(self, bench: Bench) -> Suite:
        """Measure the samples, drawn at first use, with the adapter off and on; and the controls."""
        rows = OwnSamples(bench.project, bench.version, bench.generator, self.wanted).unseen(bench.adapter)
        if len(rows) < 2:
            raise UserError(
                f"Too few samples that the adapter was not trained on: {len(rows)} (at least 2)",
                where="regressions.samples",
            )
        generator = bench.generator
        off, on = (lambda: generator.answering(None)), (lambda: generator.answering(bench.adapter))
        some = dict(list(rows.items())[:_CONTROL_SAMPLES])
        controls = self._controls(bench, off, some)
        compared = self._compared(bench, "adapter off and on", bench.adapter, (off, on), rows)
        return self._suite(rows, compared, controls, bench)

    def _controls(self, bench: Bench, off: Answering, some: Mapping[str, Tokens]) -> list[Control]:
        same = self._compared(bench, "the base against itself", None, (off, off), some)
        layers = int(text_settings(bench.generator.base).num_hidden_layers)

        @contextmanager
        def damaged() -> Iterator[Any]:
            with off() as model, without_layer(model, layers // 2):
                yield model

        hurt = self._compared(bench, f"the base without layer {layers // 2 + 1}", None, (off, damaged), some)
        drop = ratio_drop(_sums(some, hurt), bench.seed)
        least = self.margin or 0.0
        nothing = max(abs(each[2]) for each in same.values())
        return [
            Control(
                name="the base against itself",
                score=nothing,
                items=len(some),
                wanted=f"at most {_NOTHING:g} nats in any sample",
                passed=nothing <= _NOTHING,
            ),
            Control(
                name=f"the base without layer {layers // 2 + 1} of its {layers}",
                score=drop.value,
                items=len(some),
                wanted=f"worse by more than {least:g} nats, with 95% certainty",
                passed=drop.lower > least,
            ),
        ]

    def _compared(
        self,
        bench: Bench,
        what: str,
        adapter: Adapter | None,
        two: tuple[Answering, Answering],
        rows: Mapping[str, Tokens],
    ) -> dict[str, Compared]:
        """Compare two models on these rows, by pair key; known results are not computed again."""
        kept = bench.kept(f"{_SAMPLES}: {what}", adapter, template=bench.generator.chat.digest)
        missing = {key: row for key, row in rows.items() if key not in kept.known}
        if missing:
            with bench.reporter.task(f"{self.name}, {what}", len(missing), "samples") as task:
                for part in compare(*two, missing, bench.generator.chat.tokenizer.pad_token_id):
                    kept.add(part)
                    task.advance(len(part))
        return {key: kept.known[key] for key in rows}

    def _suite(
        self, rows: Mapping[str, Tokens], compared: Mapping[str, Compared], controls: list[Control], bench: Bench
    ) -> Suite:
        drop = ratio_drop(_sums(rows, compared), bench.seed)
        tokens = np.array([sum(row.loss_mask) for row in rows.values()], dtype=np.float64)
        # [samples, 3]: nats of each answer
        nats = np.array([compared[key] for key in rows]) * tokens[:, None]
        base, tuned, divergence = (nats.sum(axis=0) / tokens.sum()).tolist()
        spread = ratio_drop(np.column_stack([nats[:, 2], tokens]), bench.seed)
        needed = None
        if self.margin is not None:
            # As for shares, but n times the squared error of the mean replaces the share of changed items.
            error = (drop.interval.high - drop.interval.low) / (2 * 1.96)
            needed = max(items_needed(self.margin, len(rows) * error**2), 2)
        return Suite(
            name=self.name,
            kind="samples",
            unit="nats per token",
            metric="negative log-likelihood",
            items=len(rows),
            base=base,
            tuned=tuned,
            drop=drop.value,
            interval=drop.interval,
            limit=drop.limit,
            method=drop.method,
            margin=self.margin,
            changed=None,
            items_needed=needed,
            divergence=divergence,
            divergence_interval=spread.interval,
            controls=tuple(controls),
            result="can't tell" if self.margin is None else drop.against(self.margin),
        )


def _sums(rows: Mapping[str, Tokens], compared: Mapping[str, Compared]) -> Floats:
    """Return each sample's increase in nats and its tokens, [samples, 2]."""
    tokens = {key: sum(row.loss_mask) for key, row in rows.items()}
    return np.array([[(compared[key][1] - compared[key][0]) * n, n] for key, n in tokens.items()], dtype=np.float64)


def compare(
    first: Answering, second: Answering, rows: Mapping[str, Tokens], pad_id: int
) -> Iterator[dict[str, Compared]]:
    """Yield two models' losses on each row's last answer, and the divergence from one to the other over it.

    The divergence is computed over the whole vocabulary at each position. Both models see the same batches.
    """
    import torch
    from torch.nn.functional import kl_div

    for batch in judged_batches(rows, pad_id):
        states = []
        for answering in (first, second):
            # Entered after the model: adapters must not load in inference mode.
            with answering() as model, torch.inference_mode():
                states.append(batch.states(model))
        with torch.inference_mode():
            targets, (logits, step) = batch.targets.to(states[0].device), head_of(model)
            found: list[list[Any]] = [[], [], []]
            for one, other, target in zip(*(s.split(step) for s in states), targets.split(step), strict=True):
                log_p, log_q = logits(one).log_softmax(-1), logits(other).log_softmax(-1)
                found[0].append(-log_p.gather(1, target[:, None])[:, 0])
                found[1].append(-log_q.gather(1, target[:, None])[:, 0])
                found[2].append(kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
            means = [batch.means(torch.cat(values).cpu()) for values in found]
        yield {name: [each[name] for each in means] for name in batch.names}


@contextmanager
def without_layer(model: Any, number: int) -> Iterator[None]:
    """Make one decoder layer (from 0) pass its input through unchanged: damage that any base shows."""

    def let_through(_layer: Any, args: Any, kwargs: Any, output: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    hook = decoder_layers(whole_model(model))[number].register_forward_hook(let_through, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
