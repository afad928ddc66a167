"""Suspects: planted errors are found, each with its reason, and no row vouches for its own twin."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from data_helpers import WORDS, Listener, Pair, unlike_pairs, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from review_helpers import reviewed_project

from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data.add import add
from tunewright.data.examples import class_like
from tunewright.data.review.label_models import NeighborIndex, Suspect
from tunewright.data.review.suspects import ACCURATE, AnswerLoss, SuspectList, cached_suspects, find_suspects
from tunewright.data.versions import DatasetVersion, load_version

TOPICS = {
    "card lost": ["lost", "card", "stolen", "block", "wallet", "missing"],
    "exchange rate": ["rate", "exchange", "euro", "dollar", "currency", "convert"],
    "top up": ["top", "account", "add", "money", "deposit", "balance"],
    "close account": ["close", "delete", "leave", "goodbye", "terminate", "end"],
}


def _question(draw: random.Random, topic: str) -> str:
    words = draw.choices(TOPICS[topic], k=5) + draw.choices(["please", "how", "today", "my", "the", "quickly"], k=3)
    draw.shuffle(words)
    return " ".join(words)


def _topical(count: int, wrong: int, seed: int = 0) -> tuple[list[Pair], set[str]]:
    """Questions with their topic, and the inputs of those whose topic is another's."""
    draw = random.Random(seed)
    questions: dict[str, str] = {}
    while len(questions) < count:
        topic = draw.choice(sorted(TOPICS))
        questions[_question(draw, topic)] = topic
    bad = set(draw.sample(sorted(questions), wrong))
    others = {topic: [t for t in TOPICS if t != topic] for topic in TOPICS}
    return [(q, draw.choice(others[t]) if q in bad else t) for q, t in questions.items()], bad


def _version(root: Path, pairs: list[Pair]) -> DatasetVersion:
    return load_version(reviewed_project(root, pairs=pairs).dataset)


def _inputs(version: DatasetVersion, found: list[Suspect]) -> list[str]:
    by_key = {m.key: m.example.input_text for m in version.members}
    return [by_key[s.key] for s in found]


def test_suspects_ranks_wrong_classes_first_with_suggestions(tmp_path: Path) -> None:
    pairs, bad = _topical(400, 20)
    version = _version(tmp_path / "p", pairs)
    listener = Listener()
    whole = find_suspects(version, listener)
    assert whole.accuracy is not None and whole.accuracy > 0.9
    found = whole.suspects
    bad &= {m.example.input_text for m in version.members}
    assert len(found) == round(0.1 * len(version.members))
    assert len(bad & set(_inputs(version, found))) >= 0.9 * len(bad)
    labels = [s for s in found if s.reason == "label"]
    assert [s.score for s in labels] == sorted((s.score for s in labels), reverse=True)
    right = dict(pairs)
    first = next(s for s in labels if _inputs(version, [s])[0] in bad)
    assert "other rows suggest" in first.detail
    assert f'rather than "{right[_inputs(version, [first])[0]]}"' in first.detail
    done, total = listener.steps["judging answers by other rows"]
    assert done == total > 0


def test_suspects_finds_several_wrong_rows_of_one_cluster(tmp_path: Path) -> None:
    """A model that had seen one of them would believe the others: folds go by cluster."""
    odd = ("qqqq xxxx", "xxxx zzzz", "zzzz qqqq", "xxxx wwww", "wwww qqqq")
    twins = [f"lost card number {words}" for words in odd]
    version = _version(tmp_path / "p", [*_topical(300, 0)[0], *((t, "top up") for t in twins)])
    assert len({m.cluster for m in version.members if m.example.input_text in twins}) == len(twins)
    joined = [replace(m, cluster="one" if m.example.input_text in twins else m.cluster) for m in version.members]

    def scores(of: DatasetVersion) -> list[float]:
        keys = {m.key for m in of.members if m.example.input_text in twins}
        return [s.score for s in find_suspects(of, Listener(), share=1).suspects if s.key in keys]

    apart, together = scores(version), scores(replace(version, members=tuple(joined)))
    assert min(together) > 0.8
    assert max(apart) < min(together)


def _unaccepted(version: DatasetVersion) -> DatasetVersion:
    """The version as an earlier release would have recorded it."""
    settings = version.manifest.settings.model_copy(update={"conflicts": None})
    return replace(version, manifest=version.manifest.model_copy(update={"settings": settings}))


def test_suspects_ranks_conflicts_first_with_the_other_row(tmp_path: Path) -> None:
    pairs, _ = _topical(200, 0)
    other = next(t for t in TOPICS if t != pairs[0][1])
    version = _unaccepted(_version(tmp_path / "p", [*pairs, (pairs[0][0], other)]))
    found = find_suspects(version, Listener()).suspects
    assert [s.reason for s in found[:2]] == ["conflict", "conflict"]
    assert set(_inputs(version, found[:2])) == {pairs[0][0]}
    assert found[1].key[:12] in found[0].detail
    assert all(s.reason != "conflict" for s in found[2:])
    assert len({s.key for s in found}) == len(found)


def test_suspects_excludes_accepted_conflicts(tmp_path: Path) -> None:
    pairs, _ = _topical(200, 0)
    other = next(t for t in TOPICS if t != pairs[0][1])
    version = _version(tmp_path / "p", [*pairs, (pairs[0][0], other)])
    assert version.manifest.settings.conflicts == "accept"
    found = find_suspects(version, Listener()).suspects
    assert {s.reason for s in found} == {"label"}
    assert found == find_suspects(version, Listener()).suspects, "it is deterministic"


def test_accepted_conflicts_are_recorded_in_later_versions(tmp_path: Path) -> None:
    project = reviewed_project(tmp_path / "p", pairs=unlike_pairs(40))
    strict = project.config.model_copy(update={"data": project.config.data.model_copy(update={"conflicts": "error"})})
    more = write_jsonl(project.root / "more.jsonl", unlike_pairs(20, seed=9))
    add(ProjectFolder(project.root, strict), [more], Listener())
    assert load_version(project.dataset).manifest.settings.conflicts == "accept"


@pytest.mark.parametrize("recorded", ["accept", None])
def test_suspects_ranks_references_of_one_input_by_loss(tmp_path: Path, recorded: str | None) -> None:
    pairs = [(question, f"{answer} {n}") for question, answer in unlike_pairs(40) for n in range(3)]
    version = _version(tmp_path / "p", pairs)
    version = version if recorded else _unaccepted(version)
    losses = {m.key: AnswerLoss(5, 5 - number / 10) for number, m in enumerate(version.members)}
    found = find_suspects(version, Listener(), losses=losses).suspects
    assert [s.key for s in found] == [m.key for m in version.members[::-1][:12]]
    assert find_suspects(version, Listener()).suspects == []


def _many_labels(wrong: int) -> tuple[list[Pair], set[str]]:
    """Four questions for each of 210 labels, too many for a model; the inputs of those that have another's label."""
    draw = random.Random(3)
    words = [f"{a}{b}" for a in WORDS for b in WORDS]
    about = {f"label {n}": draw.sample(words, 4) for n in range(210)}
    pairs = [
        (" ".join([*draw.sample(topic, 3), f"{draw.getrandbits(32):x}"]), label)
        for label, topic in about.items()
        for _ in range(4)
    ]
    bad = draw.sample(range(len(pairs)), wrong)
    labels = {i: pairs[bad[(n + 1) % wrong]][1] for n, i in enumerate(bad)} if wrong else {}
    return [(q, labels.get(i, label)) for i, (q, label) in enumerate(pairs)], {pairs[i][0] for i in bad}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[DatasetVersion, set[str]]:
    """Rows of 210 labels, 60 of them wrong, and the inputs of these."""
    pairs, bad = _many_labels(60)
    return _version(tmp_path_factory.mktemp("many") / "p", pairs), bad


def test_suspects_ranks_repeated_answers_by_their_other_rows(many: tuple[DatasetVersion, set[str]]) -> None:
    version, bad = many
    assert not class_like([m.example.output for m in version.members])
    found = find_suspects(version, Listener()).suspects
    assert {s.reason for s in found} == {"label"}
    assert len(set(_inputs(version, found[:60])) & bad) >= 54
    assert all(0 <= s.score <= 1 for s in found)


def test_suspects_ignores_rows_of_the_same_cluster(tmp_path: Path) -> None:
    pairs, _ = _many_labels(0)
    words = pairs[0][0].split()[:3]
    twins = [(f"{words[i]} {words[(i + 1) % 3]} {words[(i + 2) % 3]} {n}", "label 209") for i, n in enumerate("xyz")]
    version = _version(tmp_path / "p", [*pairs, *twins])
    inputs = {question for question, _ in twins}
    members = [m if m.example.input_text not in inputs else replace(m, cluster="one") for m in version.members]
    assert sum(m.cluster == "one" for m in members) == 3
    found = find_suspects(replace(version, members=tuple(members)), Listener()).suspects
    assert set(_inputs(version, found[:3])) == inputs


def test_suspects_judges_repeated_answers_when_the_split_is_by_output_template(
    many: tuple[DatasetVersion, set[str]],
) -> None:
    version, bad = many
    settings = version.manifest.settings.model_copy(update={"split_by": "output_template"})
    by_template = replace(
        version,
        manifest=version.manifest.model_copy(update={"settings": settings}),
        members=tuple(replace(m, cluster=m.example.output) for m in version.members),
    )
    found = find_suspects(by_template, Listener()).suspects
    assert len(set(_inputs(version, found[:60])) & bad) >= 54


def test_suspects_ranks_free_text_and_labels_together(tmp_path: Path) -> None:
    pairs, _ = _many_labels(20)
    version = _version(tmp_path / "p", [*pairs, *unlike_pairs(100, seed=5)])
    losses = {m.key: AnswerLoss(n, 0) for n, m in enumerate(version.members)}
    found = find_suspects(version, Listener(), losses=losses).suspects
    assert {s.reason for s in found[:6]} == {"label", "loss"}
    reported = Listener()
    find_suspects(version, reported)
    assert any("100 of 940 rows cannot be judged" in said for said in reported.said)


def _rare_topics(wrong: int) -> tuple[list[Pair], set[str]]:
    """Six questions for each of 80 labels, few to learn from; the inputs of those that have another label."""
    draw = random.Random(4)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(400)]
    about = {f"label {n}": draw.sample(words, 10) for n in range(80)}
    pairs = [
        (" ".join([*draw.sample(topic, 3), *draw.choices(words, k=6)]), label)
        for label, topic in about.items()
        for _ in range(6)
    ]
    bad = set(draw.sample(range(len(pairs)), wrong))
    labelled = [
        (q, draw.choice(sorted({*about} - {label})) if i in bad else label) for i, (q, label) in enumerate(pairs)
    ]
    return labelled, {pairs[i][0] for i in bad}


def test_find_suspects_ranks_by_centroids_when_the_out_of_fold_model_is_inaccurate(tmp_path: Path) -> None:
    pairs, bad = _rare_topics(20)
    version = _version(tmp_path / "p", pairs)
    assert class_like([pair[1] for pair in pairs])
    listener = Listener()
    found = find_suspects(version, listener)
    assert found.accuracy is not None
    assert found.accuracy < ACCURATE
    assert any(f"the answers of {found.accuracy:.0%} of the rows, too few" in warned for warned in listener.warned)
    assert len(bad & set(_inputs(version, found.suspects))) >= 0.6 * len(bad)


def test_cached_suspects_returns_the_list_and_messages_of_the_first_call(tmp_path: Path) -> None:
    def find(reporter: Reporter) -> SuspectList:
        reporter.warn("3 rows cannot be judged")
        reporter.say("looked")
        return SuspectList([Suspect("ab", 0.5, "label", "why")], accuracy=0.4)

    file, listener = tmp_path / "kept" / "x.json", Listener()
    first = cached_suspects(file, find, Listener())
    again = cached_suspects(file, lambda _: pytest.fail("found again"), listener)
    assert again == first
    assert listener.warned == ["3 rows cannot be judged"]
    assert str(file) in listener.said[0]


def test_suspects_ranks_near_duplicates_of_another_class_second(tmp_path: Path) -> None:
    pairs, _ = _topical(300, 0)
    question = "the lost card was stolen with my wallet so block the missing card"
    near = [(question, "card lost"), (question + "s", "exchange rate")]
    version = _version(tmp_path / "p", [*pairs, *near])
    found = [s for s in find_suspects(version, Listener()).suspects if s.reason == "near-duplicate"]
    assert _inputs(version, found)[:1] == [question + "s"]
    assert '"card lost"' in found[0].detail
    assert set(_inputs(version, found)) >= {question}


def test_suspects_ranks_free_text_by_known_losses(tmp_path: Path) -> None:
    version = _version(tmp_path / "p", unlike_pairs(60))
    losses = {m.key: AnswerLoss(number / 10, 1) for number, m in enumerate(version.members[:50])}
    listener = Listener()
    found = find_suspects(version, listener, losses=losses).suspects
    assert [s.key for s in found] == [m.key for m in version.members[49:43:-1]]
    assert "loss 4.90 per token of the answer, 1.00 without its input" in found[0].detail
    assert any("10 of 60 rows are not ranked" in warned for warned in listener.warned)
    with pytest.raises(UserError, match="The loss of row"):
        find_suspects(version, Listener(), losses={version.members[0].key: AnswerLoss(float("nan"), 0)})


def test_suspects_reports_a_class_without_independent_rows(tmp_path: Path) -> None:
    version = _version(tmp_path / "p", [*_topical(200, 0)[0], ("quite another thing entirely", "singular")])
    listener = Listener()
    found = find_suspects(version, listener, share=1).suspects
    assert any('"singular"' in warned for warned in listener.warned)
    assert "quite another thing entirely" not in _inputs(version, found)


def test_suspects_refuses_an_invalid_share(tmp_path: Path) -> None:
    version = _version(tmp_path / "p", unlike_pairs(30))
    for share in (0, -1, 1.5, float("nan")):
        with pytest.raises(UserError, match="share"):
            find_suspects(version, Listener(), share=share)


@given(st.integers(1, 400), st.integers(1, 2000))
def test_class_like_holds_up_to_200_answers_with_5_rows_each(classes: int, rows: int) -> None:
    outputs = [str(number % classes) for number in range(rows)]
    different = min(classes, rows)
    assert class_like(outputs) == (2 <= different <= 200 and rows >= 5 * different)


def test_neighbor_index_returns_the_most_similar_other_rows(tmp_path: Path) -> None:
    base = "please block the lost card that was stolen with the wallet"
    pairs = [*unlike_pairs(60), (base, "a"), (base + " today", "b"), (base.replace("lost", "gone"), "c")]
    version = _version(tmp_path / "p", pairs)
    row = next(m for m in version.members if m.example.input_text == base)
    near = NeighborIndex(version).of(row.key, 2)
    assert {m.example.output for _, m in near} == {"b", "c"}
    assert near[0][0] >= near[1][0]
    assert all(0 < similarity <= 1.0001 for similarity, _ in near)
