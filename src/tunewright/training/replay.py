"""The base's own conversations as rows to train on: what is used, and what the adapter's lineage says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tunewright.adapters.registry import REPLAY
from tunewright.chat import ChatFormat, Tokens
from tunewright.config.project import ProjectFolder
from tunewright.core.io import digest
from tunewright.core.progress import Reporter
from tunewright.data.dedup.decontaminate import read_items
from tunewright.data.examples import Example
from tunewright.data.mix import exclusion_reasons
from tunewright.data.versions import DatasetVersion, Member
from tunewright.engines.choice import AnswerEngine, answer_engine
from tunewright.engines.vllm.answers import VllmAnswers
from tunewright.generation.decoding import Completion, Request, generate
from tunewright.models.bases import Base
from tunewright.training import distributed
from tunewright.training.rows import encode_members, render_digest
from tunewright.training.self_samples import BATCH, METHOD, Sampler, Screen


@dataclass(frozen=True)
class Replay:
    """Rows to train on besides the version's, and what is kept of them with the adapter; nothing without replay."""

    rows: list[Tokens]
    members: list[Member]
    """The example that each row is of."""
    lineage: dict[str, Any]
    files: dict[str, str]


def replay_inputs(project: ProjectFolder) -> dict[str, Any]:
    """What decides the replayed rows beside version, base, template, seed and train section; empty without replay.

    Raises:
        UserError: a benchmark's file cannot be read, or vLLM is asked for and is not installed.
    """
    if project.config.train.replay is None:
        return {}
    data = project.config.data
    screened = {
        "dedup_threshold": data.dedup_threshold,
        "allow": data.allow,
        "benchmarks": digest(_benchmarks(project)),
    }
    return {"replay": {"method": METHOD, **screened, **_engine(project).identity}}


def _engine(project: ProjectFolder) -> AnswerEngine:
    """Return what lets the base write: the engine of evaluation, where it can hold the base as training does."""
    config = project.config
    if distributed.count() > 1:
        return AnswerEngine("peft", "several processes train together, each on a card of its own")
    if config.train.quantization == "nf4":
        return AnswerEngine("peft", "the base is held in NF4")
    return answer_engine(config, config.train.quantization)


def draw_replay(
    project: ProjectFolder,
    version: DatasetVersion,
    base: Base,
    chat: ChatFormat,
    load: Callable[[], Any],
    limit: int,
    reporter: Reporter,
) -> Replay:
    """Return the rows of the config's train.replay.

    Args:
        project: its config says how many; its working folder keeps what was drawn.
        version: the domain, which no row may be near to.
        base, chat: who writes.
        load: gives the loaded base; called only if samples are missing and vLLM does not write them.
        limit: the longest row in tokens.
        reporter: hears how many samples were drawn and used.

    Raises:
        UserError: nothing that the base writes is of use.
    """
    config = project.config
    if config.train.replay is None:
        return Replay([], [], {}, {})
    screen = outsiders(project, version, chat, limit, reporter)
    sampler, stop = _sampler(project, base, chat, load, reporter)
    try:
        drawn = sampler.draw(config.train.replay.samples, screen, finished=True)
    finally:
        stop()
    reporter.say(f"Replay: {drawn.told()}.")
    encoded = encode_members(chat, [_member(sample.example) for sample in drawn.used], limit)
    rows = encoded.rows
    lineage = {
        **sampler.about,
        "samples": len(drawn.used),
        "digest": digest(drawn.text),
        "rendering": render_digest(rows),
        "rows": len(rows),
        "trained_tokens": sum(sum(row.loss_mask) for row in rows),
        "left_out": {str(number): reason for number, reason in drawn.left_out.items()},
    }
    return Replay(rows, encoded.members, {"replay": lineage}, {REPLAY: drawn.text})


def _sampler(
    project: ProjectFolder, base: Base, chat: ChatFormat, load: Callable[[], Any], reporter: Reporter
) -> tuple[Sampler, Callable[[], None]]:
    """Return a sampler, and what frees the memory of the engine that writes for it."""
    config, engine, loaded = project.config, _engine(project), cache(load)
    wanted = None if config.train.replay is None else config.train.replay.samples
    vllm: VllmAnswers | None = None
    if engine.environment is not None:
        size = config.evaluate.batch_size
        vllm = VllmAnswers(base, config.train.dtype, engine.environment, size, config.train.lora_r, reporter)

    def complete(
        requests: Sequence[Request], ends: frozenset[int], on_finished: Callable[[int, Completion], None]
    ) -> list[Completion]:
        if vllm is not None:
            return vllm.generate(requests, stop_ids=ends, on_finished=on_finished)
        pad = chat.tokenizer.pad_token_id
        return generate(loaded(), requests, stop_ids=ends, pad_id=pad, batch_size=BATCH, on_finished=on_finished)

    inputs = {"dtype": config.train.dtype, "quantization": config.train.quantization, **engine.identity}
    sampler = Sampler(base, chat, inputs, complete, config.seed, "replay", project.work, reporter, wanted)
    return sampler, (lambda: None) if vllm is None else vllm.stop


def outsiders(
    project: ProjectFolder, version: DatasetVersion, chat: ChatFormat, limit: int, reporter: Reporter
) -> Screen:
    """Return what keeps samples apart from the domain and from all that is measured, and rows whole.

    Raises:
        UserError: a benchmark's file cannot be read.
    """
    benchmarks = _benchmarks(project)

    def screen(examples: Mapping[str, Example]) -> dict[str, str]:
        reasons: dict[str, str] = {}
        for key, example in examples.items():
            encoded = encode_members(chat, [_member(example)], limit)
            if encoded.faults:
                reasons[key] = encoded.faults[0]
            elif encoded.too_long:
                reasons[key] = f"longer than {limit:,} tokens"
        fit = {key: example for key, example in examples.items() if key not in reasons}
        if fit:
            reasons |= exclusion_reasons(fit, version.domain, project.config.data, benchmarks, reporter, "samples")
        return reasons

    return screen


def _member(example: Example) -> Member:
    return Member(example, example.pair_key, "train", example.pair_key, mixed=True)


def _benchmarks(project: ProjectFolder) -> dict[str, list[str]]:
    return {name: read_items(project.root / name) for name in project.config.data.benchmarks}
