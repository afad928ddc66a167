"""Near-equal inputs: the search against brute force, what is a duplicate, what shares a cluster; exact repeats."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from data_helpers import Listener, example, jaccard, new_project, unlike_pairs, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from making.property_examples import examples
from tunewright.config.project import ProjectFolder
from tunewright.core.progress import LogTask
from tunewright.data.add import AddResult, add
from tunewright.data.dedup import (
    Repeat,
    cluster_counts,
    comparison_texts,
    exact_repeats,
    find_clusters,
    find_clusters_and_duplicates,
    find_duplicates,
    largest_clusters,
    partition,
    similarity,
)
from tunewright.data.dedup.shingles import shingles
from tunewright.data.dedup.similarity import near_pairs
from tunewright.data.examples import Example, Message
from tunewright.data.review.edits import apply_edits
from tunewright.data.review.reviews import VerdictEvent, append_reviews
from tunewright.data.versions import load_version, version_folder

BANKING77 = Path(__file__).parents[2] / ".." / "shared" / "data" / "banking77" / "train.csv"

# Few letters and short words: many texts at every similarity, and many exactly at a threshold.
texts_like_each_other = st.lists(
    st.one_of(st.text("ab ", max_size=9), st.text("abcdef", min_size=10, max_size=14), st.just("abcdefgh")), max_size=14
)


def _found(texts: Sequence[str], threshold: float) -> dict[tuple[int, int], float]:
    found = {}
    for pairs in near_pairs(texts, threshold, lambda a, _: np.ones(len(a), dtype=bool), Listener(), "searching"):
        for first, second, value in zip(pairs.first, pairs.second, pairs.similarity, strict=True):
            assert (first, second) not in found
            found[int(first), int(second)] = float(value)
    return found


def _brute(texts: Sequence[str], threshold: float) -> dict[tuple[int, int], float]:
    grams = [shingles(text) for text in texts]
    out = {}
    for i, a in enumerate(grams):
        for j, b in enumerate(grams[:i]):
            shared = len(a & b)
            if shared / (len(a) + len(b) - shared) >= threshold:
                out[i, j] = shared / (len(a) + len(b) - shared)
    return out


Way = tuple[str, int]
WAYS: list[Way] = [(kind, pairs) for kind in ("_by_rare_shingles", "_by_parts") for pairs in (1, 1 << 14)]


@contextmanager
def _many_texts(way: Way | None) -> Iterator[None]:
    """Join few texts like many: by one kind of signatures, in blocks from a number of pairs of one signature."""
    if way is None:
        yield
        return
    kind, pairs = way
    signed = patch.object(partition.SizeClass, "_signed", getattr(partition.SizeClass, kind))
    with signed, patch.multiple(partition, _FEW=0, _GAIN=0, _MANY=pairs):
        yield


_NAMES = ("Ann Lee", "Ann Li", "Bob Marlow", "Bartholomew Featherstone", "Zoë", "Éva Nagy")
_TEMPLATES = (
    "what is the balance of account {number} held by {name} at the end of the month",
    "please transfer {number} euros to {name} before next friday",
    "has invoice {number} been paid by {name}",
)
templated_texts = st.lists(
    st.builds(
        lambda template, number, name: template.format(number=number, name=name),
        st.sampled_from(_TEMPLATES),
        st.integers(0, 99_999),
        st.sampled_from(_NAMES),
    ),
    max_size=40,
)


@examples(300)
@given(
    st.one_of(texts_like_each_other, st.lists(st.text(max_size=8), max_size=8), templated_texts),
    st.sampled_from([0.05, 0.2, 1 / 3, 0.5, 0.6, 2 / 3, 0.7, 0.75, 0.8, 0.9, 1.0]),
    st.sampled_from([None, *WAYS]),
)
def test_near_pairs_and_links_match_brute_force(texts: list[str], threshold: float, way: Way | None) -> None:
    expected = _brute(texts, threshold)
    with _many_texts(way):
        assert _found(texts, threshold) == pytest.approx(expected)
        assert similarity.link(texts, threshold, LogTask()).tolist() == _components(len(texts), expected)


def _components(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """The lowest number among all texts that each is linked with."""
    labels = list(range(count))
    for i, j in pairs:
        low, high = sorted((labels[i], labels[j]))
        labels = [low if label == high else label for label in labels]
    return labels


@given(
    st.one_of(texts_like_each_other, templated_texts),
    st.sampled_from([0.3, 0.6, 0.8]),
    st.integers(1, 3),
    st.integers(0, 10),
    st.sampled_from([1, 4, 128]),
    st.sampled_from([2, 6, 1000]),
    st.randoms(),
)
def test_find_duplicates_matches_a_loop_over_all_rows(
    inputs: list[str], threshold: float, outputs: int, kept: int, many: int, chained: int, draw: random.Random
) -> None:
    """Row by row, against the kept rows of the same output, with groups of rows on both sides of each limit."""
    rows = [example(text, f"output {draw.randrange(outputs)}") for text in inputs]
    near = _brute(comparison_texts(rows), threshold)
    expected: dict[int, tuple[int, float]] = {}
    for row in range(kept, len(rows)):
        alike = [
            (-near[row, other], other)
            for other in range(row)
            if (row, other) in near and other not in expected and rows[row].output == rows[other].output
        ]
        if alike:
            expected[row] = min(alike)[1], -min(alike)[0]
    with patch.multiple(similarity, _MANY_IN_GROUP=many, _CHAINED=chained, _BLOCK=3):
        found = find_duplicates(rows, kept, threshold, Listener())
        clustered = find_clusters_and_duplicates(rows, threshold, Listener())
        assert clustered == (
            find_clusters(rows, threshold, Listener()),
            find_duplicates(rows, 0, threshold, Listener()),
        )
    assert {row: (repeat.of, repeat.similarity) for row, repeat in found.items()} == expected


def test_shingles_distinguish_characters_of_all_scripts() -> None:
    """Return characters whose pairs are numbered by sorting, because there are too many for a table."""
    letters = [chr(c) for c in range(0x21, 0x1FFFF) if chr(c).isalpha()]
    texts = ["".join(letters[i : i + 4]) for i in range(0, len(letters), 4)]
    assert len(texts) > 10_000
    assert _found([*texts, texts[3]], 0.8) == {(len(texts), 3): 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_near_pairs_are_complete_for_long_texts_and_many_blocks(threshold: float) -> None:
    """Templates with slots and edited copies of long texts, as in real families."""
    draw = random.Random(0)
    texts = []
    for number in range(200):
        base = " ".join(text for text, _ in unlike_pairs(draw.choice([1, 1, 1, 12]), seed=number))
        texts.append(base)
        for _ in range(draw.randrange(3)):
            at = draw.randrange(len(base))
            texts.append(base[:at] + "edited" * draw.randrange(1, 4) + base[at + draw.randrange(9) :])
    draw.shuffle(texts)
    expected = _brute(texts, threshold)
    assert len(texts) > 350
    assert len(expected) > 50
    assert _found(texts, threshold) == expected
    for way in WAYS:
        with _many_texts(way):
            assert _found(texts, threshold) == expected


@pytest.mark.slow
@pytest.mark.skipif(not BANKING77.is_file(), reason="the BANKING77 files are not next to this checkout")
@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_near_pairs_are_complete_for_real_questions(threshold: float) -> None:
    with BANKING77.open(newline="", encoding="utf-8") as file:
        rows = [example(row["text"], row["category"]) for row in csv.DictReader(file)]
    texts = comparison_texts(rows[::8])
    expected = _brute(texts, threshold)
    assert _found(texts, threshold) == expected
    for way in WAYS:
        with _many_texts(way):
            assert _found(texts, threshold) == expected


@pytest.mark.slow
@pytest.mark.skipif(not BANKING77.is_file(), reason="the BANKING77 files are not next to this checkout")
def test_find_duplicates_and_clusters_do_not_depend_on_block_size() -> None:
    with BANKING77.open(newline="", encoding="utf-8") as file:
        rows = [example(row["text"], row["category"]) for row in csv.DictReader(file)]
    rows = list({row.pair_key: row for row in rows}.values())[:1500]
    dropped, clusters = find_duplicates(rows, 0, 0.75, Listener()), find_clusters(rows, 0.75, Listener())
    assert len(dropped) > 10
    for way in WAYS:
        with _many_texts(way):
            assert find_clusters(rows, 0.75, Listener()) == clusters
    for chained in (40, len(rows)):
        with patch.multiple(similarity, _MANY_IN_GROUP=1, _CHAINED=chained, _BLOCK=40):
            assert find_duplicates(rows, 0, 0.75, Listener()) == dropped


def _compared(*inputs: str) -> list[str]:
    return list(comparison_texts(example(text, f"x {i}") for i, text in enumerate(inputs)))


def test_comparison_texts_exclude_an_instruction_in_every_input() -> None:
    words = ["the fee for late payment", "how to close an account", "what a wire costs", "lost my card abroad"]
    assert _compared(*(f"Classify  this QUESTION:\n{w}\nAnswer with one label." for w in words)) == words


def test_comparison_texts_exclude_whole_words_only() -> None:
    assert _compared("court of appeal 12", "court of appeal 13") == ["12", "13"]
    assert _compared("same text", "Same  text") == ["same text", "same text"]
    assert _compared("pay", "pay now") == ["pay", "pay now"]
    assert _compared() == []


@given(st.lists(st.text(max_size=30), max_size=8))
def test_comparison_texts_are_equal_only_if_inputs_are(inputs: list[str]) -> None:
    """Leaving out what all share loses no difference (case, white space and Unicode form apart)."""
    rows = [example(text, "x") for text in inputs]
    texts = comparison_texts(rows)
    whole = [comparison_texts([row])[0] for row in rows]
    assert [a == b for a in texts for b in texts] == [a == b for a in whole for b in whole]


def test_find_duplicates_requires_equal_system_turns() -> None:
    rows = [example("Buy now, buy cheap", "yes", "Is this spam?"), example("Buy now, buy cheap", "yes", "English?")]
    assert find_duplicates(rows, 0, 0.8, Listener()) == {}
    assert len(set(find_clusters(rows, 0.8, Listener()))) == 1


def test_find_duplicates_compares_earlier_turns() -> None:
    def talk(first: str) -> Example:
        turns = [("user", first), ("assistant", "Yes?"), ("user", "How long?"), ("assistant", "Two days.")]
        return Example(tuple(Message(role, text) for role, text in turns))  # type: ignore[arg-type]

    rows = [talk("I lost my card in Lisbon"), talk("A wire to Denmark has not arrived")]
    assert find_duplicates(rows, 0, 0.8, Listener()) == {}


@given(texts_like_each_other, st.sampled_from([0.3, 0.5, 0.8]), st.randoms())
def test_find_clusters_are_the_connected_components_of_near_pairs(
    inputs: list[str], threshold: float, draw: random.Random
) -> None:
    rows = list({e.pair_key: e for e in (example(t, f"{i}") for i, t in enumerate(inputs))}.values())
    texts = comparison_texts(rows)
    names = [{i} for i in range(len(rows))]
    for i, j in _brute(texts, threshold):
        union = names[i] | names[j]
        for member in union:
            names[member] = union
    expected = [min(rows[i].pair_key for i in group) for group in names]
    assert find_clusters(rows, threshold, Listener()) == expected

    shuffled = list(zip(rows, expected, strict=True))
    draw.shuffle(shuffled)
    assert find_clusters([row for row, _ in shuffled], threshold, Listener()) == [name for _, name in shuffled]


def test_find_clusters_join_over_many_blocks() -> None:
    """Long chains in random order among rows of their own: no block sees more than a piece of a chain."""
    draw = random.Random(1)
    chains = []
    for _ in range(3):
        letters = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=2 * 300 + 60))
        chains.append([example(letters[i * 2 : i * 2 + 60], "x") for i in range(300)])
    chains += [[example(*pair)] for pair in unlike_pairs(300)]
    name = {row.pair_key: min(r.pair_key for r in chain) for chain in chains for row in chain}
    rows = [row for chain in chains for row in chain]
    draw.shuffle(rows)
    assert find_clusters(rows, 0.8, Listener()) == [name[row.pair_key] for row in rows]


def test_largest_clusters_are_sorted_with_two_dissimilar_rows() -> None:
    letters = "".join(random.Random(2).choices("abcdefghijklmnopqrstuvwxyz", k=200))
    chain = [example(letters[i * 4 : i * 4 + 60], "x") for i in range(30)]
    pair = [example("a card lost abroad on a Sunday", "x"), example("a card lost abroad on a Sunday!", "y")]
    rows = [*pair, *chain, *(example(*p) for p in unlike_pairs(20))]
    names = find_clusters(rows, 0.8, Listener())
    first, second = largest_clusters(rows, names, 5)
    assert (first.name, first.rows, first.similarity) == (names[2], 30, 0)
    assert {names[row] for row in first.ends} == {first.name}
    assert (second.rows, second.ends) == (2, (0, 1))
    assert second.similarity == pytest.approx(jaccard(*(row.input_text.casefold() for row in pair)))
    assert largest_clusters(rows, names, 1) == [first]
    assert largest_clusters([], [], 3) == []


def test_find_clusters_advances_progress_to_the_number_of_examples() -> None:
    listener = Listener()
    find_clusters([example(*pair) for pair in unlike_pairs(300)], 0.8, listener)
    assert listener.steps == {"clustering": (300, 300)}
    with _many_texts(WAYS[0]):
        find_clusters([example(*pair) for pair in unlike_pairs(300)], 0.8, listener)
    assert listener.steps == {"clustering": (300, 300)}


THIRTY_TWO = "patient is 32 weeks pregnant and has been bleeding since monday evening"
THIRTY_FOUR = THIRTY_TWO.replace("32", "34")


def _add(project: ProjectFolder, *pairs: tuple[str, str], name: str = "pairs.jsonl") -> tuple[AddResult, Listener]:
    listener = Listener()
    return add(project, [write_jsonl(project.root / name, pairs)], listener), listener


def test_near_duplicates_are_kept_in_one_cluster_and_counted(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    result, listener = _add(project, *unlike_pairs(20), (THIRTY_TWO, "urgent"), (THIRTY_FOUR, "urgent"))
    version = load_version(project.dataset)
    assert (result.added, result.duplicates, result.version.counts.near_duplicates) == (22, (), 1)
    pair = [m for m in version.members if m.example.output == "urgent"]
    assert len(pair) == 2
    assert len({m.cluster for m in pair}) == len({m.split for m in pair}) == 1
    assert cluster_counts(version, pair[0]) == (2, 2)
    [kept] = result.near_duplicates
    assert {kept.line, int(kept.of_place.rpartition(":")[2])} == {21, 22}
    assert any("1 near-duplicate kept" in said and "data.duplicates: drop" in said for said in listener.said)
    assert version.manifest.settings.duplicates == "keep"
    imports = version_folder(project.dataset, version.digest) / "imports.jsonl"
    records = [json.loads(line) for line in imports.read_text().splitlines()]
    assert [(r["fate"], r["near"]) for r in records if "near" in r] == [("added", kept.of)]


def test_near_duplicate_count_survives_a_change_to_drop(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    _add(project, *unlike_pairs(20), (THIRTY_TWO, "urgent"), (THIRTY_FOUR, "urgent"))
    (project.root / "tunewright.yaml").write_text("data: {duplicates: drop}\n")
    thirty_six = THIRTY_TWO.replace("32", "36")
    result, _ = _add(ProjectFolder(project.root), *unlike_pairs(5, seed=3), (thirty_six, "urgent"), name="more.jsonl")
    assert (result.version.counts.near_duplicates, len(result.duplicates)) == (1, 1)


def test_near_duplicate_from_an_edit_is_counted(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    result, _ = _add(project, *unlike_pairs(20), (THIRTY_TWO, "urgent"), (THIRTY_FOUR, "can wait"))
    assert result.version.counts.near_duplicates == 0
    row = next(m for m in load_version(project.dataset).members if m.example.output == "can wait")
    when = "2026-11-25T10:00:00+00:00"
    edit = VerdictEvent(key=row.key, verdict="edit", output="urgent", version="0" * 64, reviewer="ada", when=when)
    append_reviews(project.dataset, [edit])
    assert apply_edits(project, Listener()).version.counts.near_duplicates == 1


def test_exact_duplicates_ignore_case_and_white_space_of_inputs() -> None:
    rows = [
        example("Capital  of Australia", "Canberra"),
        example("capital of australia", "Canberra "),
        example("capital of australia", "canberra"),
        example("capital of australia", "Canberra", system="Answer in French."),
        example("capitals of australia", "Canberra"),
        example("aaaaa", "b"),
        example("aaaaaa", "b"),
    ]
    assert exact_repeats(rows, 0) == {1: Repeat(0, 1.0)}
    assert exact_repeats(rows, 2) == {}


@examples(50)
@given(st.lists(st.tuples(st.sampled_from(["a b", "A  b", "a c", "b"]), st.sampled_from(["x", " x", "y"]))))
def test_exact_repeats_are_complete_and_correct(pairs: list[tuple[str, str]]) -> None:
    rows = [example(text, output) for text, output in pairs]
    gone = exact_repeats(rows, 0)
    stay = [(" ".join(t.split()).casefold(), o.strip()) for i, (t, o) in enumerate(pairs) if i not in gone]
    assert len(stay) == len(set(stay))
    assert all(repeat.of < row and repeat.of not in gone for row, repeat in gone.items())
    assert all((" ".join(pairs[i][0].split()).casefold(), pairs[i][1].strip()) in stay for i in gone)
