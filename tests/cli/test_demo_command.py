"""``demo`` on a project that is there already, of a tiny base: the bundled one takes a quarter of an hour."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import tiny_project, tunewright


@pytest.mark.slow
def test_demo_whole_adds_advice_curve_and_judge_to_the_report(tmp_path: Path, tiny_base_folder: Path) -> None:
    project = tiny_project(tmp_path / "demo", tiny_base_folder, count=270)
    config = project / "tunewright.yaml"
    config.write_text(config.read_text().replace("epochs: 2", "epochs: 1").replace("[1, 2]", "[1]"))
    ran = tunewright("demo", project, "--whole", "--json")
    document = ran.document
    assert ran.code in {0, 3, 4}
    assert document["adapter"] in document["served"]["answers"]
    assert [p["share"] for p in document["curve"]["points"]] == [0.25, 0.5, 1.0] * 3
    # A base of random weights can judge nothing, and is not heard.
    assert document["judge"]["vetoed"]
    assert document["advised"]["signals"]
    assert document["evidence"]["id"] in document["report"]
    report = Path(document["report"]).read_text()
    for title in ("Would more data help?", "What a judge says", "Cost of a call"):
        assert f">{title}" in report, title


def test_demo_ends_with_two_isolated_tenants(tmp_path: Path, tiny_base_folder: Path) -> None:
    project = tiny_project(tmp_path / "demo", tiny_base_folder)
    document = tunewright("demo", project, "--json").document
    shown = document["tenants"]
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
