"""Replay: conversations that the base writes itself as training rows, and their record in the adapter's lineage."""

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
from tunewright.generation.generate import BatchSize, generate_halving
from tunewright.generation.requests import Completion, Request
from tunewright.models.bases import Base
from tunewright.training import distributed
from tunewright.training.rows import encode_members, render_digest
from tunewright.training.self_samples import BATCH, METHOD, Sampler, Screen


@dataclass(frozen=True)
class Replay:
    """Rows to train on in addition to the version's, and their record with the adapter; empty without replay."""

    rows: list[Tokens]
    members: list[Member]
    """The example of each row."""
    lineage: dict[str, Any]
    files: dict[str, str]


def replay_inputs(project: ProjectFolder) -> dict[str, Any]:
    """Return the inputs of the replayed rows, apart from version, base, template, seed and train section.

    It is empty without replay.

    Raises:
        UserError: a benchmark's file cannot be read, or vLLM is requested and not installed.
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
    """Return the engine that writes samples: that of evaluation, if it can hold the base as training does."""
    config = project.config
    if distributed.world_size() > 1:
        return AnswerEngine("peft", "several processes train together, each on its own GPU")
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
    """Draw the rows of the config's train.replay.

    Args:
        project: its config sets the number; its working folder keeps the samples.
        version: the domain, which no sample may be similar to.
        base, chat: write the samples.
        load: returns the loaded base; called only if samples are missing and vLLM does not write them.
        limit: the longest row in tokens.
        reporter: reports how many samples were drawn and used.

    Raises:
        UserError: none of the samples can be used.
    """
    config = project.config
    if config.train.replay is None:
        return Replay([], [], {}, {})
    screen = sample_filter(project, version, chat, limit, reporter)
    sampler, stop = _sampler(project, base, chat, load, reporter)
    try:
        drawn = sampler.draw(config.train.replay.samples, screen, finished=True)
    finally:
        stop()
    reporter.say(f"Replay: {drawn.summary()}.")
    examples = [sample.example for sample in drawn.used]
    encoded = encode_members(
        chat, [Member(each, each.pair_key, "train", each.pair_key, mixed=True) for each in examples], limit
    )
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
    """Return a sampler, and a function that frees the memory of the engine that writes for it."""
    config, engine, loaded = project.config, _engine(project), cache(load)
    wanted = None if config.train.replay is None else config.train.replay.samples
    size = BatchSize(BATCH)
    vllm: VllmAnswers | None = None
    if engine.environment is not None:
        rows = config.evaluate.batch_size
        vllm = VllmAnswers(base, config.train.dtype, engine.environment, rows, config.train.lora_r, reporter)

    def complete(
        requests: Sequence[Request], ends: frozenset[int], on_finished: Callable[[int, Completion], None]
    ) -> list[Completion]:
        if vllm is not None:
            return vllm.generate(requests, stop_ids=ends, on_finished=on_finished)
        pad = chat.tokenizer.pad_token_id
        model = loaded()
        return generate_halving(model, requests, size, reporter, stop_ids=ends, pad_id=pad, on_finished=on_finished)

    inputs = {"dtype": config.train.dtype, "quantization": config.train.quantization, **engine.identity}
    sampler = Sampler(base, chat, inputs, complete, config.seed, "replay", project.work, reporter, wanted)
    return sampler, (lambda: None) if vllm is None else vllm.stop


def sample_filter(
    project: ProjectFolder, version: DatasetVersion, chat: ChatFormat, limit: int, reporter: Reporter
) -> Screen:
    """Return a filter that rejects samples similar to the domain or to a benchmark, and rows that are too long or
    faulty.

    Raises:
        UserError: a benchmark's file cannot be read.
    """
    benchmarks = _benchmarks(project)

    def screen(examples: Mapping[str, Example]) -> dict[str, str]:
        reasons: dict[str, str] = {}
        for key, example in examples.items():
            member = Member(example, example.pair_key, "train", example.pair_key, mixed=True)
            encoded = encode_members(chat, [member], limit)
            if encoded.faults:
                reasons[key] = encoded.faults[0]
            elif encoded.too_long:
                reasons[key] = f"longer than {limit:,} tokens"
        fit = {key: example for key, example in examples.items() if key not in reasons}
        if fit:
            reasons |= exclusion_reasons(fit, version.domain, project.config.data, benchmarks, reporter, "samples")
        return reasons

    return screen


def _benchmarks(project: ProjectFolder) -> dict[str, list[str]]:
    return {name: read_items(project.root / name) for name in project.config.data.benchmarks}
