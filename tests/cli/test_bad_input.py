"""Bad input through the command line: one clear message, exit code 2, and nothing that was there is lost."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer

from making.command_line import Ran, pairs, tiny_project, tunewright, write_jsonl
from tunewright.cli.console import session
from tunewright.cli.live import ConsoleReporter
from tunewright.core.progress import LogTask, Task
from tunewright.data.versions import load_version

GOOD = pairs(60)


@pytest.fixture
def project(tmp_path: Path, tiny_base_folder: Path) -> Path:
    """A project with one dataset version."""
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    return folder


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _refused(ran: Ran, *words: str, code: int = 2) -> None:
    assert ran.code == code, (ran.code, ran.stdout, ran.stderr)
    assert "Traceback" not in ran.stderr
    for word in words:
        assert word in ran.stderr, ran.stderr


def _file(folder: Path, content: bytes | str | list[Any], name: str = "new.jsonl") -> Path:
    path = folder / name
    if isinstance(content, list):
        return write_jsonl(path, content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["new.jsonl", "The file has no rows"]),
        ("not json\n", ["new.jsonl:1", "JSON"]),
        ([*GOOD, {"question": "a", "answer": "b"}], ["new.jsonl:61", "question"]),
        (b'{"prompt": "caf\xc3\xa9 and caf\xe9", "completion": "x"}\n', ["new.jsonl:1", "UTF-8"]),
        ([*GOOD, {"prompt": "a" * 100_000, "completion": "x"}], ["new.jsonl:61", "100,00", "data.max_characters"]),
    ],
    ids=["empty", "not-json", "wrong-keys", "not-utf8", "100000-characters"],
)
def test_add_refuses_a_faulty_file_and_leaves_the_dataset_unchanged(
    project: Path, content: Any, words: list[str]
) -> None:
    path = _file(project, content)
    before = _snapshot(project)
    _refused(tunewright("data", "add", path, "-p", project), *words)
    assert _snapshot(project) == before


def test_add_warns_of_pairs_repeated_under_another_system_turn(project: Path) -> None:
    config = project / "tunewright.yaml"
    config.write_text(config.read_text().replace("data:\n", "data:\n  system_prompt: Name the first colour.\n"))
    ran = tunewright("data", "add", project / "pairs.jsonl", "-p", project)
    assert (ran.code, "120 new rows with a pair that the previous version has" in ran.stderr) == (0, True)


def test_init_refuses_a_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    _refused(tunewright("init", tmp_path / "file"), "a file is in the place of a folder")


MAPPED = ["--rows", "*[]", "--input", "{{ q }}", "--output", '{{ {"topic": above[0], "answer": a} | tojson }}']
NESTED = {"law": [{"q": f"question {n} of law {n * 7919}", "a": n} for n in range(30)], "tax": [{"q": "odd?"}]}


def test_check_fix_and_add_read_a_file_the_same_way(tmp_path: Path) -> None:
    assert tunewright("init", tmp_path).code == 0
    file, out = tmp_path / "rows.json", tmp_path / "fixed.jsonl"
    file.write_text(json.dumps(NESTED, indent=0))
    checked = tunewright("data", "check", file, "-p", tmp_path, "--json", *MAPPED)
    assert checked.code == 2
    [fault] = checked.document["faults"]
    added = tunewright("data", "add", file, "-p", tmp_path, "--json", "--skip-bad", *MAPPED)
    assert (added.code, added.document["added"]) == (0, 30)
    assert added.document["skipped"] == [fault]
    assert file.read_text().splitlines()[fault["line"] - 1 : fault["line"] + 1] == ["{", '"q": "odd?"']
    assert tunewright("data", "check", file, "-p", tmp_path, "--fix", out, *MAPPED).code == 0
    again = tunewright("data", "add", out, "-p", tmp_path, "--json")
    assert (again.document["created"], again.document["known"]) == (False, 30)
    other = tmp_path / "other"
    other.mkdir()
    (other / "tunewright.yaml").write_text('data:\n  rows: law\n  input: q\n  output: "{{ b }}"\n')
    assert tunewright("data", "check", file, "-p", other).code == 2
    assert tunewright("data", "check", file, "-p", other, "--output", "{{ a }}").code == 0, "over the config's"


@pytest.mark.parametrize("command", ["advise", "train", "evaluate", "verdict", "report"])
def test_stage_names_the_missing_earlier_stage(tmp_path: Path, tiny_base_folder: Path, command: str) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    _refused(tunewright(command, "-p", folder), "tunewright ")


class _CtrlC(LogTask):
    """Presses Ctrl-C at the n-th step of the task whose title begins so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, title: str, after: int) -> None:
        original = ConsoleReporter.task
        self.title = title
        self.left = after

        @contextmanager
        def task(reporter: ConsoleReporter, name: str, total: int, unit: str) -> Iterator[Task]:
            with original(reporter, name, total, unit) as inner:
                yield self if name.startswith(title) else inner

        monkeypatch.setattr(ConsoleReporter, "task", task)

    def advance(self, steps: int = 1, note: str = "", *, kept: bool = False) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("title", "after"),
    [("saving", 3), ("retrieved-2-tfidf on dev", 5), ("Training", 7), ("tuned on test", 2)],
)
def test_stage_resumes_without_loss_after_ctrl_c(
    title: str, after: int, tmp_path: Path, tiny_base_folder: Path
) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        _CtrlC(monkeypatch, title, after)
        _refused(tunewright("run", "-p", folder), "Stopped", "resumes from there", code=130)
    ran = tunewright("run", "-p", folder, "--json")
    assert ran.code in {0, 3, 4}
    assert ran.document["data"]["version"]["counts"]["rows"] == 120


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), "sklearn/externals"),
        ImportError("libgomp.so.1: failed to map segment from shared object: Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    ],
)
def test_lack_of_memory_is_reported_wherever_it_is_met(error: Exception, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as end, session(as_json=False):
        raise error
    assert end.value.exit_code == 2
    assert capfd.readouterr().err.startswith("Error: Not enough memory\n")


TOO_FEW = "no difference can be significant"


@pytest.fixture
def few_clusters(tmp_path: Path) -> Path:
    """A project with 480 rows in 40 groups of 12, which leave four test clusters, and no base."""
    rows = [
        {"prompt": f"{'abcdefghij'[g % 10] * 3} {g * 7919 % 10007} question {g}-{k}", "completion": f"{g} {k}", "g": g}
        for g in range(40)
        for k in range(12)
    ]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    (tmp_path / "tunewright.yaml").write_text(
        f"name: few\nbase_model: {tmp_path / 'nowhere'}\ndata: {{sources: [pairs.jsonl], group_by: [g]}}\n"
    )
    return tmp_path


def test_data_add_warns_last_of_few_test_clusters_and_succeeds(few_clusters: Path) -> None:
    ran = tunewright("data", "add", few_clusters / "pairs.jsonl", "-p", few_clusters, "--json")
    assert ran.code == 0
    assert ran.document["clusters"] == {"train": 32, "dev": 4, "test": 4}
    warnings = [line for line in ran.stderr.splitlines() if line.startswith("Warning:")]
    assert warnings[-1].startswith(f"Warning: 4 test clusters: {TOO_FEW} with fewer than 6. About ")
    assert "Independent clusters: 32 train, 4 dev, 4 test." in ran.stderr


def test_run_stops_before_resolving_the_base_unless_forced(few_clusters: Path) -> None:
    ran = tunewright("run", "-p", few_clusters)
    assert ran.code == 2
    assert f"Error: test split: 4 test clusters: {TOO_FEW}" in ran.stderr
    assert "--force" in ran.stderr
    assert "nowhere" not in ran.stderr
    forced = tunewright("run", "--force", "-p", few_clusters)
    assert forced.code == 2
    assert 'the verdict will be "can\'t tell"' in " ".join(forced.stderr.split())
    assert "nowhere" in forced.stderr


TOLD = r"(\d+) of (\d+) {split} references are longer than the limit of 4 tokens.*? (\d+) tokens fit all of"


def _told(ran: Ran, split: str) -> list[re.Match[str]]:
    assert ran.code == 0, ran.stderr
    return list(re.finditer(TOLD.format(split=split), " ".join(ran.stderr.split())))


@pytest.mark.slow
def test_train_and_evaluate_warn_of_longer_references_before_they_answer(
    tmp_path: Path, tiny_base_folder: Path
) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    config = folder / "tunewright.yaml"
    text = config.read_text().replace(
        "evaluate:\n  num_fewshot: [1, 2]\n", "evaluate:\n  num_fewshot: [1]\n  max_new_tokens: 4\n"
    )
    config.write_text(text.replace("  epochs: 2\n", "  epochs: 1\n"))
    assert tunewright("data", "add", folder / "pairs.jsonl", "--project", folder).code == 0
    version = load_version(folder / "dataset")
    trained = tunewright("train", "--project", folder)
    (dev,) = _told(trained, "dev")
    lengths = [len(m.example.output) + 1 for m in version.examples("dev")]  # bytes are tokens, and the end is one
    assert [int(n) for n in dev.groups()] == [sum(n > 4 for n in lengths), len(lengths), max(lengths)]
    on_dev = tunewright("evaluate", "--dev", "--project", folder)
    assert len(_told(on_dev, "dev")) == 1
    assert _told(on_dev, "test") == []
    evaluated = tunewright("evaluate", "--project", folder)
    assert len(_told(evaluated, "test")) == 1
    message = " ".join(evaluated.stderr.split())
    assert message.index("test references are longer") < message.index("The test split is opened")
