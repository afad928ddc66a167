"""Preference tuning of a version's pairs: what is trained on, what is left out, and that a stopped run resumes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tunewright
from making.command_line import write_jsonl
from making.training_runs import Heard, new_config, tiny_preference_project
from tunewright.adapters.registry import Adapter
from tunewright.core.errors import UserError
from tunewright.data.options import RemoveOptions
from tunewright.data.trace import uses_of_row
from tunewright.data.versions import DatasetVersion
from tunewright.data.versions.logs import KEPT_PAIRS_FILE, KeptPair, add_kept_pairs, read_kept_pairs
from tunewright.evidence.verdict import verdict
from tunewright.training.preference_pairs import read_pairs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> tuple[Path, Adapter]:
    """A project with its supervised adapter."""
    folder = tiny_preference_project(tmp_path_factory.mktemp("preference") / "project", tiny_base_folder)
    return folder, tunewright.open(folder).train().adapter


@pytest.fixture(scope="module")
def dpo(trained: tuple[Path, Adapter]) -> tuple[Path, Adapter, list[str]]:
    """The same project with an adapter tuned by DPO."""
    folder, parent = trained
    new_config(folder, {"from": parent.name, "method": "dpo"}, learning_rate=0.02, epochs=8)
    heard = Heard()
    return folder, tunewright.open(folder, heard).train(force=True).adapter, heard.lines


@pytest.fixture
def project(tmp_path: Path, tiny_base_folder: Path) -> Path:
    """A project without rejected answers, of which nothing is trained."""
    return tiny_preference_project(tmp_path / "project", tiny_base_folder, rejected=False)


def _version(folder: Path) -> DatasetVersion:
    return tunewright.open(folder).data.version()


def _kept(folder: Path, split: str, chosen: str, rejected: str, **changes: Any) -> KeptPair:
    version = _version(folder)
    member = next(m for m in version.members if m.split == split)
    facts: dict[str, Any] = {
        "key": member.key,
        "input": member.example.input_key,
        "chosen": chosen,
        "rejected": rejected,
        "kind": "person",
        "by": "ada",
        "when": "2026-11-28T10:00:00.000+00:00",
        "version": version.digest,
        "evaluation": "0123456789ab",
        "arms": ("tuned", "retrieved-4"),
    }
    return KeptPair(**(facts | changes))


@pytest.mark.slow
def test_dpo_prefers_chosen_answers_and_starts_from_an_equal_reference(dpo: tuple[Path, Adapter, list[str]]) -> None:
    steps = [row for row in dpo[1].history if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert steps[0]["rewards/chosen"] == pytest.approx(0, abs=1e-6)
    last = steps[-6:]  # an epoch
    assert sum(row["loss"] for row in last) / 6 < 0.65
    assert all(row["rewards/chosen"] > row["rewards/rejected"] for row in last)
    assert sum(row["rewards/accuracies"] for row in last) / 6 > 0.6


@pytest.mark.slow
def test_dpo_trains_on_pairs_of_training_inputs_alone_and_names_the_others(
    dpo: tuple[Path, Adapter, list[str]],
) -> None:
    folder, adapter, lines = dpo
    found = adapter.lineage["preferences"]
    version = _version(folder)
    split = {m.key: m.split for m in version.members}
    assert {split[key] for key in found["rows"]} == {"train"}
    assert found["pairs"] == len(found["rows"]) == adapter.lineage["training"]["examples"]
    left_out = {f"the input is in the {name} split": count for name, count in _held_out(folder).items()}
    assert found["left_out"] == left_out
    for reason, count in left_out.items():
        assert any(f"{count} preference pairs left out: {reason}" in line for line in lines)
    assert found["pairs"] + sum(left_out.values()) == 60
    without = next(m.key for m in version.domain_of("train") if m.key not in found["rows"])
    (use,) = [u for u in uses_of_row(folder / "dataset", folder / "adapters", without) if u.adapter == adapter.name]
    assert use.use == "trained", "by its parent"
    assert use.reason.startswith("through")


def _held_out(folder: Path) -> dict[str, int]:
    asked = {line.split('"')[3] for line in (folder / "pairs.jsonl").read_text().splitlines() if "rejected" in line}
    members = [m for m in _version(folder).members if m.example.input_text in asked]
    return {name: sum(m.split == name for m in members) for name in ("dev", "test")}


@pytest.mark.slow
def test_stopped_dpo_resumes_to_the_same_adapter_with_the_reference_that_it_had(
    dpo: tuple[Path, Adapter, list[str]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(dpo[0], tmp_path / "project"))
    shutil.rmtree(folder / "adapters" / dpo[1].name)
    with pytest.raises(KeyboardInterrupt):
        tunewright.open(folder, Heard(after=5)).train(force=True)
    heard = Heard()
    assert tunewright.open(folder, heard).train(force=True).adapter.digest == dpo[1].digest
    assert any(line.startswith("Resuming from step 5") for line in heard.lines)
    assert "Reference log-probabilities" in dpo[2]
    assert "Reference log-probabilities" not in heard.lines


@pytest.mark.slow
def test_evidence_contrasts_the_tuned_adapter_with_its_parent(dpo: tuple[Path, Adapter, list[str]]) -> None:
    folder, adapter, _ = dpo
    result = tunewright.open(folder).evaluate(adapter.name, dev=True)
    pairs = [(c.treatment, c.control) for c in result.evidence.deciding]
    assert ("tuned", "parent") in pairs
    assert pairs[0][1] == result.evidence.best_prompting
    parent = adapter.lineage["parent"]["name"]
    (reason,) = [each for each in verdict(result.evidence).reasons if each.startswith(f"Against {parent}")]
    assert "DPO" in reason
    alone = tunewright.open(folder).evaluate(parent, dev=True)
    assert {arm.name for arm in alone.evidence.arms} == {arm.name for arm in result.evidence.arms} - {"parent"}
    answers = (
        [a for a in result.evidence.arms if a.name == "parent"],
        [a for a in alone.evidence.arms if a.name == "tuned"],
    )
    assert answers[0][0].scores == answers[1][0].scores


@pytest.mark.slow
@pytest.mark.parametrize("method", ["orpo", "kto"])
def test_orpo_and_kto_train_an_adapter(trained: tuple[Path, Adapter], method: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained[0], tmp_path / "project"))
    text = (folder / "tunewright.yaml").read_text()
    (folder / "tunewright.yaml").write_text(text.replace("method: dpo", f"method: {method}"))
    if "method:" not in text:
        new_config(folder, {"from": trained[1].name, "method": method}, learning_rate=0.01)
    adapter = tunewright.open(folder).train(force=True).adapter
    assert adapter.lineage["preferences"]["method"] == method
    steps = [row for row in adapter.history if "loss" in row]
    assert {"rewards/chosen", "rewards/rejected"} <= set().union(*steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    if method == "kto":
        given = adapter.lineage["preferences"]
        assert given["answers"]["chosen"] == len(_version(folder).domain_of("train"))
        assert given["undesirable_weight"] == pytest.approx(given["answers"]["chosen"] / given["answers"]["rejected"])


def test_run_without_a_pair_is_refused_and_counts_those_left_out(project: Path) -> None:
    new_config(project, {"method": "orpo"})
    with pytest.raises(UserError, match="has no preference pair to train on\n") as caught:
        tunewright.open(project).train(force=True)
    assert caught.value.where == "train.method"
    dataset = project / "dataset"
    add_kept_pairs(dataset, [_kept(project, "test", "a", "b"), _kept(project, "dev", "a", "b")])
    with pytest.raises(UserError, match=r"no preference pair to train on \(2 left out\)"):
        tunewright.open(project).train(force=True)
    assert not (project / "adapters").exists()


def test_equal_contradictory_and_orphaned_pairs_are_left_out_by_name(project: Path) -> None:
    one, other = _kept(project, "train", "red", "blue"), _kept(project, "train", "blue", "red", by="bob")
    pairs = [one, other, _kept(project, "train", "teal", " teal "), _kept(project, "train", "x", "y", input="0" * 64)]
    good = _kept(project, "train", "red", "green", kind="judge", by="a-judge")
    add_kept_pairs(project / "dataset", [*pairs, good])
    found = read_pairs(project / "dataset", _version(project))
    assert [(p.chosen[0].content, p.rejected[0].content) for p in found.pairs] == [("red", "green")]
    assert {reason: len(names) for reason, names in found.left_out.items()} == {
        "it is preferred both ways": 2,
        "both answers are equal": 1,
        "the version has no row with the input": 1,
    }


def test_rejected_answers_of_known_rows_are_kept_once_and_purged_with_their_row(project: Path) -> None:
    opened, dataset = tunewright.open(project), project / "dataset"
    version = opened.data.version()
    rows = [
        {"prompt": m.example.input_text, "chosen": m.example.output, "rejected": "nothing of the kind, sorry"}
        for m in version.domain_of("train")[:2]
    ]
    heard = Heard()
    for _ in range(2):
        added = tunewright.open(project, heard).data.add([write_jsonl(project / "rejected.jsonl", rows)])
        assert not added.created
    assert [pair.by for pair in read_kept_pairs(dataset)] == ["rejected.jsonl:1", "rejected.jsonl:2"]
    assert sum("Kept 2 preference pairs of known rows" in line for line in heard.lines) == 1
    assert not [line for line in heard.lines if "was not stored" in line]
    assert len(read_pairs(dataset, version).pairs) == 2
    gone = version.domain_of("train")[0].key
    keys = project / "keys.txt"
    keys.write_text(f"{gone}\n")
    tunewright.open(project).data.remove(RemoveOptions(keys=keys, because="asked to"))
    assert len(read_pairs(dataset, _version(project)).pairs) == 1
    tunewright.open(project).data.remove(RemoveOptions(keys=keys, because="asked to", purge=True))
    assert [pair.key for pair in read_kept_pairs(dataset)] != []
    assert gone not in (dataset / KEPT_PAIRS_FILE).read_text()


def test_changed_kept_pair_is_named(project: Path) -> None:
    add_kept_pairs(project / "dataset", [_kept(project, "train", "red", "blue")])
    file = project / "dataset" / KEPT_PAIRS_FILE
    file.write_text(file.read_text().replace("red", "rot"))
    with pytest.raises(UserError, match="preference pair was changed") as caught:
        read_pairs(project / "dataset", _version(project))
    assert caught.value.where == f"{file}:1"
    assert [issue.where for issue in tunewright.open(project).data.verify().damage] == [f"{file}:1"]


def test_too_long_answer_drops_its_pair_or_stops(project: Path) -> None:
    long = _kept(project, "train", "red", "blue " * 40)
    add_kept_pairs(project / "dataset", [long, _kept(project, "train", "red", "green")])
    new_config(project, {"method": "dpo", "max_length": 120})
    with pytest.raises(UserError, match="1 of 4 examples are longer than 120 tokens"):
        tunewright.open(project).train(force=True)
    new_config(project, {"on_overlength": "drop"})
    adapter = tunewright.open(project).train(force=True).adapter
    assert adapter.lineage["preferences"]["pairs"] == 1
    assert "parent" not in adapter.lineage


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta": 0.3}, "beta requires method: dpo, orpo or kto"),
        ({"method": "dpo", "replay": "self"}, "replay requires method: sft"),
        ({"method": "ppo"}, "train.method"),
    ],
)
def test_config_refuses_settings_of_another_method(
    settings: dict[str, Any], words: str, tmp_path: Path, config_of: Callable[[dict[str, Any]], Any]
) -> None:
    with pytest.raises(UserError, match=words):
        config_of(settings)


@pytest.fixture
def config_of() -> Callable[[dict[str, Any]], Any]:
    """Parse a config with this train section."""
    import yaml

    from tunewright.config.io import parse_config

    return lambda train: parse_config(yaml.safe_dump({"train": train}), Path("tunewright.yaml"))


def test_methods_have_their_own_defaults_and_leave_old_identities_unchanged(
    config_of: Callable[[dict[str, Any]], Any],
) -> None:
    dpo = config_of({"method": "dpo", "preset": "all-linear"}).train
    assert (dpo.learning_rate, dpo.epochs, dpo.target_modules[-1]) == (5e-6, 1, "down_proj")
    assert config_of({"method": "dpo", "learning_rate": 1e-4}).train.learning_rate == 1e-4
    sft = config_of({}).train
    assert not {"from", "method", "beta"} & sft.deciding().keys()
    assert dpo.deciding()["method"] == "dpo"
