"""The surface that users build on changes only with a line in the changelog."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import reference_cli
import reference_config
import yaml
from json_keys import SOURCE, Reader
from packaging.version import Version
from pydantic import Field, create_model
from surface import GOLDEN, RELEASED, Line, config_lines, lines, option_lines, read, unnamed, unreleased

from tunewright._version import __version__
from tunewright.config import Config

CHANGELOG = Path(__file__).parents[2] / "CHANGELOG.md"


@cache
def surface() -> frozenset[Line]:
    return frozenset(lines())


def test_surface_is_in_the_golden_file() -> None:
    assert sorted(map(str, surface())) == GOLDEN.read_text(encoding="utf-8").splitlines(), (
        "Read what changed, and run `make surface`."
    )


def test_each_command_that_prints_json_has_keys() -> None:
    """A result that the reader cannot follow would be watched by nobody."""
    printing = {each.owner for each in surface() if each.kind == "option" and each.name == "--json"}
    assert len(printing) > 70
    assert printing - {each.owner for each in surface() if each.kind == "json"} == set()


def test_changelog_names_each_change_since_the_last_release() -> None:
    """After a release, `make surface ARGS=--released` keeps its surface."""
    missing = unnamed(read(RELEASED), read(GOLDEN), unreleased(CHANGELOG.read_text(encoding="utf-8")))
    assert not missing, "\n".join(missing)


def test_changelog_and_chart_have_this_version() -> None:
    heading = re.search(r"^## (.*)$", CHANGELOG.read_text(encoding="utf-8"), re.MULTILINE)
    assert heading is not None
    assert re.fullmatch(rf"{re.escape(__version__)} \((unreleased|\d{{4}}-\d\d-\d\d)\)", heading[1])
    chart = yaml.safe_load((CHANGELOG.parent / "deploy" / "chart" / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["appVersion"] == __version__
    assert Version(chart["version"]) == Version(__version__)  # semver writes 1.0.0-rc1 where Python writes 1.0.0rc1


def test_golden_file_is_read_as_it_was_written() -> None:
    assert {str(each) for each in read(GOLDEN)} == set(GOLDEN.read_text(encoding="utf-8").splitlines())


def test_changed_source_needs_a_line_in_the_changelog() -> None:
    """A key of `--json`, a field of a file, two exit codes and a field of an answer are changed in the source."""
    changes = {
        "cli/evaluate.py": ('{"report": str', '{"page": str'),
        "evidence/schema.py": ("\n    opening: ", "\n    _opening: "),
        "evidence/verdict.py": ('"don\'t ship": 3', '"don\'t ship": 5'),
        "cli/train.py": ("else CANT_TELL", "else 7"),
        "serving/gateway/responses.py": ('"refusal": None', '"refused": None'),
    }
    texts = {}
    for module, (before, now) in changes.items():
        text = (SOURCE / "tunewright" / module).read_text(encoding="utf-8")
        assert before in text
        texts[module.removesuffix(".py").replace("/", "_")] = text.replace(before, now)
    missing = "".join(unnamed(surface(), lines(Reader(**texts)), []))
    for line in (
        "removed: json report: report\n",
        "added: json report: page\n",
        "removed: field Evidence: opening = ",
        "added: exit verdict: 5\n",
        "added: exit train: 7\n",
        "removed: answer responses: refusal\n",
        "added: answer responses: refused\n",
    ):
        assert line in missing


def test_renamed_key_of_the_config_needs_a_line_that_names_both() -> None:
    fields: Any = {name: (each.annotation, each) for name, each in Config.model_fields.items() if name != "name"}
    renamed = create_model("Config", title=(str, Field()), **fields)
    now = set(config_lines(reference_config.keys(renamed)))
    before = {each for each in surface() if each.kind == "config"}
    missing = unnamed(before, now, ["config: rename `title`"])
    assert [line.splitlines()[0] for line in missing] == ["removed: config: name = text; my-model"]
    assert unnamed(before, now, ["config: `name` is `title`"]) == []


def test_dropped_option_and_changed_default_need_a_line_that_names_their_command() -> None:
    entry = next(each for each in reference_cli.entries() if each.name == "crossval")
    command = entry.command
    folds = next(each for each in command.params if each.name == "folds")
    before = set(option_lines(entry))
    without = replace(entry, command=SimpleNamespace(params=[each for each in command.params if each is not folds]))
    (line,) = unnamed(before, option_lines(without), ["train: remove `--folds`"])
    assert "`crossval` and `--folds`" in line
    assert unnamed(before, option_lines(without), ["crossval: remove `--folds`"]) == []


def test_new_command_stands_for_its_options_and_keys() -> None:
    new = [Line("command", "", "tidy"), Line("option", "tidy", "--all", "flag"), Line("json", "tidy", "rows")]
    assert [line.splitlines()[0] for line in unnamed([], new, [])] == ["added: command: tidy"]
    assert unnamed([], new, ["data: add `tidy`"]) == []


def test_released_version_has_no_unreleased_bullets() -> None:
    new = "## 1.1.0 ({})\n\nData:\n\n- data: read `--new`\n  lines\n- train: x\n\n"
    text = f"# Changelog\n\n{new}## 1.0.0 (2026-01-02)\n\n- old\n"
    assert unreleased(text.format("2026-02-03")) == []
    assert "data: read `--new` lines" in unreleased(text.format("unreleased"))
    assert not any("old" in each for each in unreleased(text.format("unreleased")))
