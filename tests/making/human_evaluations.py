"""An evaluation on disk whose answers people can be asked about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from making.evidence import make_evidence, make_items
from tunewright.core.progress import LogReporter
from tunewright.evaluation.access_log import AccessLog
from tunewright.evaluation.human_eval.sample import treatment_is_a
from tunewright.evaluation.human_eval.session import BlindPair, BlindReview
from tunewright.evidence.files import EVIDENCE_FILE, ITEMS_FILE
from tunewright.evidence.incumbents import Incumbents
from tunewright.evidence.schema import Evidence, Item


def save(folder: Path, items: list[Item], evidence: Evidence | None = None) -> Path:
    """Write an evaluation's folder, and its line in the access log."""
    made = make_evidence(items) if evidence is None else evidence
    access_log = AccessLog(folder.parent)
    access_log.write(folder / EVIDENCE_FILE, made.model_dump_json())
    lines = "".join(f"{item.model_dump_json(exclude_none=True)}\n" for item in items)
    access_log.write(folder / ITEMS_FILE, lines)
    return folder


def evaluation(folder: Path, count: int = 120) -> Path:
    """Fixed, broken and both wrong items, and some with equal answers."""
    return save(folder, make_items(count, tuned=0.7, retrieved=0.3))


def evaluation_with_incumbent(folder: Path, count: int = 40) -> Path:
    """An evaluation whose incumbent *hosted* answers in words of its own, and not at all on the last item."""
    items = make_items(count, tuned=0.7, retrieved=0.3)
    evidence = make_evidence(items)
    items = [
        item.model_copy(update={"answers": {**item.answers, "incumbent-hosted": f"{item.reference} indeed {number}"}})
        for number, item in enumerate(items[:-1])
    ] + items[-1:]
    side: dict[str, Any] = {"latency": None, "cost_per_1000": None, "basis": "no prices"}
    side["missing"] = {"cost": "no prices", "latency": "not timed"}
    hosted = {
        "name": "hosted",
        "arm": "incumbent-hosted",
        "model": "m",
        "url": "http://127.0.0.1:9/v1",
        "file": "incumbents/hosted.jsonl",
        "file_digest": "0" * 64,
        "versions": {"m-1": count - 1},
        "first": "2026-11-01T00:00:00+00:00",
        "last": "2026-11-01T00:00:00+00:00",
        "gaps": {"timeout": 1},
        "truncated": 0,
        "prompt_tokens": 1,
        "completion_tokens": 1,
        "estimated": 0,
        "cost": None,
        "serving": side,
        "dev": None,
        "drop": {
            "value": 0.1,
            "interval": {"low": -0.1, "high": 0.3},
            "method": "t",
            "items": count - 1,
            "clusters": count // 2,
            "left_out": {},
            "margin": 0.02,
        },
    }
    tuned = {**side, "seconds_per_call": 0.1, "rows": 8, "training": None, "hour": None}
    found = Incumbents.model_validate({"tuned": tuned, "compared": [hosted]})
    arm = evidence.arms[0].model_copy(update={"name": "incumbent-hosted", "kind": "incumbent"})
    return save(folder, items, evidence.model_copy(update={"incumbents": found, "arms": [*evidence.arms, arm]}))


def begin(folder: Path, reviewer: str = "ada", items: int | None = None, *, against: str | None = None) -> BlindReview:
    """A reviewer's pass."""
    return BlindReview(folder, reviewer, LogReporter(), items=items, against=against)


def side_of_treatment(review: BlindReview, pair: BlindPair) -> str:
    """A or B: what the reviewer must not be able to tell."""
    return "A" if treatment_is_a(review.sample.seed, pair.key) else "B"
