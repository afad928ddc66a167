"""Runs the serving check: an engine that is started for it alone answers the prompts that PEFT has answered."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache

from tunewright.adapters.registry import CONFIG, WEIGHTS, Adapter, adapter_digest
from tunewright.chat.answers import answer_text
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.interrupts import run_async
from tunewright.core.io import digest
from tunewright.core.progress import Task
from tunewright.data.versions import Member
from tunewright.engines.protocol import Engine, stream
from tunewright.export.distributions import TopTokens, distance
from tunewright.export.merge import write_merged
from tunewright.export.probe import Probe
from tunewright.export.weights import Weights, read_deltas, trained_dtype
from tunewright.generation.requests import Completion, Finish, Request, TokenLogprob
from tunewright.models.bases import Base
from tunewright.models.loading import load_model, with_adapters
from tunewright.models.memory.plan import gigabytes
from tunewright.serving.engines.start import EngineSpec, max_num_seqs, start_engine
from tunewright.serving.fidelity.figures import (
    LOST,
    NOISE,
    WRONG,
    ComparedAnswer,
    serving_figures,
    shortcomings,
    well_formed,
)
from tunewright.serving.fidelity.reference import ReferenceAnswer, comparable, cut, reference_answers
from tunewright.serving.isolation.checks import TOLERANCE
from tunewright.serving.isolation.runner import IsolationRunner
from tunewright.serving.tenants.release_record import ServedAs, ServingCheck, ServingFigures

LOGPROBS = 20
"""The likeliest tokens that an engine is asked for at each place: vLLM lists no more by default."""
VERSION = 1
"""The version of the check; a result of an earlier version does not count."""
_LORA_B = ".lora_B."


@dataclass(frozen=True)
class _Engine:
    """An engine's answer to one prompt."""

    completion: Completion
    """Its greedy answer."""
    listed: Mapping[int, TopTokens]
    """The reported distributions, by the number of the reference's answer tokens before them."""


@dataclass(frozen=True)
class ServingCheckRunner:
    """The check of one adapter on an engine in the server's configuration.

    Args:
        of: the engine, the base and its quantization, as for the isolation test.
        probe: the prompts, and the limits of answers; without members, no answer has a form to check.
    """

    of: IsolationRunner
    adapter: Adapter
    probe: Probe

    @cached_property
    def _precision(self) -> str:
        config = self.of.config
        return config.serve.gguf if self.of.engine == "llamacpp" else config.train.dtype

    @cached_property
    def _tolerance(self) -> float:
        return max(TOLERANCE[self._precision], TOLERANCE[self.of.config.train.dtype])

    @cached_property
    def subject(self) -> str:
        """The SHA-256 of everything the result depends on."""
        of, config = self.of, self.of.config
        return digest(
            {
                "check": VERSION,
                "base": of.base.digest,
                "chat": of.chat.digest,
                "quantization": of.quantization,
                "dtype": config.train.dtype,
                "adapter": self.adapter.digest,
                "engine": of.engine,
                "max_num_seqs": max_num_seqs(of.engine, config),
                "versions": of.versions,
                "device": of.device,
                "precision": self._precision,
                "limits": [NOISE, LOST, WRONG, self._tolerance],
                "prompts": [list(prompt) for prompt in self.probe.prompts],
                "max_new_tokens": self.probe.limit,
                "stop": self.probe.stop,
            }
        )

    def run(self) -> ServingCheck:
        """Have PEFT answer, then the engine; return the figures.

        PEFT's model and the engine are never in memory together.

        Raises:
            UserError: the engine is not installed, or cannot hold the base or the adapter.
            RequestFailedError, EngineStoppedError: the engine fails to answer.
        """
        began = monotonic()
        trained, base = self._reference()
        with tempfile.TemporaryDirectory(prefix="tunewright-check-") as temporary:
            identity = write_identity(self.adapter.folder, Path(temporary) / "identity")
            folders = {self.adapter.digest: self.adapter.folder, adapter_digest(identity): identity}
            with self._engine(self.of.base, self.of.quantization, folders) as engine:
                own, zero = self._ask(engine, {self.adapter.digest: trained, adapter_digest(identity): base})
            figures = [self._figures("adapter", trained, own), self._figures("identity", base, zero)]
            left_out = self._no_merge(Path(temporary))
            if left_out is None:
                merged = self._merged(Path(temporary) / "merged")
                with self._engine(merged, "none", {}) as engine:
                    (answers,) = self._ask(engine, {None: trained})
                figures.append(self._figures("merged", trained, answers))
        return ServingCheck(
            subject=self.subject,
            engine=self.of.engine,
            device=self.of.device,
            base=self.of.base.digest,
            adapter=self.adapter.digest,
            versions=self.of.versions,
            tolerance=self._tolerance,
            figures=tuple(figures),
            left_out=left_out,
            reasons=shortcomings(figures),
            checked=now(),
            seconds=round(monotonic() - began, 1),
        )

    def _reference(self) -> tuple[list[ReferenceAnswer], list[ReferenceAnswer]]:
        """Return the answers of the adapter and of the base under PEFT."""
        of, probe = self.of, self.probe
        clear_device_cache(garbage_collection=True)
        model: Any = load_model(of.base, of.config.train.dtype, of.quantization)
        model = with_adapters(model, {self.adapter.name: self.adapter.folder})
        with of.reporter.task("The trained model's answers", 2 * len(probe.prompts), "answers") as task:
            trained = reference_answers(model, self.adapter.name, probe, of.chat, task.advance)
            base = reference_answers(model, None, probe, of.chat, task.advance)
        del model
        clear_device_cache(garbage_collection=True)
        return trained, base

    @contextmanager
    def _engine(self, base: Base, quantization: Any, folders: Mapping[str, Path]) -> Iterator[Engine]:
        of = self.of
        engine = start_engine(of.engine, of.config, EngineSpec(base, of.chat, quantization, folders), of.reporter)
        try:
            yield engine
        finally:
            engine.stop()

    def _ask(self, engine: Engine, references: Mapping[str | None, Sequence[ReferenceAnswer]]) -> list[list[_Engine]]:
        """Send all prompts for all models at once: their rows share batches, as tenants' do."""
        total = len(references) * len(self.probe.prompts)

        async def run() -> list[list[_Engine]]:
            with self.of.reporter.task(f"The answers of {engine.name}", total, "answers") as task:
                return await asyncio.gather(
                    *(
                        asyncio.gather(
                            *(
                                self._answer(engine, model, prompt, reference, task)
                                for prompt, reference in zip(self.probe.prompts, answers, strict=True)
                            )
                        )
                        for model, answers in references.items()
                    )
                )

        return run_async(run())

    async def _answer(
        self, engine: Engine, model: str | None, prompt: tuple[int, ...], reference: ReferenceAnswer, task: Task
    ) -> _Engine:
        """Ask for a greedy answer, and for the distributions after the reference's tokens.

        As long as the engine's answer follows the reference's, it has them. From the place where it leaves, the rest is
        asked for after the reference's own tokens.
        """
        wanted = reference.completion.ids
        request = Request(prompt, model, self.probe.limit, logprobs=LOGPROBS)
        completion, logprobs = await self._greedy(engine, request, self.probe.stop)
        listed = _listed(logprobs, _common(completion.ids, wanted), 0, reference.places)
        rest = [place for place in reference.places if place not in listed]
        while rest:
            start, count = rest[0], rest[-1] - rest[0] + 1
            request = Request((*prompt, *wanted[:start]), model, count, logprobs=LOGPROBS)
            again, logprobs = await self._greedy(engine, request, ())
            listed |= _listed(logprobs, _common(again.ids, wanted[start:]), start, rest)
            rest = [place for place in rest[1:] if place not in listed]
        task.advance()
        return _Engine(completion, listed)

    async def _greedy(
        self, engine: Engine, request: Request, stop: tuple[str, ...]
    ) -> tuple[Completion, list[TokenLogprob]]:
        """Return an answer, cut at a stop string, with what the engine reports of its tokens."""
        ids: list[int] = []
        logprobs: list[TokenLogprob] = []
        finish: Finish | None = None
        async with aclosing(stream(engine, request)) as deltas:
            async for delta in deltas:
                ids += delta.ids
                logprobs += delta.logprobs
                finish = delta.finish
        assert finish is not None
        return cut(ids, finish, stop, self.of.chat), logprobs

    def _figures(
        self, served: ServedAs, references: Sequence[ReferenceAnswer], answers: Sequence[_Engine]
    ) -> ServingFigures:
        members: Sequence[Member | None] = self.probe.members or [None] * len(answers)
        compared = [
            self._compared(str(number), member, reference, answer)
            for number, (member, reference, answer) in enumerate(zip(members, references, answers, strict=True))
        ]
        return serving_figures(served, compared, self._precision, self._tolerance, self.of.config.seed)

    def _compared(
        self, name: str, member: Member | None, reference: ReferenceAnswer, answer: _Engine
    ) -> ComparedAnswer:
        rows = [row for row, place in enumerate(reference.places) if place in answer.listed]
        listed = [answer.listed[reference.places[row]] for row in rows]
        divergences = distance(reference.log_probs[rows], listed).kl.tolist() if rows else []
        own, theirs = comparable(reference.completion), comparable(answer.completion)
        trained_form, form = (
            None if member is None else well_formed(member.example, self._text(completion, member))
            for completion in (reference.completion, answer.completion)
        )
        return ComparedAnswer(
            name if member is None else member.cluster,
            divergences,
            reference.effect[rows].tolist(),
            own == theirs,
            reference.greedy.shortfall(theirs),
            trained_form,
            form,
        )

    def _text(self, completion: Completion, member: Member) -> str:
        return answer_text(self.of.chat, completion, member.example.prompt)

    def _no_merge(self, temporary: Path) -> str | None:
        """Return why the merged model is not served; None if it is."""
        if self.of.engine == "llamacpp":
            return "llama.cpp would first have to convert the merged model"
        try:
            read_deltas(self.adapter.folder)
        except UserError as error:
            return error.what
        size = sum((self.of.base.folder / name).stat().st_size for name in self._weights.base.files)
        free = shutil.disk_usage(temporary).free
        if free < 1.1 * size:
            return f"it needs {gigabytes(size)} in {temporary.parent}, where {gigabytes(free)} are free"
        return None

    @cached_property
    def _weights(self) -> Weights:
        dequantized = self.of.quantization == "nf4"
        deltas = read_deltas(self.adapter.folder)
        return Weights(self.of.base, trained_dtype(self.adapter), deltas, dequantized=dequantized)

    def _merged(self, folder: Path) -> Base:
        """Write the merged model into a folder, and return it as a base."""
        folder.mkdir()
        of = self.of
        write_merged(folder, self._weights, of.base, of.chat, None, of.reporter)
        # The digest of a model that nothing refers to is not needed.
        return Base(f"{of.base.spec} merged with {self.adapter.name}", folder, None, of.base.architecture, {})


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of leading tokens that are equal."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _listed(logprobs: Sequence[TokenLogprob], common: int, start: int, places: Sequence[int]) -> dict[int, TopTokens]:
    """Return the distributions at those places whose tokens before them are the reference's.

    Args:
        logprobs: of the engine's tokens from place ``start`` on.
        common: the number of these tokens that are the reference's.
        start: the reference's tokens that were part of the prompt.
        places: the places that are needed.
    """
    found = {}
    for place in places:
        if start <= place <= start + common and place - start < len(logprobs):
            ids, values = zip(*logprobs[place - start].top, strict=True)
            found[place] = TopTokens(torch.tensor(ids), torch.tensor(values, dtype=torch.float64))
    return found


def write_identity(adapter: Path, folder: Path) -> Path:
    """Write an adapter of the same shape that changes nothing: LoRA's B is zero, as before training.

    Returns:
        Its folder.
    """
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    weights = load_file(adapter / WEIGHTS)
    zero = {name: torch.zeros_like(value) if _LORA_B in name else value for name, value in weights.items()}
    save_file(zero, folder / WEIGHTS, metadata={"format": "pt"})
    settings = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps(settings), encoding="utf-8")
    return folder
