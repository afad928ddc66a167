"""Adding files: nothing leaks, nothing is lost silently, row order decides nothing, adding again changes nothing."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from data_helpers import Listener, Pair, jaccard, new_project, unlike_pairs, write_jsonl, write_rows
from hypothesis import given
from hypothesis import strategies as st

from making.property_examples import examples
from tunewright.config import DataConfig
from tunewright.config.project import OpenFolder, ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.add import AddResult, add
from tunewright.data.dedup import comparison_texts
from tunewright.data.options import AddOptions
from tunewright.data.preview import check_files
from tunewright.data.versions import DatasetVersion, load_version

ACCEPT = "data: {conflicts: accept}\n"

few_examples = examples(20)


def _add(
    project: ProjectFolder, *pairs: Pair, listener: Listener | None = None, name: str = "pairs.jsonl"
) -> AddResult:
    return add(project, [write_jsonl(project.root / name, pairs)], listener or Listener())


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_add_counts_only_clusters_with_several_outputs_as_families(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p", "data: {conflicts: accept}\n")
    near = "a question of some length about the court of one county, number {}"
    other = "quite another request that has to do with the weather of town {}"
    pairs = [(near.format(1), "yes"), (near.format(2), "no"), (other.format(1), "same"), (other.format(2), "same")]
    pairs += [("the same question as ever", "yes"), ("the same question as ever", "no"), *unlike_pairs(30)]
    counts = add(project, [write_jsonl(project.root / "pairs.jsonl", pairs)], Listener()).version.counts
    assert (counts.families, counts.near_duplicates, counts.conflicts) == (1, 1, 1)
    assert counts.rows - counts.clusters == 3


def test_add_warns_of_test_rows_whose_answer_no_training_row_has(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    texts = [text for text, _ in unlike_pairs(100)]
    labelled = [(text, f"label {i % 6}" if i < 60 else f"rare {i}") for i, text in enumerate(texts)]
    listener = Listener()
    result = add(project, [write_jsonl(project.root / "pairs.jsonl", labelled)], listener)
    members = load_version(project.dataset).members
    trained = {m.example.output for m in members if m.split == "train"}
    absent = [m for m in members if m.split == "test" and m.example.output not in trained]
    tested = result.version.counts.test
    assert absent
    [warned] = [warned for warned in listener.warned if "no training row has" in warned]
    assert warned.startswith(f"{len(absent)} of {tested} test rows have an answer that no training row has")
    assert f"at most {1 - len(absent) / tested:.1%} on the test split" in warned
    assert f'"{absent[0].example.output}": 1' in warned


@pytest.mark.parametrize(
    ("metric", "common", "words"),
    [
        ("exact_match", 594, ["594 of 600 rows (99%)", '"ok"', "scores 99% by exact_match", "macro_f1"]),
        ("exact_match", 301, ["301 of 600 rows (50.1%)"]),
        ("exact_match", 300, None),
        ("macro_f1", 594, None),
        ("macro_f1", 600, ["600 of 600 rows (100%)", "nothing to learn"]),
        ("exact_match", 600, ["600 of 600 rows (100%)", "nothing to learn"]),
    ],
)
def test_add_and_check_name_an_answer_of_most_rows_with_its_share(
    tmp_path: Path, metric: str, common: int, words: list[str] | None
) -> None:
    folder = new_project(tmp_path / "p", f"evaluate: {{metric: {metric}}}\n")
    rows = [(text, "ok" if n < common else f"odd {n % 2}") for n, (text, _) in enumerate(unlike_pairs(600))]
    file, checked, added = write_jsonl(folder.root / "pairs.jsonl", rows), Listener(), Listener()
    check_files(OpenFolder(folder, checked), [file])
    add(folder, [file], added)
    for listener in (checked, added):
        said = [text for text in listener.warned if "have the answer" in text]
        assert len(said) == (words is not None)
        assert all(word in said[0] for word in words or ())


def test_add_proposes_no_macro_f1_for_more_answers_than_it_takes(tmp_path: Path) -> None:
    rows = [(text, "ok" if n < 206 else f"odd {n}") for n, (text, _) in enumerate(unlike_pairs(410))]
    listener = Listener()
    add(new_project(tmp_path / "p"), [write_jsonl(tmp_path / "pairs.jsonl", rows)], listener)
    (said,) = (text for text in listener.warned if "have the answer" in text)
    assert "macro_f1" not in said


def _families(count: int, seed: int) -> list[Pair]:
    """Unlike inputs, each with some near-equal ones: same output (duplicates) or another one (a family)."""
    draw = random.Random(seed)
    pairs: list[Pair] = []
    for text, answer in unlike_pairs(count, seed):
        pairs.append((text, answer))
        for _ in range(draw.choice([0, 0, 1, 4])):
            at = draw.randrange(len(text))
            pairs.append((text[:at] + draw.choice("xyz") + text[at + 1 :], draw.choice([answer, "another"])))
    return pairs


def _assert_no_leak(version: DatasetVersion, threshold: float = 0.8) -> None:
    members = version.members
    texts = comparison_texts([m.example for m in members])
    for i, a in enumerate(members):
        for j, b in enumerate(members[:i]):
            if a.split != b.split or a.cluster != b.cluster:
                assert jaccard(texts[i], texts[j]) < threshold, (a, b)


@few_examples
@given(seed=st.integers(0, 10_000), similarity=st.sampled_from([0.5, 0.8]))
def test_add_keeps_near_equal_inputs_in_one_split(
    tmp_path_factory: pytest.TempPathFactory, seed: int, similarity: float
) -> None:
    """In the first version and in those made of it, where new rows bridge old clusters."""
    project = new_project(
        tmp_path_factory.mktemp("leak") / "p", f"data: {{dedup_threshold: {similarity}, conflicts: accept}}\n"
    )
    pairs = _families(40, seed)
    random.Random(seed).shuffle(pairs)
    held_out: set[str] = set()
    for start in range(0, len(pairs), 40):
        _add(project, *pairs[: start + 40])
        version = load_version(project.dataset)
        _assert_no_leak(version, similarity)
        test = {m.key for m in version.examples("test")}
        assert held_out <= test
        held_out = test


@few_examples
@given(seed=st.integers(0, 10_000))
def test_add_ignores_the_order_of_rows_and_files(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    folder = tmp_path_factory.mktemp("order")
    pairs = _families(25, seed)
    pairs += random.Random(seed).choices(pairs, k=5)
    one = _add(new_project(folder / "one", ACCEPT), *pairs)
    random.Random(seed).shuffle(pairs)
    many = new_project(folder / "many", ACCEPT)
    cuts = [0, 3, len(pairs) // 2, len(pairs)]
    files = [write_jsonl(folder / f"{a}.jsonl", pairs[a:b]) for a, b in itertools.pairwise(cuts)]
    other = add(many, files, Listener())
    assert other.version.digest == one.version.digest
    assert other.version.splits == one.version.splits
    rows = [_snapshot(p / "dataset" / "rows") for p in (folder / "one", folder / "many")]
    assert rows[0] == rows[1]


@few_examples
@given(seed=st.integers(0, 10_000))
def test_add_changes_nothing_when_the_file_is_known(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    project = new_project(tmp_path_factory.mktemp("again") / "p", ACCEPT)
    pairs = _families(25, seed)
    first = _add(project, *pairs)
    before = _snapshot(project.dataset)
    second = _add(project, *pairs)
    assert not second.created
    assert second.version == first.version
    assert second.added == 0
    assert second.known + len(second.duplicates) == len(pairs)
    assert _snapshot(project.dataset) == before


def test_add_records_the_fate_of_every_row(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    pairs = _families(60, 1)
    path = write_jsonl(project.root / "pairs.jsonl", [*pairs, pairs[0], ("no answer", "")])
    listener = Listener()
    result = add(project, [path], listener, AddOptions(skip_bad=True))
    assert result.added + len(result.duplicates) + len(result.skipped) == len(pairs) + 2
    assert result.version.counts.rows == result.added

    folder = project.dataset / "versions" / result.version.digest[:12]
    lines = [json.loads(line) for line in (folder / "imports.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == list(range(1, len(pairs) + 3))
    kept = {m.key for m in load_version(project.dataset).members}
    for line in lines:
        assert line["source"] == "pairs.jsonl"
        if line["fate"] == "duplicate":
            assert line["of"] in kept
            assert line["similarity"] >= 0.8
        elif line["fate"] == "added":
            assert line["key"] in kept
        else:
            assert line["reason"] == "an empty answer"
    assert any(f"{path}:{len(pairs) + 2}: an empty answer" in warning for warning in listener.warned)
    [reported] = [w for w in listener.warned if "left out as duplicate" in w]
    assert reported.startswith(f"{len(result.duplicates)} rows")
    assert str(tmp_path) not in (folder / "manifest.json").read_text()


def test_add_reports_a_dropped_row_with_the_row_it_repeats(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p", "data: {duplicates: drop}\n")
    text = "what is the monthly fee for a late card payment"
    pairs = unlike_pairs(20)
    _add(project, *pairs, (text, "fees"))
    listener = Listener()
    result = _add(project, *unlike_pairs(5, seed=9), (text + "?", "fees"), listener=listener, name="more.jsonl")
    [dropped] = result.duplicates
    assert (dropped.line, dropped.similarity) == (6, round(jaccard(text, text + "?"), 4))
    assert dropped.of_place.startswith("version ")
    assert any("more.jsonl:6 repeats version" in warning for warning in listener.warned)


def test_add_refuses_new_conflicts_only(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    _add(project, *unlike_pairs(20), ("capital of Australia", "Sydney"))
    before = _snapshot(project.dataset)
    listener = Listener()
    with pytest.raises(UserError, match="1 input with different outputs, nothing was added") as caught:
        _add(project, ("capital of Australia", "Canberra"), listener=listener)
    assert "clustering" not in listener.steps, "a conflict is known before rows are compared"
    assert '"Canberra" (' in caught.value.what
    assert "pairs.jsonl:1)" in caught.value.what
    assert '"Sydney" (version ' in caught.value.what
    assert "--accept-conflicts" in str(caught.value.fix)
    assert _snapshot(project.dataset) == before
    accepting = ProjectFolder(project.root, project.config.model_copy(update={"data": DataConfig(conflicts="accept")}))
    _add(accepting, ("capital of Australia", "Canberra"))
    assert _add(project, ("capital of Australia", "Canberra"), *unlike_pairs(3, seed=5)).added == 3


def test_add_accepts_outputs_that_repeat_the_spelling_of_the_input(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    echoes = [("play Let It Be", '{"track": "Let It Be"}'), ("play let it be", '{"track": "let it be"}')]
    assert _add(project, *unlike_pairs(20), *echoes).conflicts == ()


def test_add_keeps_and_groups_accepted_conflicts(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p", ACCEPT)
    listener = Listener()
    pairs = [*unlike_pairs(20), ("capital of Australia", "Sydney"), ("capital of Australia", "Canberra")]
    result = _add(project, *pairs, listener=listener)
    [conflict] = result.conflicts
    assert conflict.input == "capital of Australia"
    assert set(conflict.outputs) == {"Sydney", "Canberra"}
    assert result.version.counts.conflicts == 1
    assert any('"Canberra"' in w and "pairs.jsonl:22" in w for w in listener.warned)
    members = [m for m in load_version(project.dataset).members if m.key in conflict.keys]
    assert len({m.cluster for m in members}) == 1


def test_add_lists_all_faulty_rows_and_adds_nothing(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    good = write_jsonl(tmp_path / "good.jsonl", unlike_pairs(20))
    bad = write_jsonl(tmp_path / "bad.jsonl", [("a", ""), *unlike_pairs(3, seed=2), ("b", "")])
    with pytest.raises(UserError, match="2 faulty rows, nothing was added") as caught:
        add(project, [good, bad], Listener())
    assert f"2 rows: an empty answer [E401 $.completion]\n    {bad}:1, {bad}:5\n" in str(caught.value)
    assert "--skip-bad" in str(caught.value)
    assert not project.dataset.exists()


def test_add_refuses_an_empty_list_of_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No file to add"):
        add(new_project(tmp_path / "p"), [], Listener())


def test_add_reports_rows_that_a_bridge_moves_to_test(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p", ACCEPT)
    pairs = unlike_pairs(60)
    _add(project, *pairs)
    version = load_version(project.dataset)
    train, test = version.examples("train")[0], version.examples("test")[0]
    a, b = train.example.input_text, test.example.input_text
    # Morph one text into the other, a few letters at a time: neighbours on the way are near-equal.
    a, b = a.ljust(len(b), "."), b.ljust(len(a), ".")
    bridge = [(b[:i] + a[i:], f"step {i}") for i in range(len(b) + 1)]
    listener = Listener()
    result = _add(project, *bridge, listener=listener, name="bridge.jsonl")
    assert [(m.key, m.before, m.now) for m in result.moved] == [(train.key, "train", "test")]
    assert any("1 row moved from train to test" in w for w in listener.warned)
    after = {m.key: m for m in load_version(project.dataset).members}
    assert after[train.key].cluster == after[test.key].cluster
    _assert_no_leak(load_version(project.dataset))


def test_add_warns_of_few_training_pairs_and_of_a_large_cluster(tmp_path: Path) -> None:
    listener = Listener()
    family = [(f"the circuit court of the county of number {i:02}", f"{i}") for i in range(30)]
    _add(new_project(tmp_path / "p"), *unlike_pairs(60), *family, listener=listener)
    assert any("one cluster holds 30 of 90 rows" in w for w in listener.warned)
    assert any("fewer than 500" in w for w in listener.warned)


def test_add_creates_a_version_when_the_similarity_changes(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    text = "abcdefghijklmnopqrstuvwxyz"
    pairs = [*unlike_pairs(40), (text, "x"), (text[:-5], "y")]
    first = _add(project, *pairs)
    (project.root / "tunewright.yaml").write_text("data: {dedup_threshold: 0.5}\n")
    second = _add(ProjectFolder(project.root), *pairs)
    assert second.created
    assert second.added == 0
    assert second.version.parent == first.version.digest
    assert second.version.counts.clusters == first.version.counts.clusters - 1


def test_add_distinguishes_files_of_one_name(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    files = [write_jsonl(tmp_path / f / "x.jsonl", unlike_pairs(15, seed)) for seed, f in enumerate("ab")]
    names = [source.name for source in add(project, files, Listener()).version.sources]
    assert names[0] == "x.jsonl"
    assert names[1].startswith("x.jsonl@")


def _dialogue(number: int, **first: int) -> dict[str, object]:
    turns = [
        {"role": "user", "content": unlike_pairs(80)[number][0]},
        {"role": "assistant", "content": "first", **first},
        {"role": "user", "content": "and then?"},
        {"role": "assistant", "content": "second"},
    ]
    return {"messages": turns}


def test_add_replaces_a_row_with_other_weights(tmp_path: Path) -> None:
    project = new_project(tmp_path / "project")
    plain = write_rows(tmp_path / "plain.jsonl", [_dialogue(n) for n in range(60)])
    masked = write_rows(tmp_path / "masked.jsonl", [_dialogue(n, weight=0) for n in range(20)])
    add(project, [plain], Listener())
    before = load_version(project.dataset)
    listener = Listener()
    result = add(project, [masked], listener)
    after = load_version(project.dataset)
    assert (result.added, len(after.members)) == (20, 60)
    assert any("20 rows replaced" in warning for warning in listener.warned)
    weights = [m.example.messages[1].weight for m in after.members]
    assert sorted(weights) == [0] * 20 + [1] * 40
    places = {m.example.input_text: m.split for m in before.members}
    assert {m.example.input_text: m.split for m in after.members} == places
    assert not add(project, [plain, masked], Listener()).created


def test_add_keeps_the_masked_row_of_equal_turns(tmp_path: Path) -> None:
    rows = [_dialogue(n) for n in range(60)] + [_dialogue(n, weight=0) for n in range(20)]
    versions = []
    for name, order in (("a", rows), ("b", rows[::-1])):
        project = new_project(tmp_path / name)
        versions.append(add(project, [write_rows(tmp_path / f"{name}.jsonl", order)], Listener()).version.digest)
        members = load_version(project.dataset).members
        assert sorted(m.example.messages[1].weight for m in members) == [0] * 20 + [1] * 40
    assert versions[0] == versions[1]


@pytest.mark.parametrize(("mode", "words"), [("train", "which is trained"), ("mask", "not trained")])
def test_add_counts_rows_with_thinking_and_keeps_it(tmp_path: Path, mode: str, words: str) -> None:
    project = new_project(tmp_path / "p", f"chat: {{reasoning: {mode}}}\n")
    rows = [{"prompt": asked, "completion": answer} for asked, answer in unlike_pairs(60)]
    thought = "Write to jo@lawfirm.org?"
    rows[0]["completion"] = f"<think>{thought}</think>{rows[0]['completion']}"
    listener = Listener()
    options = AddOptions(redact=True)
    result = add(project, [write_rows(project.root / "rows.jsonl", rows)], listener, options)
    assert result.reasoning == 1
    assert any(line.startswith("1 row with thinking") and words in line for line in listener.said)
    kept = [m.example.messages[-1].reasoning for m in load_version(project.dataset).members]
    assert sorted(set(kept)) == ["", "Write to <EMAIL_1>?"]
