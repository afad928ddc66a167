"""The leak report against brute force, and scores by distance."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import pytest
from data_helpers import Listener, example, jaccard, unlike_pairs

import real_data
from tunewright.core.errors import UserError
from tunewright.data.dedup import comparison_texts
from tunewright.data.dedup.leakage import (
    LeakageReport,
    NearestTrainingRow,
    measure_leakage,
    nearest_training,
    score_by_distance,
    score_by_template,
)
from tunewright.data.dedup.output_leakage import measure_output_leakage
from tunewright.data.examples import Example
from tunewright.data.splits import Split
from tunewright.data.versions import Counts, DatasetVersion, Manifest, Member, Settings
from tunewright.evidence.schema import Item
from tunewright.evidence.statistics import wilson

NO_OUTPUTS = measure_output_leakage([])


def _version(rows: Sequence[tuple[Example, Split]]) -> DatasetVersion:
    members = sorted((Member(e, e.pair_key, split, e.pair_key) for e, split in rows), key=lambda m: m.key)
    zero = dict.fromkeys(Counts.model_fields, 0)
    manifest = Manifest(
        digest="d" * 64, parent=None, created="", message="", sources=(), counts=Counts(**zero), splits={},
        settings=Settings(dedup_threshold=0.8, val_size=0.1, test_size=0.1, seed=0),
    )  # fmt: skip
    return DatasetVersion(manifest, tuple(members))


def _mixed(count: int) -> list[tuple[Example, Split]]:
    """Rows of which many are edited copies of others, split without any care."""
    draw = random.Random(0)
    texts = [text for text, _ in unlike_pairs(count // 2)]
    texts += [t[: draw.randrange(20, len(t))] + " and more" * draw.randrange(3) for t in texts]
    splits: list[Split] = ["train", "train", "train", "train", "dev", "test"]
    return [(example(text, str(i)), draw.choice(splits)) for i, text in enumerate(texts)]


def test_measure_leakage_matches_brute_force() -> None:
    version = _version(_mixed(300))
    texts = dict(
        zip([m.key for m in version.members], comparison_texts([m.example for m in version.members]), strict=True)
    )
    report = measure_leakage(version, 0, Listener())
    train = [m.key for m in version.members if m.split == "train"]
    assert [row.key for row in report.nearest] == [m.key for m in version.members if m.split != "train"]
    for row in report.nearest:
        best = max(jaccard(texts[row.key], texts[key]) for key in train)
        assert row.similarity == pytest.approx(best)
        assert row.of in train
        assert jaccard(texts[row.key], texts[row.of]) == pytest.approx(best)
    tests = [row.similarity for row in report.nearest if row.split == "test"]
    for at in report.leaks:
        assert at.here == pytest.approx(sum(s >= at.threshold for s in tests) / len(tests))
    of_test = {row.key: row.similarity for row in report.nearest if row.split == "test"}
    assert nearest_training(version, Listener()) == of_test


def test_measure_leakage_estimates_random_leakage_of_paired_copies() -> None:
    """Every row has one copy, so a test row leaks where its copy is in training: with the share of training rows."""
    rows: list[tuple[Example, Split]] = []
    for i, (text, _) in enumerate(unlike_pairs(500)):
        split: Split = "test" if i < 50 else "dev" if i < 100 else "train"
        rows += [(example(text, "a"), split), (example(f"{text}.", "b"), split)]
    report = measure_leakage(_version(rows), 0, Listener())
    assert [at.here for at in report.leaks] == [0, 0, 0]
    for at in report.leaks:
        assert at.random == pytest.approx(0.8, abs=0.05)


def test_histogram_counts_every_measured_row() -> None:
    at = [0.0, 0.05, 0.1, 0.3, 0.7, 0.79, 0.9, 1.0]
    nearest = tuple(NearestTrainingRow(str(i), "test", None, s) for i, s in enumerate(at))
    report = LeakageReport("d", len(at), (*nearest, NearestTrainingRow("dev", "dev", None, 0.5)), (), NO_OUTPUTS)
    assert report.histogram("test") == [2, 1, 0, 1, 0, 0, 0, 2, 0, 2]
    assert report.histogram("dev") == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert json.loads(json.dumps(report.as_dict()))["histogram"]["dev"] == report.histogram("dev")


def test_measure_leakage_returns_no_nearest_row_without_overlap() -> None:
    rows: list[tuple[Example, Split]] = [(example("abcdefgh", "x"), "train"), (example("123456", "y"), "test")]
    (row,) = measure_leakage(_version(rows), 0, Listener()).nearest
    assert (row.of, row.similarity) == (None, 0)


def test_measure_leakage_warns_of_a_sample() -> None:
    listener = Listener()
    report = measure_leakage(_version(_mixed(300)), 0, listener, most=10)
    assert len(report.nearest) == 10
    assert listener.warned == [f"A sample of 10 of {report.held_out} held-out rows is compared with the training rows."]


@pytest.mark.slow
@pytest.mark.skipif(not (real_data.SHARED / "banking77").is_dir(), reason="BANKING77 is not next to this checkout")
def test_random_tenth_of_banking77_leaks_one_row_in_seven_at_0_7() -> None:
    rows = list({e.pair_key: e for e in real_data.banking77()}.values())
    draw = random.Random(0)
    draw.shuffle(rows)
    tenth = len(rows) // 10
    report = measure_leakage(
        _version([(e, "test" if i < tenth else "train") for i, e in enumerate(rows)]), 0, Listener()
    )
    at = report.leaks[0]
    assert 0.12 < at.random < 0.18
    assert at.here == pytest.approx(at.random, abs=0.03)


def test_score_by_distance_has_wilson_intervals() -> None:
    near = [0.1] * 40 + [0.75] * 60
    report = LeakageReport(
        "d", 100, tuple(NearestTrainingRow(str(i), "test", None, s) for i, s in enumerate(near)), (), NO_OUTPUTS
    )
    items = [
        Item(
            key=str(i),
            cluster="c",
            input="i",
            reference="r",
            answers={"tuned": " r" if i % 4 or i > 50 else "x"},
            scores={},
        )
        for i in range(100)
    ]
    far, close = score_by_distance(items, report)
    assert (far.arm, far.low, far.high, far.items, far.exact) == ("tuned", 0.0, 0.2, 40, 30)
    assert (close.low, close.high, close.items, close.exact) == (0.6, 0.8, 60, 57)
    for band in (far, close):
        expected = wilson(band.exact / band.items, band.items)
        assert band.interval == pytest.approx((expected.low, expected.high))
    assert far.as_dict()["exact_match"] == 0.75


def test_score_by_distance_covers_every_arm_and_refuses_unknown_items() -> None:
    report = LeakageReport("d", 1, (NearestTrainingRow("k", "test", None, 1.0),), (), NO_OUTPUTS)
    item = Item(key="k", cluster="c", input="i", reference="r", answers={"tuned": "r", "zero-shot": "s"}, scores={})
    assert [(s.arm, s.exact) for s in score_by_distance([item], report)] == [("tuned", 1), ("zero-shot", 0)]
    with pytest.raises(UserError, match="not among the measured rows"):
        score_by_distance([item.model_copy(update={"key": "other"})], report)
    with pytest.raises(UserError, match="not among the measured rows of version abcdef"):
        score_by_template([item], {"other": True}, "abcdef")


def test_score_by_template_separates_seen_and_new_templates() -> None:
    items = [
        Item(
            key=str(i), cluster="c", input="i", reference="r", answers={"a": "r" if i % 3 else "x", "b": "x"}, scores={}
        )
        for i in range(9)
    ]
    found = score_by_template(items, {str(i): i > 5 for i in range(9)}, "d")
    assert [(s.arm, s.template, s.items, s.exact) for s in found] == [
        ("a", "seen", 6, 4),
        ("a", "new", 3, 2),
        ("b", "seen", 6, 0),
        ("b", "new", 3, 0),
    ]
    expected = wilson(2 / 3, 3)
    assert found[1].interval == pytest.approx((expected.low, expected.high))
