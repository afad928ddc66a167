"""Bad input through the command line: one clear message, exit code 2, and nothing that was there is lost."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer

from command_line import Ran, pairs, tiny_project, tunewright, write_jsonl
from tunewright.cli.console import session
from tunewright.cli.live import ConsoleReporter
from tunewright.core.progress import LogTask, Task

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
        ("\n \n", ["new.jsonl", "The file has no rows"]),
        ("not json\n", ["new.jsonl:1", "JSON"]),
        ([*GOOD, {"question": "a", "answer": "b"}], ["new.jsonl:61", "question"]),
        ([*GOOD, {"prompt": "a", "completion": ""}], ["new.jsonl:61", "empty"]),
        (b'{"prompt": "caf\xc3\xa9 and caf\xe9", "completion": "x"}\n', ["new.jsonl:1", "UTF-8"]),
        ([*GOOD, {"prompt": "a" * 100_000, "completion": "x"}], ["new.jsonl:61", "100,00", "data.max_characters"]),
        ([*GOOD, {"messages": [{"role": "user", "content": "a"}]}], ["new.jsonl:61", "assistant"]),
    ],
    ids=["empty", "blank", "not-json", "wrong-keys", "empty-answer", "not-utf8", "100000-characters", "no-answer"],
)
def test_add_refuses_a_faulty_file_and_leaves_the_dataset_unchanged(
    project: Path, content: Any, words: list[str]
) -> None:
    path = _file(project, content)
    before = _snapshot(project)
    _refused(tunewright("data", "add", path, "-p", project), *words)
    assert _snapshot(project) == before


def test_add_lists_all_faults_and_names_each_skipped_row(project: Path) -> None:
    path = _file(project, [*pairs(30, seed=5), {"prompt": "a"}, 7, {"prompt": "b", "completion": " "}])
    refused = tunewright("data", "add", path, "-p", project)
    _refused(refused, "new.jsonl:31", "new.jsonl:32", "new.jsonl:33", "--skip-bad")
    skipped = tunewright("data", "add", path, "-p", project, "--skip-bad")
    assert skipped.code == 0
    for line in (31, 32, 33):
        assert f"new.jsonl:{line}" in skipped.stderr


def test_add_reads_a_file_with_a_byte_order_mark(project: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in pairs(20, seed=3))
    path = _file(project, b"\xef\xbb\xbf" + text.encode())
    ran = tunewright("data", "add", path, "-p", project, "--json")
    assert (ran.code, ran.document["added"]) == (0, 20)


def test_add_refuses_three_rows(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder, count=3)
    _refused(tunewright("data", "add", folder / "pairs.jsonl", "-p", folder), "3", "10")
    assert not (folder / "dataset" / "HEAD").exists()
    _refused(tunewright("run", "-p", folder), "3", "10")


def test_add_warns_of_pairs_repeated_under_another_system_turn(project: Path) -> None:
    config = project / "tunewright.yaml"
    config.write_text(config.read_text().replace("data:\n", "data:\n  system_prompt: Name the first colour.\n"))
    ran = tunewright("data", "add", project / "pairs.jsonl", "-p", project)
    assert (ran.code, "120 new rows with a pair that the previous version has" in ran.stderr) == (0, True)


def test_init_refuses_a_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    _refused(tunewright("init", tmp_path / "file"), "a file is in the place of a folder")


def test_verdict_refuses_an_unknown_evaluation(project: Path) -> None:
    for command in ("verdict", "report"):
        _refused(tunewright(command, "nowhere", "-p", project), "No evaluation 'nowhere'")


def test_add_names_an_unknown_csv_column_and_the_existing_ones(project: Path) -> None:
    path = _file(project, "question,answer\na,b\n", "new.csv")
    _refused(tunewright("data", "add", path, "--input", "query", "--output", "answer", "-p", project), "question")
    _refused(tunewright("data", "add", path, "-p", project), "--input")


def test_column_options_are_refused_for_a_file_without_columns(project: Path) -> None:
    _refused(
        tunewright("data", "add", project / "pairs.jsonl", "--input", "a", "-p", project), "--input", "No file is a CSV"
    )


def test_add_reads_the_named_csv_columns(project: Path) -> None:
    rows = "".join(f'"{row["prompt"]}, x",{row["completion"]}\n' for row in pairs(20, seed=3))
    path = _file(project, "question,answer\n" + rows, "new.csv")
    ran = tunewright("data", "add", path, "--input", "question", "--output", "answer", "-p", project, "--json")
    assert (ran.code, ran.document["added"]) == (0, 20)


@pytest.mark.parametrize("command", [["data", "add", "nowhere.jsonl"], ["data", "log"], ["train"], ["run"], ["serve"]])
def test_commands_outside_a_project_suggest_init(tmp_path: Path, command: list[str]) -> None:
    _refused(tunewright(*command, "-p", tmp_path), "tunewright.yaml", "tunewright init")


@pytest.mark.parametrize("command", ["advise", "train", "evaluate", "verdict", "report"])
def test_stage_names_the_missing_earlier_stage(tmp_path: Path, tiny_base_folder: Path, command: str) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    _refused(tunewright(command, "-p", folder), "tunewright ")


def test_config_refuses_an_unknown_key_and_suggests_the_nearest(project: Path) -> None:
    config = project / "tunewright.yaml"
    text = config.read_text()
    config.write_text(text + "trian:\n  lora_r: 8\n")
    line = text.count("\n") + 1
    _refused(tunewright("train", "-p", project), f"tunewright.yaml:{line}:", "did you mean train?")


def test_train_refuses_a_base_without_weights(project: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    config = project / "tunewright.yaml"
    line = next(line for line in config.read_text().splitlines() if line.startswith("base_model:"))
    config.write_text(config.read_text().replace(line, f"base_model: {base}"))
    for command in ("advise", "train", "serve"):
        _refused(tunewright(command, "-p", project), "Missing weights: model.safetensors")


def test_errors_are_json_with_json(project: Path) -> None:
    ran = tunewright("data", "add", project / "nowhere.jsonl", "-p", project, "--json")
    assert ran.code == 2
    assert "nowhere.jsonl" in ran.document["error"]["where"]


def test_serve_refuses_a_port_in_use(project: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        _refused(tunewright("serve", "--port", str(port), "-p", project), str(port))


class _CtrlC(LogTask):
    """Presses Ctrl-C at the n-th step of the task whose title begins so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, title: str, after: int) -> None:
        original = ConsoleReporter.task
        self.title = title
        self.left = after

        @contextmanager
        def task(reporter: ConsoleReporter, name: str, total: int, unit: str) -> Iterator[Task]:
            with original(reporter, name, total, unit) as inner:
                # One task counts the answers of all arms; its note names the arm.
                yield self if name.startswith((title, "All answers")) else inner

        monkeypatch.setattr(ConsoleReporter, "task", task)

    def advance(self, steps: int = 1, note: str = "") -> None:
        if " on " in self.title and self.title not in note:
            return
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("title", "after"),
    [
        pytest.param("reading", 1, marks=pytest.mark.slow),
        pytest.param("looking", 1, marks=pytest.mark.slow),
        ("saving", 3),
        pytest.param("measuring", 1, marks=pytest.mark.slow),
        pytest.param("static-1-seed-1 on dev", 1, marks=pytest.mark.slow),
        pytest.param("retrieved-2-tfidf on dev", 5, marks=pytest.mark.slow),
        ("Training", 7),
        pytest.param("tuned on test", 2, marks=pytest.mark.slow),
    ],
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


@contextmanager
def _small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    "command",
    [pytest.param("advise", marks=pytest.mark.slow), "train", pytest.param("evaluate", marks=pytest.mark.slow)],
)
def test_full_disk_is_reported_and_existing_files_still_work(
    command: str, tmp_path: Path, tiny_base_folder: Path
) -> None:
    with _small_disk(tmp_path / "disk", "8m") as disk:
        folder = tiny_project(disk / "project", tiny_base_folder)
        assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
        if command == "evaluate":
            assert tunewright("train", "-p", folder).code == 0
        filler = disk / "filler"
        with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        before = _snapshot(folder / "dataset")
        _refused(tunewright(command, "-p", folder), "the disk is full", "Free some space")
        assert _snapshot(folder / "dataset") == before
        filler.unlink()
        assert tunewright("run", "-p", folder).code in {0, 3, 4}


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


@pytest.mark.parametrize(
    ("command", "unused"),
    [
        (
            ["serve", "--self-test", "--port", "0", "--metrics-host", "::1", "--no-auth", "--constrain"],
            "--self-test does not use --port, --metrics-host, --no-auth, --constrain",
        ),
        (["data", "generate", "new.jsonl", "--estimate", "--out", "x"], "--estimate does not use --out"),
        (["data", "from-documents", "new.md", "--estimate", "--out", "x"], "--estimate does not use --out"),
        (["data", "review", "--status", "--redraw"], "--status cannot be combined with --redraw"),
        (["data", "review", "--import", "x.csv", "--suspects"], "--import cannot be combined with --suspects"),
        (["data", "review", "--status", "--reviewer", "ann"], "--status does not use --reviewer"),
        (["data", "review", "--apply", "--reviewer", "ann"], "--apply does not use --reviewer"),
    ],
)
def test_options_that_an_action_would_ignore_are_refused(command: list[str], unused: str, tmp_path: Path) -> None:
    _refused(tunewright(*command, "-p", tmp_path), unused, "Leave it out")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["data", "review", "--status", "--apply"], ["--status --apply", "Choose one."]),
        (["data", "review", "--export", "x.csv", "--message", "m"], ["--message", "--apply"]),
        (["human-eval", "--results", "--export", "x.csv"], ["--results --export", "Choose one."]),
    ],
)
def test_options_that_exclude_or_need_each_other_are_named(
    command: list[str], words: list[str], tmp_path: Path
) -> None:
    _refused(tunewright(*command, "-p", tmp_path), *words)
