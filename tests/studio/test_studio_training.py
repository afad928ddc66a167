"""The studio's pages on training: runs from the trainer's own files, comparison, sweeps and learning curves."""

from __future__ import annotations

import json
import re
import time
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from making.evidence import make_history
from making.full_evidence import CURVE
from making.small_adapters import write_adapter
from making.studio_client import Browser
from tunewright.adapters.registry import HISTORY, Adapter, store_adapter
from tunewright.core.errors import UserError
from tunewright.core.io import digest, write_json
from tunewright.core.locks import is_locked, locked_folder
from tunewright.evidence.learning_curve import CURVE_FILE
from tunewright.report.training import sweep_lines
from tunewright.studio.jobs import Jobs
from tunewright.training.history import DEV_ANSWERS, append_dev_answers
from tunewright.training.sweep.ledger import Head, Ledger

pytest_plugins = ["studio_fixtures"]

RUN = "0123456789ab"
_BUSY = UserError("Another process is training this adapter")


def _lineage(rate: float, inputs: str) -> dict[str, Any]:
    return {
        "created": f"2026-11-28T10:00:0{inputs[0]}+00:00",
        "inputs_digest": inputs,
        "base": {"spec": "bundled:tiny", "digest": digest("base")},
        "dataset": {"digest": digest("rows")},
        "config": {"seed": 0, "train": {"learning_rate": rate, "lora_r": 8}},
        "training": {"metric": "exact_match"},
    }


def _adapter(project: Path, rate: float, inputs: str) -> Adapter:
    weights = write_adapter(project / "weights", weights=None)
    (weights / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "rate": rate}))
    lineage = _lineage(rate, inputs)
    return store_adapter(project / "adapters", "tiny", weights, {}, lineage, make_history(), servable=False)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "tunewright.yaml").write_text("name: tiny\n")
    return tmp_path


def _write_run(project: Path, steps: int = 12) -> Path:
    folder = project / ".tunewright" / "training" / RUN
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HISTORY).write_text("".join(json.dumps(row) + "\n" for row in make_history(steps)))
    return folder


def _figures(html: str) -> list[str]:
    """The titles of the page's figures."""
    return re.findall(r"<svg [^>]*>\s*<title[^>]*>([^<]*)</title>", html)


def test_run_in_progress_is_shown_with_its_numbers_and_as_stopped_without_its_process(
    browser: Browser, project: Path
) -> None:
    folder = _write_run(project)
    with locked_folder(folder, _BUSY):
        page = browser.get(f"/train/runs/{RUN}")
        assert 'id="live"' in page
        assert "running" in browser.get("/train")
    assert _figures(page) == [
        "Training and dev loss, and the score on dev, by optimizer step",
        "Learning rate × 10,000 by step",
    ]
    assert " style=" not in page, "the Content-Security-Policy forbids inline styles"
    assert f"{make_history(12)[-1]['loss']:.4g}" in page
    stopped = browser.get(f"/train/runs/{RUN}")
    assert 'id="live"' not in stopped and "resumes from its last checkpoint" in stopped
    assert not is_locked(folder)


@pytest.mark.parametrize("line", ["not json", '{"step": 1, "epoch": 1, "loss": NaN}', "[1]", "\udcff"])
def test_damaged_metrics_are_one_message_and_other_runs_stay(browser: Browser, project: Path, line: str) -> None:
    other = _adapter(project, 0.001, "1" * 64)
    folder = _write_run(project)
    (folder / HISTORY).write_bytes(f"{line}\n".encode(errors="surrogateescape"))
    refused = browser.client.get(f"/train/runs/{RUN}")
    assert refused.status_code == 400 and HISTORY in refused.text and "Traceback" not in refused.text
    overview = browser.get("/train")
    assert HISTORY in overview and other.name in overview and "at step 30" in overview


def test_answers_to_dev_rows_are_shown_where_they_change(browser: Browser, project: Path) -> None:
    folder, key = _write_run(project), digest("row")
    for step, text in ((10, "first"), (20, "first"), (30, "<b>last</b>"), (20, "second")):
        append_dev_answers(folder, step, {key: text})
    page = browser.get(f"/train/runs/{RUN}")
    shown = re.findall("<dt>Step ([0-9]+)</dt><dd[^>]*>(.*?)</dd>", page)
    assert shown == [("30", "&lt;b&gt;last&lt;/b&gt;"), ("20", "second"), ("10", "first")]
    assert "the current dataset version does not have" in page
    (folder / DEV_ANSWERS).write_text('{"step": 1}\n')
    assert f"{DEV_ANSWERS}:1" in browser.client.get(f"/train/runs/{RUN}").text


def test_compared_runs_show_what_differs_and_their_curves(browser: Browser, project: Path) -> None:
    names = [_adapter(project, rate, str(number) * 64).name for number, rate in enumerate((0.001, 0.002))]
    page = browser.get("/train/compare?" + "&".join(f"run.{name}=on" for name in names))
    assert "train.learning_rate" in page and "0.001" in page and "0.002" in page
    assert "lora_r" not in page, "it is the same in both"
    assert _figures(page) == ["Training loss by step", "Dev loss by step", "Dev: exact match, % by step"]
    assert all(page.count(f">{name}</text>") == 3 for name in names), "in each legend"
    assert page.count(">75.0%, dev loss 0.669</td>") == 2
    few = browser.client.get(f"/train/compare?run.{names[0]}=on").text
    assert "at least two runs (got 1)" in few and "Compare the marked runs" in few
    assert f'aria-label="Compare {names[0]}" checked' in few and f'aria-label="Compare {names[1]}">' in few


def test_sweep_and_curve_are_read_from_their_files(browser: Browser, project: Path) -> None:
    head = Head(
        sweep="5" * 12,
        dataset="d",
        base="b",
        template="t",
        metric="exact_match",
        steps=20,
        rungs=(10, 20),
        trials={name: {"preset": name, "learning_rate": 0.001, "inputs": digest(name)} for name in ("classic", "all")},
    )
    ledger = Ledger(project / "sweeps" / head.sweep, head)
    for name, score in (("classic", 0.25), ("all", 0.5)):
        ledger.add("measured", name, 1, 10, steps=10, seconds=30.0, dev_loss=1.25, dev_metric=score)
    ledger.decide("out", "classic", 1, 10, "50.0% is better")
    write_json(project / "curves" / CURVE.id / CURVE_FILE, CURVE.model_dump(mode="json"))
    overview = browser.get("/train")
    assert head.sweep in overview and CURVE.id in overview
    page = unescape(browser.get(f"/train/sweeps/{head.sweep}"))
    assert "25.0%, loss 1.250" in page and "out at rung 1: 50.0% is better" in page and "not reached" in page
    assert _figures(page) == ["Dev: exact match, % of each trial by step"]
    assert [line.points for line in sweep_lines(ledger).lines] == [((10, 25.0),), ((10, 50.0),)]
    page = unescape(browser.get(f"/train/curves/{CURVE.id}"))
    assert "Would more data help? Yes" in page and "1,782" in page
    assert _figures(page) == [f"Score on {CURVE.items} dev items by training rows"]
    ledger.path.write_text("{}\n")
    (project / "curves" / CURVE.id / CURVE_FILE).write_text("{}")
    for path in (
        f"/train/sweeps/{head.sweep}",
        f"/train/curves/{CURVE.id}",
        "/train/sweeps/.hidden",
        "/train/curves/x",
    ):
        refused = browser.client.get(path)
        assert refused.status_code in (400, 404) and "Traceback" not in refused.text, path


def test_forms_start_the_commands_of_the_terminal(browser: Browser, project: Path) -> None:
    """There are no rows, so each command ends at once; its words are what counts."""
    jobs = Jobs(project / ".tunewright" / "jobs", project)
    forms = [
        ({"kind": "train"}, ["train"]),
        (
            {"kind": "sweep", "minutes": "5", "rates": "0.001 2e-4", "write": "on"},
            ["train", "--sweep", "--minutes", "5", "--rate", "0.001", "--rate", "2e-4", "--write"],
        ),
        ({"kind": "curve", "seeds": "2"}, ["train", "--curve", "--seeds", "2"]),
    ]
    for fields, words in forms:
        page = browser.send("/train", "/train", **fields)
        job = jobs.find(page.url.path.rpartition("/")[2])
        assert list(job.command[: len(words)]) == words
        while job.state == "running":
            job.stop()
            time.sleep(0.05)
    assert len(jobs.all()) == 3
    for fields in ({"kind": "sweep", "minutes": "--force"}, {"kind": "curve", "seeds": "0"}, {"kind": "rm"}):
        assert browser.send("/train", "/train", **fields).status_code == 400
    assert len(jobs.all()) == 3
