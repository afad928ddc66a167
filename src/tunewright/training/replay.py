"""The base's own conversations as rows to train on: what is used, and what the adapter's lineage says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tunewright.adapters.registry import REPLAY
from tunewright.chat import ChatFormat, Tokens
from tunewright.data.examples import Example
from tunewright.data.neighbours.decontaminate import read_items
from tunewright.data.outsiders import unfit
from tunewright.data.versions import DatasetVersion, Member
from tunewright.disk import digest
from tunewright.models.bases import Base
from tunewright.progress import Reporter
from tunewright.project import Project
from tunewright.training.rows import encode_members, render_digest
from tunewright.training.self_samples import METHOD, Sampler, Screen


@dataclass(frozen=True)
class Replay:
    """Rows to train on besides the version's, and what is kept of them with the adapter; nothing without replay."""

    rows: list[Tokens]
    members: list[Member]
    """The example that each row is of."""
    lineage: dict[str, Any]
    files: dict[str, str]


def replay_inputs(project: Project) -> dict[str, Any]:
    """What decides the replayed rows beside version, base, template, seed and train section; empty without replay.

    Raises:
        UserError: a benchmark's file cannot be read.
    """
    if project.recipe.train.replay is None:
        return {}
    data = project.recipe.data
    screened = {"similarity": data.similarity, "allow": data.allow, "benchmarks": digest(_benchmarks(project))}
    return {"replay": {"method": METHOD, **screened}}


def draw_replay(
    project: Project,
    version: DatasetVersion,
    base: Base,
    chat: ChatFormat,
    load: Callable[[], Any],
    limit: int,
    reporter: Reporter,
) -> Replay:
    """The rows of the recipe's train.replay.

    Args:
        project: its recipe says how many; its working folder keeps what was drawn.
        version: the domain, which no row may be near to.
        base, chat: who writes.
        load: gives the loaded base; asked only if the samples are yet to be drawn.
        limit: the longest row in tokens.
        reporter: hears how many samples were drawn and used.

    Raises:
        UserError: nothing that the base writes is of use.
    """
    recipe = project.recipe
    if recipe.train.replay is None:
        return Replay([], [], {}, {})
    weights = {"dtype": recipe.train.dtype, "quantize": recipe.train.quantize}
    sampler = Sampler(base, chat, weights, load, recipe.seed, "replay", project.work, reporter)
    drawn = sampler.draw(recipe.train.replay.samples, outsiders(project, version, chat, limit, reporter), finished=True)
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


def outsiders(project: Project, version: DatasetVersion, chat: ChatFormat, limit: int, reporter: Reporter) -> Screen:
    """What keeps samples apart from the domain and from all that is measured, and rows whole.

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
            reasons |= unfit(fit, version.domain, project.recipe.data, benchmarks, reporter, "samples")
        return reasons

    return screen


def _member(example: Example) -> Member:
    return Member(example, example.pair_key, "train", example.pair_key, mixed=True)


def _benchmarks(project: Project) -> dict[str, list[str]]:
    return {name: read_items(project.root / name) for name in project.recipe.data.benchmarks}
