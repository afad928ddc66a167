"""benchmarks/gpu_proof.py at toy size: every case, killed and resumed, with the packages of docs/gpu.md alone."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from making.hidden_packages import without

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu_cases.page import BEGIN, END, headlines, page_table, rows_of  # noqa: E402
from gpu_cases.plan import MODELS, cases  # noqa: E402
from gpu_cases.reporting import PEAK_FLOPS  # noqa: E402
from gpu_proof import Run, untested_torch  # noqa: E402

PROOF = ROOT / "benchmarks" / "gpu_proof.py"
COMMAND_LINE = "command-line"
SHARDED = "fsdp"
MANY_ADAPTERS = "vllm-adapters"
WHOLE = (COMMAND_LINE, SHARDED, MANY_ADAPTERS)
"""Cases that need all of tunewright's dependencies."""
OTHERS = [case.name for case in cases() if case.name not in WHOLE]
OOM = "out-of-memory/training"
CUT_IN = "parity"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="toy runs are compared with a machine without a card")


def listed_packages() -> set[str]:
    """Names of the distributions that docs/gpu.md says the cases need, and of those that these require."""
    text = (ROOT / "docs" / "gpu.md").read_text()
    block = re.search(r"<!-- packages -->\n```text\n(.*?)```", text, re.DOTALL)
    assert block, "docs/gpu.md lists the packages"
    found: set[str] = set()
    waiting = block[1].split()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        # What a listed package requires on other systems is not installed here.
        with suppress(PackageNotFoundError):
            needed = map(Requirement, requires(name) or [])
            waiting += [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def without_others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the tunewright dependencies that docs/gpu.md does not list cannot be imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    declared = {canonicalize_name(Requirement(text).name) for text in needed}
    others = declared - listed_packages()
    hidden = sorted(
        module
        for module, owners in packages_distributions().items()
        if others & {canonicalize_name(owner) for owner in owners}
    )
    assert {"sqlalchemy", "scipy", "sklearn"} <= set(hidden)
    return without(hidden, tmp_path_factory.mktemp("hidden"))


def proof(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the script to its end."""
    command = [sys.executable, str(PROOF), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def only_document(folder: Path) -> dict[str, Any]:
    """The one results file in a folder; empty without one."""
    files = list(folder.glob("*.json"))
    document: dict[str, Any] = json.loads(files[0].read_text()) if files else {"cases": {}}
    return document


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, without_others: dict[str, str]) -> Path:
    """The results file of a run that was killed within a case."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, str(PROOF), "--toy", "--out", str(folder), "--only", *OTHERS]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=without_others
    )
    until = time.monotonic() + 300
    while not only_document(folder)["cases"].get(CUT_IN, {}).get("measurements"):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return next(folder.glob("*.json"))


@pytest.fixture(scope="module")
def resumed(killed: Path, tmp_path_factory: pytest.TempPathFactory, without_others: dict[str, str]) -> Any:
    """The rest of it: what the script printed, its exit code, and the results."""
    folder = tmp_path_factory.mktemp("resumed")
    ended = proof("--toy", "--out", folder, "--done", killed, "--only", *OTHERS, env=without_others)
    return ended, only_document(folder)


@pytest.mark.slow
def test_gpu_proof_runs_every_case_with_the_listed_packages_alone(resumed: Any) -> None:
    ended, document = resumed
    assert ended.returncode == 0, ended.stdout + ended.stderr
    states = {name: state["state"] for name, state in document["cases"].items()}
    # Neither is installed here, or it needs a card.
    skipped = {name for name in OTHERS if name.endswith(("/unsloth", "/tunewright-liger")) or "out-of-memory" in name}
    assert states == {name: "skipped" if name in skipped else "done" for name in OTHERS}
    assert all(document["cases"][name]["why"] for name in skipped)


@pytest.mark.slow
def test_gpu_proof_keeps_what_was_done_and_repeats_what_was_cut(killed: Path, resumed: Any) -> None:
    before = json.loads(killed.read_text())["cases"]
    ended, document = resumed
    finished = {name for name, state in before.items() if state["state"] == "done"}
    assert finished >= set(OTHERS[: OTHERS.index(CUT_IN)])
    assert finished < set(OTHERS)
    for name in finished:
        assert document["cases"][name] == before[name]
        assert f"{name}: done before" in ended.stdout
    for name in before.keys() - finished:
        assert before[name]["state"] == "cut"
        assert document["cases"][name]["state"] == "done"
        assert f"{name}: done before" not in ended.stdout


@pytest.mark.slow
def test_gpu_proof_sides_start_from_the_same_loss(resumed: Any) -> None:
    _, document = resumed
    for model in MODELS:
        first = [
            document["cases"][f"{model}/{side}"]["measurements"][0]["values"]["first_loss"]
            for side in ("tunewright", "trl-plain", "trl-padding-free")
        ]
        # The same weights and the same rows; LoRA adds nothing before the first step.
        assert max(first) / min(first) < 1.002


@pytest.mark.slow
def test_gpu_proof_prints_a_row_for_every_headline(resumed: Any) -> None:
    ended, document = resumed
    rows = rows_of(document)
    assert [row.title for row in rows] == [headline.title for headline in headlines()]
    assert all(row.title in ended.stdout for row in rows)
    outcomes = {row.title: row.outcome for row in rows}
    assert outcomes["LoRA gradients of a packed batch against rows one by one"] == "met"
    assert outcomes["2B on disk: `train`, killed, resumed, `evaluate`, `serve`"] == "not yet run"
    assert all(row.measured for row in rows if row.outcome in ("met", "measured"))


@pytest.mark.slow
def test_gpu_proof_trains_kills_resumes_and_evaluates_by_the_command_line(tmp_path: Path) -> None:
    ended = proof("--toy", "--out", tmp_path, "--only", COMMAND_LINE)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = {each["name"]: each for each in only_document(tmp_path)["cases"][COMMAND_LINE]["measurements"]}
    assert all(found[name]["passed"] for name in ("train, killed", "train, resumed", "evaluate", "serve"))
    assert found["train, resumed"]["values"]["from_step"] == found["train, killed"]["values"]["checkpoint"]
    assert "tuned" in found["evaluate"]["values"]["arms"]


@pytest.mark.slow
def test_gpu_proof_trains_in_two_processes_with_half_of_the_base_each(tmp_path: Path) -> None:
    ended = proof("--toy", "--out", tmp_path, "--only", SHARDED)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (found,) = only_document(tmp_path)["cases"][SHARDED]["measurements"]
    assert found["passed"]
    assert found["values"]["steps"] > 1
    assert 0.45 < found["values"]["most_held_bytes"] / found["values"]["whole_bytes"] < 0.55


@pytest.mark.slow
def test_gpu_proof_tests_the_isolation_of_more_adapters_than_slots(tmp_path: Path) -> None:
    """Without a card peft answers in place of vLLM: base, adapters, probes and checks are those of a card."""
    ended = proof("--toy", "--out", tmp_path, "--only", MANY_ADAPTERS)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (found,) = only_document(tmp_path)["cases"][MANY_ADAPTERS]["measurements"]
    assert (found["passed"], found["values"]["engine"], found["values"]["slots"]) == (True, "peft", None)
    assert found["values"]["adapters"] == 6
    assert found["values"]["requests"] > 100


def test_gpu_proof_says_what_is_left_when_time_is_over(tmp_path: Path) -> None:
    ended = proof("--toy", "--minutes", "1e-9", "--out", tmp_path, "--only", "ceilings", "nf4-bits")
    assert ended.returncode == 4, ended.stderr
    assert "Cut by --minutes 1e-09 with 2 of 2 cases left: ceilings, nf4-bits" in ended.stdout


@pytest.mark.slow
def test_gpu_proof_ends_a_case_at_its_limit_and_runs_the_next(tmp_path: Path) -> None:
    script = f"""
import dataclasses, sys, time
from pathlib import Path
sys.path.insert(0, {str(PROOF.parent)!r})
from gpu_proof import Run, cases
if __name__ == "__main__":
    first = cases()[0]
    listed = [dataclasses.replace(first, name="slow", seconds=0), dataclasses.replace(first, name="bad", module="no")]
    document = {{"card": "toy", "date": "2026-01-01", "cases": {{}}}}
    Run(document, Path({str(tmp_path / "out.json")!r}), time.monotonic() + 300, toy=True, forked=False).run(listed)
"""
    (tmp_path / "script.py").write_text(script)
    subprocess.run([sys.executable, tmp_path / "script.py"], check=True)
    states = only_document(tmp_path)["cases"]
    assert (states["slow"]["state"], states["slow"]["why"]) == ("failed", "not done within 0 s")
    assert states["bad"]["state"] == "failed"
    assert states["bad"]["why"].startswith("ModuleNotFoundError")
    assert "traceback" in states["bad"]


def test_gpu_proof_without_a_card_says_so_and_what_toy_does(tmp_path: Path) -> None:
    ended = proof("--out", tmp_path)
    assert ended.returncode == 2
    assert "no CUDA card can be used here: " in ended.stderr
    assert "nvidia_smi FileNotFoundError" in ended.stderr
    assert "--toy runs every case at toy size" in ended.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--minutes", "0"), "--minutes must be greater than 0 (got 0)"),
        (("--done", "nowhere.json"), "--done: there is no file nowhere.json"),
        (("--done", str(ROOT / "constraints.txt")), "is not a results file of gpu_proof"),
    ],
)
def test_gpu_proof_refuses_wrong_usage(arguments: tuple[str, ...], what: str, tmp_path: Path) -> None:
    ended = proof("--toy", "--out", tmp_path, *arguments)
    assert ended.returncode == 2
    assert what in ended.stderr
    assert "Traceback" not in ended.stderr


def test_gpu_proof_refuses_results_of_another_card(tmp_path: Path) -> None:
    file = tmp_path / "H100.json"
    file.write_text(json.dumps({"card": "NVIDIA H100", "date": "2026-01-01", "cases": {}}))
    ended = proof("--toy", "--out", tmp_path, "--done", file)
    assert ended.returncode == 2
    assert "it has results of NVIDIA H100, and this run is on toy" in ended.stderr


@pytest.mark.parametrize(
    ("version", "tested"), [("2.10.0", False), ("2.11.0", True), ("2.13.0+cu130", True), ("2.14.0", False)]
)
def test_gpu_proof_warns_of_a_torch_outside_the_tested_versions(version: str, tested: bool) -> None:
    assert (untested_torch(version) is None) == tested


def test_peak_flops_finds_the_longest_name_of_a_card_first() -> None:
    names = list(PEAK_FLOPS)
    assert not [(a, b) for place, a in enumerate(names) for b in names[place + 1 :] if a in b]


@pytest.mark.slow
def test_gpu_page_shows_memory_and_the_faster_of_two_sides_of_a_card(resumed: Any) -> None:
    _, document = resumed
    document = json.loads(json.dumps(document))
    ours = document["cases"]["8b-lora/tunewright"]["measurements"]
    ours[0]["values"] |= {"row_tokens_s": 30.0, "allocated_bytes": 20 * 10**9, "reserved_bytes": 22 * 10**9, "mfu": 0.4}
    (memory,) = [each for each in ours if each["name"] == "memory"]
    memory["passed"] = True
    peaks = {"allocated_bytes": 20 * 10**9, "reserved_bytes": 22 * 10**9}
    memory["values"] |= peaks | {"predicted_bytes": 19 * 10**9, "predicted_reserved_bytes": 21 * 10**9}
    for side, speed in (("trl-plain", 10.0), ("trl-padding-free", 15.0)):
        values = document["cases"][f"8b-lora/{side}"]["measurements"][0]["values"]
        values |= {"row_tokens_s": speed, "allocated_bytes": 30 * 10**9}
    rows = {row.title: row for row in rows_of(document)}
    ratio = rows["8B LoRA: against the faster of trl's plain and padding-free"]
    assert ratio.measured.startswith("2.00 times as fast as trl-padding-free (15 tokens/s)")
    assert ratio.measured.endswith("20 GB against 30 GB")
    row = rows["8B LoRA: memory"]
    assert (row.measured, row.outcome) == (
        "predicted 19 GB, allocated 20 GB (-5.0%), reserved 22 GB of 21 GB",
        "met",
    )
    document["cases"]["8b-lora/trl-padding-free"] |= {"state": "skipped", "why": "trl-padding-free ran out of memory"}
    (ratio,) = [row for row in rows_of(document) if row.title == ratio.title]
    assert ratio.measured.startswith("3.00 times as fast as trl-plain")


def test_gpu_proof_compares_liger_with_the_models_own_code() -> None:
    from gpu_cases.plan import OURS
    from gpu_cases.training import config_of

    used = {side: config_of(8, 1, nf4=False, **keys).train.use_liger_kernel for side, keys in OURS.items()}
    assert used == {side: side == "tunewright-liger" for side in OURS}


def test_gpu_page_is_what_the_results_say() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text()
    _, _, rest = text.partition(BEGIN)
    assert rest.partition(END)[0].strip() == page_table(ROOT / "benchmarks" / "results" / "gpu")


def test_gpu_page_shows_the_computed_table() -> None:
    from card_roofline import table

    document = json.loads((ROOT / "benchmarks" / "results" / "card_roofline.json").read_text())
    _, _, rest = (ROOT / "docs" / "gpu.md").read_text().partition("<!-- computed: begin -->")
    shown, _, after = rest.partition("<!-- computed: end -->")
    assert shown.strip() == table(document)
    assert f"Computed on {document['date']} with torch {document['versions']['torch']}" in after


@pytest.mark.slow
def test_gpu_page_shows_the_newest_card_and_what_was_not_run(tmp_path: Path, resumed: Any) -> None:
    _, document = resumed
    (tmp_path / "a.json").write_text(json.dumps({**document, "card": "NVIDIA H100 80GB HBM3"}))
    (tmp_path / "b.json").write_text(json.dumps({"card": "NVIDIA L4", "date": "2026-01-01", "cases": {}}))
    lines = page_table(tmp_path).splitlines()
    (speed,) = [line for line in lines if line.startswith("| 8B LoRA: speed")]
    assert f"measured on NVIDIA H100 80GB HBM3, {document['cases']['8b-lora/tunewright']['date']}" in speed
    (disk,) = [line for line in lines if line.startswith("| 2B on disk")]
    assert disk.endswith("| not yet run |")


@pytest.mark.slow
def test_gpu_page_names_a_missed_bar(tmp_path: Path, resumed: Any) -> None:
    _, document = resumed
    document = json.loads(json.dumps(document))
    document["cases"]["parity"]["measurements"][0]["passed"] = False
    (tmp_path / "a.json").write_text(json.dumps(document))
    assert any("**MISSED**" in line for line in page_table(tmp_path).splitlines() if "LoRA gradients" in line)


@pytest.mark.slow
def test_gpu_proof_repeats_failed_cases_after_those_never_run(tmp_path: Path) -> None:
    today = "2026-01-01"
    done = {"state": "done", "date": today, "seconds": 1.0, "measurements": []}
    missed = done | {"measurements": [{"name": "copy", "passed": False, "values": {}}]}
    before = {"segments/fixed": done, "ceilings": missed, OOM: done | {"state": "failed", "why": "broken"}}
    file = tmp_path / "before.json"
    file.write_text(json.dumps({"card": "toy", "date": today, "cases": before}))
    chosen = ["ceilings", "attention", "segments/fixed", OOM]
    ended = proof("--toy", "--out", tmp_path / "out", "--done", file, "--only", *chosen)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    after = re.findall(r"^(\S+): (?:done|skipped) after", ended.stdout, re.MULTILINE)
    assert after == ["attention", "ceilings", OOM]
    assert "segments/fixed: done before" in ended.stdout


def test_gpu_proof_starts_only_cases_that_can_end_in_time(tmp_path: Path) -> None:
    document: dict[str, Any] = {"card": "card", "date": "2026-01-01", "cases": {}}
    run = Run(document, tmp_path / "out.json", time.monotonic() + 60, toy=False, forked=True)
    listed = {case.name: case for case in cases()}
    assert run._fits(listed["ceilings"])
    assert not run._fits(listed["command-line"])
