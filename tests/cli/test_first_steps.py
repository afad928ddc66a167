"""The first five minutes: the command without arguments, and `init` with questions and with options."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl  # type: ignore[import-untyped]
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import yaml

import tunewright as tunewright_package
from making.command_line import tiny_project, tunewright, write_jsonl
from making.evidence import make_evidence, make_items
from making.human_evaluations import save
from making.signals import break_even, doubling, gain, make_signals
from making.studio_client import PASSWORD, opened
from making.terminal import Terminal
from making.training_runs import Heard, training_project
from tunewright.config import Config
from tunewright.config.project import ProjectFolder
from tunewright.config.train import BUNDLED_TRAINING
from tunewright.core.errors import UserError
from tunewright.core.io import json_document
from tunewright.core.locks import locked_folder
from tunewright.data.task import TASKS
from tunewright.evaluation.access_log import AccessLog
from tunewright.open_project import project_name
from tunewright.serving.gateway.server import serving
from tunewright.serving.options import ServeOptions
from tunewright.studio import Studio


def as_csv(path: Path, rows: list[dict[str, str]], delimiter: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def config_of(folder: Path) -> dict[str, Any]:
    read = yaml.safe_load((folder / "tunewright.yaml").read_text(encoding="utf-8"))
    return {section: values for section, values in read.items() if values is not None}


NUMBERS = range(60)
LONG = "the left knee hurts on most days, and walking helps more than rest does, so said patient number"
CALL = {"id": "call_0", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "how can I help"}]

FILES: dict[str, Callable[[Path], Path]] = {
    "labels": lambda path: as_csv(
        path / "a.csv", [{"utterance": f"do it {n} times", "intent": ("play", "stop", "wait")[n % 3]} for n in NUMBERS]
    ),
    "short": lambda path: as_csv(
        path / "a.csv", [{"Frage": f"Gericht {n}", "Antwort": f"{n}. Cir."} for n in NUMBERS], ";"
    ),
    "json": lambda path: write_jsonl(
        path / "a.jsonl", [{"prompt": f"letter {n}", "completion": json.dumps({"name": f"n{n}"})} for n in NUMBERS]
    ),
    "sql": lambda path: write_jsonl(
        path / "a.jsonl", [{"question": f"how many {n}", "query": f"SELECT x FROM t\nWHERE n = {n}"} for n in NUMBERS]
    ),
    "text": lambda path: as_csv(path / "a.csv", [{"dialogue": f"talk {n}", "summary": f"{LONG} {n}"} for n in NUMBERS]),
    "calls": lambda path: write_jsonl(
        path / "a.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": f"is it cold {n}"},
                    {"role": "assistant", "tool_calls": [CALL]},
                ],
                "tools": [TOOL],
            }
            for n in NUMBERS
        ],
    ),
    "chat": lambda path: write_jsonl(
        path / "a.jsonl",
        [
            {
                "messages": [
                    *TURNS,
                    {"role": "user", "content": f"with {n}"},
                    {"role": "assistant", "content": f"{LONG} {n}"},
                ]
            }
            for n in NUMBERS
        ],
    ),
}
METRICS = {
    "labels": "exact_match",
    "short": "exact_match",
    "json": "json",
    "sql": {"exact_match": {"collapse_whitespace": True}},
    "text": "rouge_l",
    "calls": "call_ast_match",
    "chat": "chrf",
}


@pytest.mark.parametrize("task", FILES)
def test_init_proposes_task_metric_and_columns_that_data_check_accepts(task: str, tmp_path: Path) -> None:
    file, project = FILES[task](tmp_path), tmp_path / "project"
    ran = tunewright("init", project, "--data", file, "--json")
    assert ran.code == 0, ran.stderr
    assert (ran.document["task"], ran.document["metric"]) == (task, METRICS[task])
    config = config_of(project)
    assert config["evaluate"]["metric"] == METRICS[task]
    assert config["data"]["sources"] == [str(file)]
    checked = tunewright("data", "check", file, "-p", project, "--json")
    assert (checked.code, checked.document["files"][0]["examples"]) == (0, len(NUMBERS))


def test_init_takes_chrf_for_texts_in_other_scripts(tmp_path: Path) -> None:
    rows = [
        {"text": f"разговор {n}", "summary": f"пациент говорит, что колено болит каждый день и ночь, номер {n}"}
        for n in NUMBERS
    ]
    ran = tunewright("init", tmp_path / "p", "--data", as_csv(tmp_path / "a.csv", rows), "--json")
    assert (ran.document["task"], ran.document["metric"]) == ("text", "chrf")


def test_init_takes_macro_f1_if_one_label_has_most_rows(tmp_path: Path) -> None:
    rows = [{"text": f"ticket {n}", "label": "ok" if n % 10 else "broken"} for n in NUMBERS]
    ran = tunewright("init", tmp_path / "p", "--data", as_csv(tmp_path / "a.csv", rows), "--json")
    assert (ran.document["task"], ran.document["metric"]) == ("labels", "macro_f1")


def test_init_refuses_unclear_columns_by_name_and_writes_nothing(tmp_path: Path) -> None:
    rows = [{"Nr": str(n), "Frage": f"Wo {n}?", "Antwort": f"Dort {n}", "Kategorie": "Versand"} for n in NUMBERS]
    file, project = as_csv(tmp_path / "a.csv", rows), tmp_path / "p"
    ran = tunewright("init", project, "--data", file)
    assert (ran.code, project.exists()) == (2, False)
    assert "--output" in ran.stderr
    assert 'Columns: Nr ("0"), Frage ("Wo 0?"), Antwort ("Dort 0"), Kategorie ("Versand")\n' in ran.stderr
    ran = tunewright("init", project, "--data", file, "--input", "Frage", "--output", "Kategorie", "--json")
    assert (ran.code, ran.document["task"]) == (0, "labels")
    assert config_of(project)["data"] == {"sources": [str(file)], "input": "Frage", "output": "Kategorie"}


def test_errors_for_columns_show_the_first_value_of_each(tmp_path: Path, tiny_base_folder: Path) -> None:
    # The key is made up for this test: a value that `data add` would refuse is not shown.
    key = "AKIA" + "Q7T2ZXPLM4N6VBKD"
    question = "A ball is dropped from the top of a tower of 20 metres. How long does it fall?"
    rows = [[f"q0-{number}", question, "B", key] for number in range(3)]
    objects = [dict(zip(("c0", "c1", "c2", "c3"), row, strict=True)) for row in rows]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    write_jsonl(tmp_path / "rows.jsonl", rows)
    write_jsonl(tmp_path / "objects.jsonl", objects)
    as_csv(tmp_path / "table.csv", objects)
    book = openpyxl.Workbook()
    for row in ([*objects[0]], *rows):
        book.active.append(row)
    book.save(tmp_path / "table.xlsx")
    pq.write_table(pa.Table.from_pylist(objects), tmp_path / "table.parquet")

    project = tiny_project(tmp_path / "project", tiny_base_folder)
    for file in sorted(tmp_path.glob("*.*")):
        names = ("0", "1", "2", "3") if file.stem == "rows" else tuple(objects[0])
        expected = '{} ("q0-0"), {} ("A ball is dropped from the top of a tow…"), {} ("B"), {}\n'.format(*names)
        added, checked = (
            tunewright("data", "add", file, "-p", project),
            tunewright("data", "check", file, "-p", project),
        )
        proposed = tunewright("init", tmp_path / "new", "--data", file)
        for ran, output in ((proposed, proposed.stderr), (added, added.stderr), (checked, checked.stdout)):
            assert ran.code == 2
            assert f"Columns: {expected}" in output
            assert key not in ran.stdout + ran.stderr
        unknown = tunewright("data", "add", file, "--input", names[1], "--output", "answers", "-p", project)
        assert expected in unknown.stderr


@pytest.mark.parametrize("given", [("--input", "message"), ("--output", "category")])
def test_init_finds_the_column_that_is_not_named(tmp_path: Path, given: tuple[str, str]) -> None:
    file = tmp_path / "tickets.csv"
    lines = [f"{number},parcel {number} is late,{'delivery' if number % 2 else 'refund'}\n" for number in range(60)]
    file.write_text("".join(["ticket_id,message,category\n", *lines]), encoding="utf-8")
    tunewright("init", tmp_path / "p", "--data", file, *given, "--json")
    data = config_of(tmp_path / "p")["data"]
    assert (data["input"], data["output"]) == ("message", "category")


def test_page_on_metrics_names_the_metric_that_init_writes() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "metrics.md").read_text(encoding="utf-8")
    section = page.partition("## Which metric for which task")[2].partition("\n## ")[0]
    first = dict(re.findall(r"^\| (\w+ ?\w*).*? \| [^|]*?`(.+?)`", section, re.MULTILINE))
    rows = {"labels": "labels", "short facts": "short", "function calls": "calls", "summaries": "text", "chat": "chat"}
    metrics = {str(name): task.metric for name, task in TASKS.items()}
    assert {row: first[row] for row in rows} == {row: metrics[task] for row, task in rows.items()}
    settings = yaml.safe_load(section.partition("```yaml\n")[2].partition("```")[0])
    assert Config(name="labels", **settings).evaluate.structured_outputs is not None


def test_init_names_an_instruction_with_the_labels_if_all_rows_were_read(tmp_path: Path) -> None:
    def printed(labels: int, rows: int, *options: str, system: str = "") -> str:
        turns = [{"role": "system", "content": system}] if system else []
        write_jsonl(
            tmp_path / "a.jsonl",
            [
                {"messages": [*turns, {"role": "user", "content": f"is {n} late"}, _answer(f'the "{n % labels}"')]}
                for n in range(rows)
            ],
        )
        project = tmp_path / f"p{len(list(tmp_path.iterdir()))}"
        ran = tunewright("init", project, "--data", tmp_path / "a.jsonl", *options)
        assert "system_prompt" not in config_of(project)["data"]
        lines = [line for line in ran.stdout.splitlines() if line.startswith("Instruction: ")]
        assert len(lines) == (not system)
        return "".join(lines)

    # As YAML, the text in quotes is the instruction.
    shown = printed(2, 999).removeprefix("Instruction: none. data.system_prompt in tunewright.yaml adds one, such as ")
    assert yaml.safe_load(f"system_prompt: {shown}") == {"system_prompt": 'Answer with one of: the "0", the "1".'}
    assert 'the \\"19\\"."' in printed(20, 200)
    general = "Instruction: none (data.system_prompt in tunewright.yaml adds one, for every prompt)"
    assert {printed(21, 210), printed(2, 1_001), printed(2, 60, "--task", "short")} == {general}
    assert not printed(2, 60, system="Answer briefly.")


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_init_takes_the_task_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = tunewright("init", "p", "--data", FILES["labels"](Path()), "--task", "text", "--json")
    assert ran.document["metric"] == "rouge_l"
    assert config_of(tmp_path / "p")["data"]["sources"] == ["../a.csv"]
    assert config_of(tmp_path / "p")["evaluate"] == {"metric": "rouge_l", "extra_metrics": ["chrf"]}


@pytest.mark.parametrize(
    ("content", "named"),
    [('{"messages": [{"role": "user"}], "id": 3}\n', "a.jsonl:1"), ("", "a.jsonl"), (None, "a.jsonl")],
)
def test_init_names_the_fault_of_an_unusable_file(content: str | None, named: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    if content is not None:
        file.write_text(content)
    ran = tunewright("init", tmp_path / "p", "--data", file, "--json")
    assert (ran.code, (tmp_path / "p").exists()) == (2, False)
    assert named in ran.document["error"]["where"]


def test_init_asks_for_file_columns_and_task_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"Frage": f"Wo {n}?", "Antwort": f"Dort {n}", "Kategorie": "AB"[n % 2], "Notiz": ""} for n in NUMBERS]
    as_csv(tmp_path / "tickets.csv", rows, ";")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    terminal = Terminal("init", "my-model")
    for shown, typed in (
        ("tickets.csv)", "missing.csv"),
        ("missing.csv: No such file", ""),  # Enter accepts the proposed file
        ("Column of the input", "Frage"),
        ("Column of the output", "Notiz"),
        ("None of the first rows is an example", "~/tickets.csv"),
        ("Column of the input", "Frage"),
        ("Column of the output", "Kategorie"),
        ("Task", ""),
    ):
        terminal.wait_for(shown)
        os.write(terminal.handle, f"{typed}\n".encode())
    terminal.wait_for("cd my-model && tunewright data add")
    assert terminal.code() == 0
    config = config_of(tmp_path / "my-model")
    source = str(tmp_path / "tickets.csv")
    assert config["data"] == {"sources": [source], "input": "Frage", "output": "Kategorie"}
    assert config["evaluate"] == {"metric": "exact_match"}


def test_init_decides_later_and_writes_nothing_when_the_input_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    terminal = Terminal("init", "ended")
    terminal.wait_for("later")
    os.write(terminal.handle, b"\x04")  # Ctrl-D
    assert (terminal.code(), Path("ended").exists()) == (130, False)
    terminal = Terminal("init", "later")
    terminal.wait_for("later")
    os.write(terminal.handle, b"\n")
    assert (terminal.code(), config_of(Path("later"))) == (0, {"name": "later", "train": BUNDLED_TRAINING})


def test_init_asks_nothing_without_an_open_input(tmp_path: Path) -> None:
    program = f"exec '{sys.executable}' -m tunewright init '{tmp_path / 'p'}' <&-"
    ran = subprocess.run(["sh", "-c", program], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr, (tmp_path / "p" / "tunewright.yaml").exists()) == (0, "", True)


def test_init_takes_the_folders_name_and_names_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Ärzte & Ämter").mkdir()
    monkeypatch.chdir(tmp_path / "Ärzte & Ämter")
    ran = tunewright("init")
    assert "Name: arzte-amter, from the folder (--name chooses another)\n" in ran.stdout
    assert "Base model: bundled:smollm2-135m-instruct (base_model in tunewright.yaml names another" in ran.stdout
    assert "Next: name your files under data.sources in tunewright.yaml, then: tunewright run\n" in ran.stdout
    assert config_of(Path())["train"] == BUNDLED_TRAINING
    monkeypatch.chdir(tmp_path)
    tunewright("init", "llama", "--base", "meta-llama/Llama-3.1-8B-Instruct")
    assert "train" not in config_of(Path("llama"))
    ran = tunewright("init", "long" * 20, "--json")
    assert ran.document["name"] == ("long" * 10)
    assert tunewright("config", "show", "-p", "long" * 20).code == 0
    names = {
        "Jörg Müller": "jorg-muller",
        "Straße_Ærø": "strasse-aero",
        "İstanbul Łódź": "istanbul-lodz",
        "模型": "my-model",
    }
    assert {folder: project_name(tmp_path / folder) for folder in names} == names


def test_init_names_what_works_for_a_set_that_is_too_small_to_train_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"input": f"parcel {n}", "output": "ab"[n % 2]} for n in range(40)]
    ran = tunewright("init", "small", "--data", as_csv(Path("a.csv"), rows))
    assert "About 32 training pairs, and training requires 50" in ran.stdout
    assert ran.stdout.endswith("Next: cd small && tunewright data add ../a.csv && tunewright advise\n")


def test_init_reads_all_files_and_writes_the_split_that_their_names_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train", "test"):
        as_csv(Path(f"{name}.csv"), [{"input": f"{name} {n}", "output": "ab"[n % 2]} for n in range(40)])
    ran = tunewright("init", "p", "--data", "test.csv", "--data", "./train.csv")
    assert "2 different answers in 80 rows" in ran.stdout
    assert "Split: train.csv is train, test.csv is test, by their names; dev is drawn from train (data.s" in ran.stdout
    assert "About 36 training pairs, and training requires 50" in ran.stdout
    assert "tunewright data add ../train.csv ../test.csv && tunewright advise" in ran.stdout
    assert "seem to be a split" not in ran.stderr
    given = {"train": "../train.csv", "test": "../test.csv"}
    assert config_of(Path("p"))["data"]["sources"] == [{"path": path, "split": split} for split, path in given.items()]
    added = tunewright("data", "add", "train.csv", "test.csv", "-p", "p", "--json").document
    assert added["version"]["counts"]["test"] == 40
    as_csv(Path("Validation_2.csv"), [{"input": f"dev {n}", "output": "ab"[n % 2]} for n in range(9)])
    ran = tunewright(
        "init", "v", *(word for name in ("train", "test", "Validation_2") for word in ("--data", f"{name}.csv"))
    )
    assert "Validation_2.csv is dev, by their names (data.s" in ran.stdout and "About 40 training pairs" in ran.stdout


def test_init_writes_no_split_that_the_names_of_files_leave_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train", "test", "train_test", "more", "val"):
        as_csv(Path(f"{name}.csv"), [{"input": f"{name} {n}", "output": "ab"[n % 2]} for n in range(40)])
    for number, names in enumerate((("train", "test", "more"), ("train", "train_test"), ("train", "val"), ("test",))):
        ran = tunewright("init", f"{number}", *(word for name in names for word in ("--data", f"{name}.csv")))
        assert (ran.code, "Split:" in ran.stdout) == (0, False)
        assert config_of(Path(f"{number}"))["data"]["sources"] == [f"../{name}.csv" for name in names]
    assert (
        "train.csv and test.csv seem to be a split by their authors"
        in tunewright("init", "p", "--data", "train.csv", "--data", "test.csv", "--data", "more.csv").stderr
    )


def test_init_refuses_files_without_examples_and_several_for_an_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    as_csv(Path("a.csv"), [{"input": f"{n}", "output": "ab"[n % 2]} for n in range(40)])
    Path("labels.json").write_text('["a", "b"]')
    ran = tunewright("init", "q", "--data", ".")
    assert (ran.code, Path("q").exists()) == (2, False)
    assert "labels.json:1: None of the first rows is an example" in ran.stderr
    ran = tunewright("init", "q", "--example", "bfcl", "--data", "a", "--data", "b")
    assert (ran.code, "--example takes one --data (got 2)" in ran.stderr) == (2, True)


def test_init_refuses_a_name_before_it_reads_data(tmp_path: Path) -> None:
    ran = tunewright("init", tmp_path / "p", "--data", FILES["labels"](tmp_path), "--name", "Not a name")
    assert (ran.code, "CSV" in ran.stderr, (tmp_path / "p").exists()) == (2, False, False)
    assert "Invalid project name 'Not a name'" in ran.stderr


def test_init_reads_no_data_for_a_folder_that_has_a_project(tmp_path: Path) -> None:
    file = FILES["labels"](tmp_path)
    assert tunewright("init", tmp_path / "p").code == 0
    ran = tunewright("init", tmp_path / "p", "--data", file)
    assert (ran.code, "Already there: tunewright.yaml" in ran.stderr, "CSV" in ran.stderr) == (2, True, False)


def test_no_command_names_three_ways_to_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = tunewright()
    assert ran.code == 0
    for command in ("tunewright demo", "tunewright init my-model", "tunewright studio", "tunewright --help"):
        assert command in ran.stdout
    assert list(tmp_path.iterdir()) == []


def test_no_command_in_a_project_names_its_state_and_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = FILES["labels"](tmp_path)
    assert tunewright("init", "--data", file).code == 0
    assert "Next: tunewright run\n" in tunewright().stdout
    assert tunewright("data", "add", file).code == 0
    program = (
        "import sys; from tunewright.cli import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "60 rows: 48 train, 6 dev, 6 test" in ran.stdout
    assert "48 training pairs, and training requires 50" in ran.stdout
    assert "Next: tunewright data review, or without a review tunewright advise\n" in ran.stdout
    more = as_csv(tmp_path / "b.csv", [{"utterance": f"{n} more of it", "intent": "more"} for n in NUMBERS])
    assert tunewright("data", "add", more).code == 0
    assert "Next: tunewright data review, or without a review tunewright run\n" in tunewright().stdout
    (tmp_path / "tunewright.yaml").write_text("nmae: x\n")
    broken = tunewright()
    assert (broken.code, broken.stdout, "nmae" in broken.stderr) == (2, "", True)


def test_training_is_not_next_after_advice_not_to_train(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tiny_project(tmp_path / "p", tiny_base_folder)
    assert tunewright("data", "add", project / "pairs.jsonl", "-p", project).code == 0
    monkeypatch.chdir(project)
    dataset = tunewright_package.open(project).data.version().digest
    signals = make_signals(
        lineage={"dataset": dataset},
        break_even=break_even((None, None, None), saving=-0.001),
        gain=gain(-10, -15, -6, slope=doubling(50, 100, 0, -1, 0)),
    )
    folder = ProjectFolder(project)
    file = folder.advice / f"{signals.id}.json"
    AccessLog(folder.evaluations).write(file, json_document(signals.model_dump(mode="json")))
    assert "Next: follow the advice (retrieve), or to train anyway: tunewright run\n" in tunewright().stdout
    review = tunewright_package.open(project).data.review("ada")
    while (row := review.next()) is not None:
        review.judge(row, "right")
    with serving(Studio(project, "ada", password=PASSWORD).app()) as url, opened(url) as browser:
        page = browser.get("/")
        assert "Follow the advice (retrieve), or train anyway." in page and '<span class="tag">next' not in page
        file.unlink()
        assert '<h2>Train <span class="tag">next' in browser.get("/")


def test_no_command_names_training_after_a_verdict_on_an_earlier_version(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tiny_project(tmp_path / "p", tiny_base_folder)
    assert tunewright("data", "add", project / "pairs.jsonl", "-p", project).code == 0
    save(ProjectFolder(project).evaluations / "0123456789ab", make_items(40, tuned=0.3, retrieved=0.7))
    monkeypatch.chdir(project)
    shown = tunewright().stdout
    assert "0 trained on the current version" in shown and "Verdict   don't ship" in shown
    assert "Next: tunewright run\n" in shown


def test_no_command_names_the_next_step_of_the_newest_verdict(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tiny_project(tmp_path / "p", tiny_base_folder)
    assert tunewright("data", "add", project / "pairs.jsonl", "-p", project).code == 0
    dataset, items = tunewright_package.open(project).data.version().digest, make_items(40, tuned=0.3, retrieved=0.7)
    evidence = make_evidence(items)
    evidence = evidence.model_copy(
        update={"lineage": {**evidence.lineage, "dataset": dataset}, "dev_arms": evidence.arms}
    )
    save(ProjectFolder(project).evaluations / "0123456789ab", items, evidence)
    adapter = project / "adapters" / "small-1"
    for folder in (adapter, adapter.with_name("small-2")):
        folder.mkdir(parents=True)
    lineage = {"created": "2026", "digest": evidence.lineage["adapter"]["digest"], "dataset": {"digest": dataset}}
    write_jsonl(adapter / "lineage.json", [lineage])
    monkeypatch.chdir(project)
    shown = tunewright().stdout
    assert "Advise    prompting measured on dev: best arm retrieved-4, " in shown
    (cause, *_) = tunewright("verdict", "--json").document["causes"]
    assert f"Next: {cause['next']}\n" in shown
    write_jsonl(adapter.with_name("small-2") / "lineage.json", [{**lineage, "created": "2027", "digest": "0"}])
    assert "Next: tunewright evaluate\n" in tunewright().stdout


def test_no_command_shows_the_state_when_a_training_has_just_finished(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tiny_project(tmp_path / "p", tiny_base_folder)
    work = project / ".tunewright" / "training"
    work.mkdir(parents=True)
    (work / "0123456789ab").symlink_to(work / "removed")  # listed, and gone when it is looked at
    monkeypatch.chdir(project)
    ran = tunewright()
    assert (ran.code, "Training" in ran.stdout) == (0, False)
    (work / "ba9876543210").mkdir()
    (work / "ba9876543210" / "metrics.jsonl").write_text("damaged\n")
    ran = tunewright()
    assert (ran.code, "Training stopped (" in ran.stdout) == (0, True)


@pytest.mark.slow
def test_no_command_names_a_training_and_the_command_that_resumes_it(
    tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = training_project(tmp_path / "p", tiny_base_folder, Heard(after=3))
    with pytest.raises(KeyboardInterrupt):
        project.train()
    monkeypatch.chdir(tmp_path / "p")
    assert re.search(r"Training stopped after step [234]: tunewright train\n", tunewright().stdout)
    assert "Next: tunewright train, which resumes it" in tunewright().stdout
    (work,) = (tmp_path / "p" / ".tunewright" / "training").iterdir()
    with locked_folder(work, UserError("busy")):  # as a training does
        shown = tunewright().stdout
    assert "Training in progress after step " in shown and "Next" not in shown
    training_project(tmp_path / "p", tiny_base_folder, Heard()).train()
    work.mkdir()  # of another config
    shown = tunewright().stdout
    assert "1 adapter, 1 trained on the current version" in shown
    assert "Training stopped after step 0: tunewright train\nNext: tunewright run\n" in shown


def test_serve_without_an_adapter_says_that_only_the_base_is_served(tiny_base_folder: Path, tmp_path: Path) -> None:
    heard = Heard()
    service = tunewright_package.open(tiny_project(tmp_path / "p", tiny_base_folder), heard).serve(
        options=ServeOptions(port=0)
    )
    assert service.models == [str(tiny_base_folder)]
    assert [line for line in heard.warned if "only the base" in line]


def test_check_of_few_rows_says_what_one_test_row_can_show(tiny_base_folder: Path, tmp_path: Path) -> None:
    project = tiny_project(tmp_path / "p", tiny_base_folder, count=12)
    for command in (
        ("data", "check", project / "pairs.jsonl"),
        ("data", "add", project / "pairs.jsonl"),
        ("data", "check"),
    ):
        ran = tunewright(*command, "-p", project)
        assert "1 test cluster: no difference can be significant" in " ".join(ran.stderr.split()), command


def test_hint_to_install_kernels_is_kept_from_the_terminal() -> None:
    import tunewright.models  # noqa: F401

    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
