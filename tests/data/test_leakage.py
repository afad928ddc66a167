"""Leakage of inputs, outputs and templates against brute force and simulated splits; scores by distance."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import WORDS, Listener, example, jaccard, new_project, unlike_pairs, write_jsonl

from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.add import AddResult, add
from tunewright.data.dedup import comparison_texts
from tunewright.data.dedup.leakage import (
    LeakageReport,
    NearestTrainingRow,
    measure_leakage,
    nearest_training,
    score_by_distance,
    score_by_template,
)
from tunewright.data.dedup.output_leakage import measure_output_leakage, near_overlap, new_templates
from tunewright.data.examples import Example, normalised, output_template
from tunewright.data.options import AddOptions
from tunewright.data.splits import Split
from tunewright.data.versions import Counts, DatasetVersion, Manifest, Member, Settings, load_version
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
    version = _version(_mixed(160))
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


@pytest.mark.parametrize(("groups", "copies", "training"), [(400, 2, 0.8), (100, 4, 0.1)])
def test_random_leakage_is_the_chance_that_a_copy_is_in_training(groups: int, copies: int, training: float) -> None:
    """A random split misses all copies of a test row with (1 - share of training rows) for each of them."""
    rows: list[tuple[Example, Split]] = []
    for i, (text, _) in enumerate(unlike_pairs(groups)):
        split: Split = "train" if i < training * groups else "test"
        rows += [(example(text + "." * copy, str(copy)), split) for copy in range(copies)]
    for at in measure_leakage(_version(rows), 0, Listener()).leaks:
        assert at.here == 0
        assert at.random == pytest.approx(1 - (1 - training) ** (copies - 1), abs=0.01)


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
    report = measure_leakage(_version(_mixed(100)), 0, listener, most=10)
    assert len(report.nearest) == 10
    assert listener.warned == [f"A sample of 10 of {report.held_out} held-out rows is compared with the training rows."]


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


Pairs = list[tuple[str, str]]


def _queries(count: int, templates: int, seed: int = 0, asked: int = 0) -> Pairs:
    """Unlike questions; outputs are queries of some templates (the first ones of a seed's) with drawn literals."""
    draw = random.Random(seed)
    forms = [" ".join(draw.choices(WORDS, k=6)) for _ in range(templates)]
    texts = [text for text, _ in unlike_pairs(count, asked)]
    return [(text, f'select {draw.choice(forms)} where a = "{draw.randrange(30)}"') for text in texts]


def _members(count: int, templates: int, seed: int = 0) -> list[Member]:
    draw = random.Random(seed)
    splits: list[Split] = ["train", "train", "train", "train", "train", "train", "dev", "test", "test"]
    rows = [example(*pair) for pair in _queries(count, templates, seed)]
    return [Member(row, row.pair_key, draw.choice(splits), row.pair_key) for row in rows]


def test_measure_output_leakage_matches_a_loop() -> None:
    members = _members(300, 60)
    found = measure_output_leakage(members)
    train = [m.example.output for m in members if m.split == "train"]
    test = [m.example.output for m in members if m.split == "test"]
    known = sum(any(normalised(a) == normalised(b) for b in train) for a in test)
    alike = sum(any(output_template(a) == output_template(b) for b in train) for a in test)
    assert found.share("identical") == pytest.approx(known / len(test))
    assert found.share("template") == pytest.approx(alike / len(test))
    assert (found.test, found.templates) == (len(test), len({output_template(m.example.output) for m in members}))
    assert 0 < known < alike


def test_measure_output_leakage_matches_simulated_splits() -> None:
    members = _members(200, 80)
    found = measure_output_leakage(members)
    sizes = Counter(m.split for m in members)
    rng = np.random.default_rng(0)
    templates = [output_template(m.example.output) for m in members]
    shares = []
    for _ in range(400):
        order = rng.permutation(len(members)).tolist()
        test, train = order[: sizes["test"]], order[len(order) - sizes["train"] :]
        known = {templates[i] for i in train}
        shares.append(np.mean([templates[i] in known for i in test]))
    chance = next(each.random for each in found.overlaps if each.how == "template")
    assert chance == pytest.approx(np.mean(shares), abs=0.01)


def test_near_overlap_matches_brute_force() -> None:
    members = _members(120, 30)
    outputs = [normalised(m.example.output) for m in members]
    listener = Listener()
    found = near_overlap(members, 0.8, 0, listener)
    near = [[jaccard(a, b) >= 0.8 for b in outputs] for a in outputs]
    train = [i for i, m in enumerate(members) if m.split == "train"]
    here = [any(near[i][j] for j in train) for i, m in enumerate(members) if m.split == "test"]
    assert found.here == pytest.approx(np.mean(here))
    assert 0 < found.here < 1
    rest = len(members) - 1
    chances = [
        1 - np.prod([(rest - k - i) / (rest - i) for i in range(len(train))]) for k in (sum(r) - 1 for r in near)
    ]
    assert found.random == pytest.approx(np.mean(chances))
    assert all(done == total for done, total in listener.steps.values())


def test_near_overlap_of_a_sample_is_close_to_the_full_value() -> None:
    members = _members(3_000, 1_500)
    found = near_overlap(members, 0.8, 0, Listener())
    assert found.here == pytest.approx(measure_output_leakage(members).share("template"), abs=0.08)


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        (["cancel my order", "what is the weather"] * 100, "outputs are labels"),
        ([f"{i} EUR" for i in range(300)], "most outputs have fewer than 5 words"),
        (
            [f'{{"name": "{i}", "city": "{i * 7}", "street": "{i}"}}' for i in range(300)],
            "most outputs have one of few templates",
        ),
    ],
)
def test_measure_output_leakage_recognises_natural_overlap(outputs: list[str], reason: str) -> None:
    splits: list[Split] = ["train", "train", "dev", "test"]
    rows = [example(text, output) for (text, _), output in zip(unlike_pairs(len(outputs)), outputs, strict=True)]
    members = [Member(row, row.pair_key, splits[i % 4], row.pair_key) for i, row in enumerate(rows)]
    found = measure_output_leakage(members)
    assert found.natural is not None
    assert found.natural.startswith(reason)
    assert not found.high
    assert new_templates(members) is None


def test_new_templates_are_those_without_a_training_row() -> None:
    members = _members(200, 80)
    found = new_templates(members)
    assert found is not None
    known = {output_template(m.example.output) for m in members if m.split == "train"}
    assert found == {m.key: output_template(m.example.output) not in known for m in members if m.split == "test"}
    assert len(set(found.values())) == 2


def _add(project: ProjectFolder, pairs: Pairs, listener: Listener | None = None, **options: Any) -> AddResult:
    return add(
        project, [write_jsonl(project.root / "pairs.jsonl", pairs)], listener or Listener(), AddOptions(**options)
    )


def test_add_warns_when_the_test_has_known_templates(tmp_path: Path) -> None:
    listener = Listener()
    result = _add(new_project(tmp_path / "p"), _queries(250, 30), listener)
    reported = [w for w in listener.warned if "output template" in w]
    assert len(reported) == 1
    assert reported[0].startswith(f"{result.outputs.share('template'):.0%} of the test rows")
    assert "data.split_by: output_template" in reported[0]
    assert "data.group_by" in reported[0]
    free = Listener()
    _add(new_project(tmp_path / "free"), [(a, b) for (a, _), (b, _) in pairwise(unlike_pairs(250))], free)
    assert not any("output template" in w for w in free.warned)


def _codes(count: int, codes: int) -> Pairs:
    """Unlike complaints, and a code with its name for each; masking merges no two of them."""
    names = [f"q{n} disorder of the {a} {b} {c}" for n, (a, b, c) in enumerate(product(WORDS, repeat=3))][:codes]
    return [(text, names[n % codes]) for n, (text, _) in enumerate(unlike_pairs(count))]


def test_add_advises_no_split_by_template_when_masking_merges_no_outputs(tmp_path: Path) -> None:
    listener = Listener()
    found = _add(new_project(tmp_path / "p"), _codes(620, 155), listener).outputs
    assert (found.outputs, found.templates, found.natural) == (155, 155, None)
    assert found.share("template") > 0.9
    assert not any("output_template" in w for w in listener.warned)
    assert new_templates(load_version(tmp_path / "p" / "dataset").members) is None


def test_add_keeps_the_split_by_input_when_answers_of_new_templates_cannot_be_composed(tmp_path: Path) -> None:
    rows = [(text, f"{output}, in force since {1990 + n // 150}") for n, (text, output) in enumerate(_codes(750, 150))]
    listener = Listener()
    found = _add(new_project(tmp_path / "p"), rows, listener).outputs
    assert (found.outputs, found.templates, found.ceiling) == (750, 150, 0.0)
    (warning,) = (w for w in listener.warned if "output template" in w)
    assert "Keep data.split_by: input" in warning
    assert "at most 0% consist" in warning


def test_ceiling_bounds_the_answers_that_a_split_by_template_can_compose(tmp_path: Path) -> None:
    """Against the split itself; a value of its own in each third form keeps some answers out of reach."""
    rows = [
        (text, f"{output} {output.split()[1]}{output.split()[2]}x" if n % 3 else output)
        for n, (text, output) in enumerate(_queries(900, 60))
    ]
    by_input, by_template = Listener(), Listener()
    found = _add(new_project(tmp_path / "p"), rows, by_input).outputs
    _add(new_project(tmp_path / "q", "data: {split_by: output_template}\n"), rows, by_template)
    members = load_version(tmp_path / "q" / "dataset").members
    trained = {word for m in members if m.split == "train" for word in m.example.output.split()}
    held_out = [m.example for m in members if m.split != "train"]
    composed = [set(e.output.split()) <= trained | set(e.input_text.split()) for e in held_out]
    assert found.ceiling is not None
    assert found.ceiling == pytest.approx(np.mean(composed), abs=0.1)
    assert any(f"at most {found.ceiling:.0%} consist" in w and "Set data.split_by" in w for w in by_input.warned)


def _templates_by_split(project: ProjectFolder) -> dict[str, set[str]]:
    members = load_version(project.dataset).members
    return {s: {output_template(m.example.output) for m in members if m.split == s} for s in ("train", "dev", "test")}


def test_split_by_output_template_keeps_templates_apart_in_later_versions_too(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p", "data: {split_by: output_template}\n")
    first = _add(project, _queries(300, 40))
    assert first.version.settings.split_by == "output_template"
    assert first.outputs.share("template") == 0
    before = {m.key: m.split for m in load_version(project.dataset).members}
    second = _add(project, [*_queries(300, 40), *_queries(200, 60, asked=1)])
    found = _templates_by_split(project)
    assert not found["train"] & found["test"]
    assert not found["train"] & found["dev"]
    assert not found["dev"] & found["test"]
    assert second.created
    now = {m.key: m.split for m in load_version(project.dataset).members}
    assert {key: now[key] for key in before} == before


def test_split_by_output_template_is_refused_when_templates_are_too_few(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p", "data: {split_by: output_template}\n")
    with pytest.raises(UserError, match="Too few independent rows to split") as refusal:
        _add(project, _queries(300, 5))
    assert "data.split_by: output_template joins rows" in str(refusal.value.fix)


def test_split_by_output_template_is_refused_when_a_version_was_split_by_input(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    _add(project, _queries(300, 40))
    (project.root / "tunewright.yaml").write_text("data: {split_by: output_template}\n")
    with pytest.raises(UserError, match="was split by input, and") as refusal:
        _add(ProjectFolder(project.root), _queries(300, 40))
    assert refusal.value.where == "data.split_by"
    assert "start a new dataset" in str(refusal.value.fix)
    assert "add the files again without --split-from" in str(refusal.value.fix)
    new = new_project(tmp_path / "new", "data: {split_by: output_template}\n")
    with pytest.raises(UserError, match=r"p was split by input, and \d+ of its 300 rows here") as refusal:
        _add(new, _queries(300, 40), split_from=project.root)
    assert refusal.value.where == "--split-from"
    assert not list(new.dataset.glob("versions/*"))
    # What the messages propose.
    version = _add(new, _queries(300, 40)).version
    assert version.settings.split_by == "output_template"
    again = new_project(tmp_path / "again", "data: {split_by: output_template, system_prompt: Be kind.}\n")
    inherited = _add(again, _queries(300, 40), split_from=new.root).version
    assert [inherited.counts.test, inherited.counts.dev] == [version.counts.test, version.counts.dev]
