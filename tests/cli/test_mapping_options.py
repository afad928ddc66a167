"""--rows, --input and --output: the same for `data add`, `data check` and its --fix, and over the config's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import tunewright

MAPPED = ["--rows", "*[]", "--input", "{{ q }}", "--output", '{{ {"topic": above[0], "answer": a} | tojson }}']
ROWS = {"law": [{"q": f"question {n} of law {n * 7919}", "a": n} for n in range(30)], "tax": [{"q": "odd?"}]}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a document of 31 rows, of which one is faulty."""
    assert tunewright("init", tmp_path).code == 0
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=0))
    return tmp_path


def test_check_fix_and_add_read_a_file_the_same_way(project: Path) -> None:
    file, out = project / "rows.json", project / "fixed.jsonl"
    checked = tunewright("data", "check", file, "-p", project, "--json", *MAPPED)
    assert checked.code == 2
    [fault] = checked.document["faults"]
    added = tunewright("data", "add", file, "-p", project, "--json", "--skip-bad", *MAPPED)
    assert (added.code, added.document["added"]) == (0, 30)
    assert added.document["skipped"] == [fault]
    assert file.read_text().splitlines()[fault["line"] - 1 : fault["line"] + 1] == ["{", '"q": "odd?"']
    assert tunewright("data", "check", file, "-p", project, "--fix", out, *MAPPED).code == 0
    again = tunewright("data", "add", out, "-p", project, "--json")
    assert (again.document["created"], again.document["known"]) == (False, 30)


def test_mapping_options_override_the_config(project: Path) -> None:
    config = project / "tunewright.yaml"
    config.write_text('data:\n  rows: law\n  input: q\n  output: "{{ b }}"\n')
    file = project / "rows.json"
    assert tunewright("data", "check", file, "-p", project).code == 2
    assert tunewright("data", "check", file, "-p", project, "--output", "{{ a }}").code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "--rows", "data"], "requires files"),
        (["check", "FILE", "--rows", ""], "Must not be empty"),
        (["check", "FILE", "--rows", "data["], "Invalid JMESPath expression"),
        (["add", "FILE", "--rows", "*[]", "--input", "{{ q", "--output", "a"], "data.input (--input)"),
        (["add", "FILE", "--rows", "*[]", "--input", "{{ q }}"], "data.output is not set"),
        (["add", "FILE", "--rows", "*[]", "--input", "question", "--output", "answer"], "No file is a CSV"),
        (
            ["check", "FILE", "--rows", "*[]", "--input", "q", "--output", "answer"],
            "no row has both the keys q and answer",
        ),
        (["check", "FILE", "--rows", "*[]", "--input", "q", "--output", "answer"], "Keys of the first rows: q, a"),
        (["check", "FILE", "--fix", "OUT", "--rows", "nothing"], "selects nothing"),
    ],
)
def test_invalid_mapping_option_is_refused_and_changes_nothing(project: Path, arguments: list[str], words: str) -> None:
    places = {"FILE": str(project / "rows.json"), "OUT": str(project / "out.jsonl")}
    ran = tunewright("data", *(places.get(word, word) for word in arguments), "-p", project)
    assert (ran.code, words in ran.stderr) == (2, True), ran.stderr
    assert sorted(path.name for path in project.iterdir()) == ["rows.json", "tunewright.yaml"]
