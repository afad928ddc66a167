"""`evaluate.engine` through the command line, with a stand-in for vLLM: what is refused, and what evidence says."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from making.command_line import Ran, copy_dataset, trained_project, tunewright
from making.vllm_child import alive, children_of, install_fake, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project with a trained adapter, and nothing measured."""
    folder = tmp_path_factory.mktemp("engine") / "project"
    return trained_project(folder, tiny_base_folder, ("epochs: 2", "epochs: 1\n  eval_max_samples: 0"))


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    """The trained project without its evaluations."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("adapters", "pairs.jsonl"):
        (folder / name).symlink_to(trained / name)
    copy_dataset(trained, folder)
    (folder / "tunewright.yaml").write_text((trained / "tunewright.yaml").read_text())
    return folder


def _with(project: Path, *lines: str) -> Path:
    """The project with more lines in the config's section evaluate."""
    config = project / "tunewright.yaml"
    added = "".join(f"  {line}\n" for line in lines)
    config.write_text(config.read_text().replace("evaluate:\n", f"evaluate:\n{added}"))
    return project


def _refused(ran: Ran, *words: str) -> None:
    assert ran.code == 2, (ran.code, ran.stdout, ran.stderr)
    assert "Traceback" not in ran.stderr
    message = " ".join(ran.stderr.split())
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("command", [("evaluate",), ("evaluate", "--dev"), ("advise", "--no-pilot"), ("crossval",)])
def test_vllm_that_is_not_installed_is_refused_before_the_test_split_is_opened(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: tuple[str, ...]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ran = tunewright(*command, "-p", _with(project, "engine: vllm"))
    _refused(ran, "evaluate.engine", "vLLM is not installed", "tunewright engine install vllm")
    assert not (project / "evaluations").exists()


def test_vllm_with_a_grammar_is_refused_before_the_test_split_is_opened(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install_fake(monkeypatch, tmp_path)
    ran = tunewright("evaluate", "-p", _with(project, "engine: vllm", "structured_outputs: {choices: [red, green]}"))
    _refused(ran, "evaluate.engine", "evaluate.structured_outputs", "Set it to auto or peft")
    assert not (project / "evaluations").exists()


def test_evidence_comparison_report_and_comment_name_the_engine(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install_fake(monkeypatch, tmp_path)
    config = project / "tunewright.yaml"
    own = config.read_text()
    ran = tunewright("evaluate", "-p", _with(project, "engine: vllm"), "--json")
    assert ran.code == 0, ran.stderr
    evidence = ran.document["evidence"]
    assert evidence["engine"] == {
        "name": "vllm",
        "version": "0.32.0",
        "packages": {"vllm": "0.32.0", "torch": "2.13.0+fake"},
        "device": "cpu",
        "dtype": "float32",
        "rows": 32,
        "why": "evaluate.engine says so",
    }
    assert "in float32 with vllm: batches of " in evidence["noise_floor"]["how"]
    assert evidence["noise_floor"]["changed"] == 0
    assert "Loading" not in ran.stderr, "no base in this process"
    again = tunewright("evaluate", "-p", project)
    assert "vllm 0.32.0 (cpu, float32): evaluate.engine says so" in " ".join(again.stdout.split())
    assert "Starting vLLM" not in again.stderr
    assert tunewright("evaluate", "--dev", "-p", project, "--json").document["evidence"]["engine"]["name"] == "vllm"
    assert "engine vllm 0.32.0" in tunewright("verdict", "--markdown", "-p", project).stdout
    folder = project / "evaluations" / evidence["id"]
    assert tunewright("report", folder, "-p", project).code == 0
    page = (folder / "report.html").read_text()
    assert "arms were answered by vllm 0.32.0 (cpu, float32)" in page

    # The same evaluation by the other engine is another one, with answers of its own.
    config.write_text(own)
    other = tunewright("evaluate", "-p", project, "--json")
    assert other.code == 0, other.stderr
    assert other.document["evidence"]["engine"]["name"] == "peft"
    assert other.document["evidence"]["engine"]["why"] == "there is no CUDA card"
    assert other.document["evidence"]["id"] != evidence["id"]
    assert "Answers are computed by peft: there is no CUDA card." in " ".join(other.stderr.split())


@pytest.mark.fault("kill", "evaluate")
@pytest.mark.fault("engine", "evaluate")
def test_evaluate_resumes_from_the_journal_after_a_kill_that_also_ends_vllm(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install_fake(monkeypatch, tmp_path)
    monkeypatch.setenv("FAKE_TOKEN_SECONDS", "0.2")
    _with(project, "engine: vllm", "batch_size: 1", "max_new_tokens: 2")
    command = [sys.executable, "-m", "tunewright", "evaluate", "-p", str(project)]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: len(_answered(project)) >= 4)
        (server,) = children_of(running.pid)
    finally:
        running.kill()
        running.wait()
    wait_until(lambda: not alive(server))
    kept = _answered(project)
    monkeypatch.setenv("FAKE_TOKEN_SECONDS", "0")
    ran = tunewright("evaluate", "-p", project, "--json")
    assert ran.code == 0, ran.stderr
    answered = _answered(project)
    assert set(kept) <= set(answered)
    assert len(answered) == len(set(answered)), "nothing that was answered is answered again"


def _answered(project: Path) -> list[tuple[str, str]]:
    """Journal and prompt of each answer, in the order of the files' times."""
    journals = sorted((project / ".tunewright" / "generations").glob("*.jsonl"), key=lambda j: j.stat().st_ctime_ns)
    found = []
    for journal in journals:
        for line in journal.read_text().split("\n"):
            with suppress(json.JSONDecodeError):
                found.append((journal.name, str(json.loads(line)["prompt"])))
    return found
