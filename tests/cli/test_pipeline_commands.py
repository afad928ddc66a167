"""The whole pipeline through the command line, on a tiny base: each stage's output, files and exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from making.command_line import tiny_project, tunewright
from tunewright.adapters.registry import find_adapter
from tunewright.config.project import ProjectFolder
from tunewright.models.sources import high_rate


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project after one run of the whole pipeline."""
    folder = tiny_project(tmp_path_factory.mktemp("road") / "project", tiny_base_folder)
    ran = tunewright("run", "--project", folder, "--json")
    assert ran.code in {0, 3, 4}, ran.stderr
    return folder


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nsys.argv = ['tunewright', '--help']\nfrom tunewright.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "run" in done.stdout


_WITHOUT_TORCH = """
import sys
from making.command_line import tunewright
for words in sys.argv[1:]:
    ran = tunewright(*words.split())
    assert ran.code == 2, (words, ran)
    assert "torch" not in sys.modules, words
    print(ran.stderr.splitlines()[0])
"""


def test_what_config_and_disk_refuse_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    for name, before, after in (
        ("empty", "sources:", "#sources:"),
        ("wrong", "train:", "train:\n  lora_rank: 4"),
        ("child", "train:", "train:\n  from: nobody"),
    ):
        config = tiny_project(tmp_path / name, tmp_path) / "tunewright.yaml"
        config.write_text(config.read_text().replace(before, after))
    assert tunewright("data", "add", tmp_path / "child" / "pairs.jsonl", "-p", tmp_path / "child").code == 0
    refused = {
        "empty train": "dataset: There is no dataset version yet",
        "empty train --sweep": "dataset: There is no dataset version yet",
        "empty crossval": "dataset: There is no dataset version yet",
        "empty run": "data.sources: ",
        "wrong run": "lora_rank",
        "wrong train": "lora_rank",
        "child evaluate": "adapters: No adapter has been trained yet",
        "child regressions": "adapters: No adapter has been trained yet",
        "child evaluate --minutes 0": "--minutes: Must be a finite number greater than 0 (got 0)",
        "child advise --minutes nan": "--minutes: Must be a finite number greater than 0 (got nan)",
        "child train --sweep --minutes inf": "--minutes: Must be a finite number greater than 0 (got inf)",
        "child train": "train.from: ",
        "child train --curve": "train.from",
    }
    commands = [f"{words} -p {tmp_path / name}" for name, words in (each.split(" ", 1) for each in refused)]
    program, path = [sys.executable, "-c", _WITHOUT_TORCH, *commands], os.pathsep.join(sys.path)
    done = subprocess.run(program, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line, expected in zip(done.stdout.splitlines(), refused.values(), strict=True):
        assert expected in line


def test_run_leaves_faulty_rows_out_with_skip_bad(tmp_path: Path) -> None:
    project = tiny_project(tmp_path / "project", tmp_path, count=20)
    with (project / "pairs.jsonl").open("a") as file:
        file.write("{}\n")
    refused = tunewright("run", "-p", project)
    assert (refused.code, "1 faulty row" in refused.stderr, "--skip-bad" in refused.stderr) == (2, True, True)
    skipped = tunewright("run", "--skip-bad", "-p", project)  # too few rows for a verdict, once they are added
    assert (skipped.code, "Warning: 1 faulty row left out" in skipped.stderr) == (2, True)
    assert tunewright("data", "log", "-p", project, "--json").document["versions"]


def test_init_never_overwrites_a_config(tmp_path: Path) -> None:
    assert tunewright("init", tmp_path / "new").code == 0
    config = (tmp_path / "new" / "tunewright.yaml").read_text()
    assert "# LoRA rank" in config
    again = tunewright("init", tmp_path / "new")
    assert (again.code, "Already there: tunewright.yaml" in again.stderr) == (2, True)
    assert (tmp_path / "new" / "tunewright.yaml").read_text() == config


def test_init_example_creates_a_complete_project(tmp_path: Path) -> None:
    assert tunewright("init", "--example", "legal-citations", tmp_path).code == 0
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) > 1_500
    assert {"prompt": "Ravenna Municipal Court, Ohio", "completion": "Oh. Muni. Ct., Ravenna"} in rows
    assert tunewright("config", "show", "--project", tmp_path, "--json").document["train"]["learning_rate"] == 1e-3
    unknown = tunewright("init", "--example", "recipes", tmp_path / "other")
    assert (unknown.code, "legal-citations" in unknown.stderr) == (2, True)


def test_init_sets_the_rate_of_packaged_bases_and_a_large_base_is_warned_of_it(tmp_path: Path) -> None:
    for folder, options in (("named", ["--base", "package:gemma-3-270m"]), ("default", [])):
        assert tunewright("init", tmp_path / folder, *options).code == 0
    rates = {name: ProjectFolder(tmp_path / name).config.train.learning_rate for name in ("named", "default")}
    assert rates == {"named": 1e-3, "default": 1e-3}
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(3 * 10**9)  # takes no room on the disk
    assert "0.001 suits the bundled base" in str(high_rate(1e-3, tmp_path))
    assert (high_rate(9e-4, tmp_path), high_rate(1e-3, tmp_path / "named")) == (None, None)


def test_run_reuses_every_finished_stage(project: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in project.rglob("*") if p.is_file() and p.name != "report.html"}
    ran = tunewright("run", "--project", project)
    assert [line.split(":")[0] for line in ran.stderr.splitlines() if "unchanged" in line] == [
        "data",
        "advise",
        "train",
        "evaluate",
    ]
    after = {p: p.stat().st_mtime_ns for p in project.rglob("*") if p.is_file() and p.name != "report.html"}
    assert after == before


def test_verdict_needs_only_the_evidence(project: Path, tmp_path: Path) -> None:
    ran = tunewright("verdict", "--project", project, "--json")
    assert ran.code == {"ship": 0, "don't ship": 3, "can't tell": 4}[ran.document["decision"]]
    evaluation = next(p for p in (project / "evaluations").iterdir() if p.is_dir())
    assert tunewright("verdict", evaluation, "--project", project, "--json") == ran
    assert tunewright("verdict", evaluation.name, "--project", project, "--json") == ran
    elsewhere = tmp_path / "evidence.json"
    elsewhere.write_bytes((evaluation / "evidence.json").read_bytes())
    alone = tunewright("verdict", elsewhere, "--project", tmp_path, "--json")
    assert (alone.code, alone.stdout) == (ran.code, ran.stdout)


def test_verdict_outside_a_project_names_the_missing_config(tmp_path: Path) -> None:
    ran, other = (tunewright(command, "--project", tmp_path, "--json") for command in ("verdict", "report"))
    assert (ran.code, ran.document) == (2, other.document)
    assert ran.document["error"]["where"].endswith("tunewright.yaml")


def test_verdict_names_both_metrics_when_the_config_has_another(project: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(project, tmp_path / "other"))
    config = other / "tunewright.yaml"
    assert "evaluate.metric" not in tunewright("verdict", "-p", other).stderr
    config.write_text(config.read_text().replace("evaluate:\n", "evaluate:\n  metric: token_f1\n"))
    ran = tunewright("verdict", "-p", other)
    assert "evaluate.metric" in ran.stderr
    assert "F1 of words" in ran.stderr or "token" in ran.stderr
    config.write_text("nmae: x\n")
    assert tunewright("verdict", "-p", other).stdout == ran.stdout


def test_evidence_matches_the_items(project: Path) -> None:
    evidence = tunewright("evaluate", "--project", project, "--json").document["evidence"]
    folder = project / "evaluations" / evidence["id"]
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().split("\n") if line]
    assert len(items) == evidence["items"]
    near = [item["nearest"] for item in items]
    for band in evidence["train_similarity"]["bands"]:
        last = band["high"] == 1
        assert sum(band["low"] <= each < band["high"] or (last and each == 1) for each in near) == band["items"] > 0
    assert sum(band["items"] for band in evidence["train_similarity"]["bands"]) == len(items)
    for arm in evidence["arms"]:
        right = sum(item["answers"][arm["name"]].strip() == item["reference"] for item in items)
        assert arm["scores"]["exact_match"]["value"] == right / len(items)
        assert sum(item["scores"]["exact_match"][arm["name"]] for item in items) == right
    decisive = evidence["contrasts"][0]
    assert decisive["control"] == evidence["best_prompting"]


def test_lineage_names_data_base_template_and_config(project: Path) -> None:
    adapter = find_adapter(project / "adapters")
    lineage = adapter.lineage
    version = tunewright("data", "log", "--project", project, "--json").document["versions"][-1]
    assert lineage["dataset"]["digest"] == version["digest"]
    assert lineage["dataset"]["splits"]["test"]["digest"] == version["splits"]["test"]
    assert set(lineage["base"]["files"]) >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert lineage["config"]["train"]["lora_r"] == 16
    assert {"torch", "peft", "trl", "transformers"} <= set(lineage["packages"])
    assert len(lineage["template_digest"]) == 64


def test_project_files_do_not_name_the_machine(project: Path) -> None:
    """But for the base, which the config itself gives as a path here."""
    written = [*(project / "dataset").rglob("*"), *(project / "adapters").rglob("*.json")]
    for path in (p for p in written if p.is_file()):
        assert str(project) not in path.read_text(), path


def test_evaluate_refuses_an_adapter_of_another_dataset_version(project: Path, tmp_path: Path) -> None:
    """Its training rows may be test rows now."""
    import shutil

    from making.command_line import pairs, write_jsonl

    other = Path(shutil.copytree(project, tmp_path / "other"))
    assert tunewright("data", "add", write_jsonl(tmp_path / "more.jsonl", pairs(20, seed=9)), "-p", other).code == 0
    ran = tunewright("evaluate", "--project", other)
    assert (ran.code, "was trained on dataset version" in ran.stderr) == (2, True)


def test_evaluate_warns_of_an_adapter_trained_with_another_config(project: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(project, tmp_path / "other"))
    config = other / "tunewright.yaml"
    for before, after, message in (
        ("save_steps: 5", "save_steps: 9", False),
        ("epochs: 2", "epochs: 3", True),
    ):
        config.write_text(config.read_text().replace(before, after))
        ran = tunewright("evaluate", "--project", other)
        assert (ran.code, "train section has changed" in ran.stderr) == (0, message)


def test_evaluate_refuses_an_adapter_of_another_base(project: Path, tmp_path: Path) -> None:
    import shutil

    from making.tiny_bases import build_base

    other = Path(shutil.copytree(project, tmp_path / "other"))
    build_base(tmp_path / "base", seed=1)
    text = (other / "tunewright.yaml").read_text()
    base_line = next(line for line in text.splitlines() if line.startswith("base_model:"))
    (other / "tunewright.yaml").write_text(text.replace(base_line, f"base_model: {tmp_path / 'base'}"))
    adapter = find_adapter(other / "adapters").name
    for command in (["evaluate"], ["serve", adapter]):
        ran = tunewright(*command, "--project", other)
        assert (ran.code, "The adapter was trained on" in ran.stderr) == (2, True)


def test_run_refuses_few_pairs_without_force(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder, count=55)
    for command in ("run", "train"):
        ran = tunewright(command, "--project", folder)
        assert (ran.code, "43 training pairs, fewer than 50" in ran.stderr, "--force" in ran.stderr) == (2, True, True)
    ran = tunewright("run", "--force", "--project", folder)
    assert ran.code in {0, 3, 4}
    assert ran.stderr.count("Training anyway because of --force") == 1
    assert find_adapter(folder / "adapters").lineage["forced"].startswith("43 training pairs")
