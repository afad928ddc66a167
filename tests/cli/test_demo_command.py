"""``demo`` on a project that is there already, of a tiny base: the bundled one takes minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from making.command_line import tiny_project, tunewright
from tunewright.config.io import load_config
from tunewright.core.progress import LogReporter
from tunewright.demo import choose_item, open_demo
from tunewright.evidence.schema import Item


@pytest.mark.slow
def test_demo_ends_with_two_isolated_tenants(tmp_path: Path, tiny_base_folder: Path) -> None:
    project = tiny_project(tmp_path / "demo", tiny_base_folder)
    ran = tunewright("demo", project, "--json")
    assert "Best prompting arm: " in ran.stderr, "shown before training"
    document, shown = ran.document, ran.document["tenants"]
    assert document["served"]["best_prompting"] == document["evidence"]["best_prompting"]
    first, second = shown["tenants"]
    assert (first["tenant"], first["sees"]) == ("acme", ["legal"])
    assert (second["tenant"], second["sees"]) == ("globex", ["legal-draft"])
    live = {release["alias"]: release for release in shown["releases"]}
    for visit in (first, second):
        assert visit["answered_by"] == live[visit["alias"]]["digest"]
        assert (visit["others_alias"], visit["same_refusal"], visit["requests"]) == (404, True, 1)
        # A tiny base's verdict is not to ship: both are forced, and say why.
        assert live[visit["alias"]]["grounds"]["because"].startswith("for the demo")
    assert live["legal"]["digest"] != live["legal-draft"]["digest"]
    assert set(live["legal-draft"]["grounds"]["isolation"]["adapters"]) == {each["digest"] for each in live.values()}
    assert not (project / "serving" / "state.sqlite").exists(), "the project itself has no tenants"

    # A second run finds the releases, and asks again.
    again = tunewright("demo", project, "--json").document["tenants"]
    assert [visit["requests"] for visit in again["tenants"]] == [2, 2]
    assert again["releases"] == shown["releases"]


def test_open_demo_writes_quick_settings_and_the_whole_ones_over_them(tmp_path: Path) -> None:
    folder, config = tmp_path / "demo", tmp_path / "demo" / "tunewright.yaml"
    open_demo(folder, LogReporter())
    quick = load_config(config)
    open_demo(folder, LogReporter(), whole=True)
    whole = load_config(config)
    assert quick.data == whole.data, "the test set is the same"
    assert set(quick.evaluate.num_fewshot) < set(whole.evaluate.num_fewshot)
    assert quick.train.epochs < whole.train.epochs
    edited = config.read_text().replace("epochs: 2", "epochs: 3")
    config.write_text(edited)
    open_demo(folder, LogReporter(), whole=True)
    assert config.read_text() == edited


def test_choose_item_returns_what_only_tuning_gets_right_and_least_resembles_training() -> None:
    items = [
        _item("everybody", tuned=1, best=1, nearest=0.1),
        _item("nobody", tuned=0, best=0, nearest=0.1),
        _item("like training", tuned=1, best=0, nearest=0.7),
        _item("unlike training", tuned=1, best=0, nearest=0.2),
    ]
    assert choose_item(items, "exact_match").key == "unlike training"
    assert choose_item(items[:2], "exact_match").key == "everybody"


def _item(key: str, *, tuned: float, best: float, nearest: float) -> Item:
    scores = {"zero-shot": 0.0, "retrieved-8": best, "tuned": tuned}
    return Item(
        key=key, cluster="", input="", reference="", answers={}, scores={"exact_match": scores}, nearest=nearest
    )
