"""``--log-format json`` and traces of commands, as a collector of logs and one of traces get them."""

from __future__ import annotations

import datetime
import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from making.command_line import Ran, tiny_project, tunewright
from making.otlp_collector import collector
from tunewright.cli.live import JsonReporter, LineTask, json_log


def _records(ran: Ran) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ran.stderr.splitlines()]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project without data."""
    return tiny_project(tmp_path_factory.mktemp("logs") / "project", tiny_base_folder)


def test_messages_warnings_and_result_are_one_object_a_line(project: Path) -> None:
    ran = tunewright("--log-format", "json", "data", "add", project / "pairs.jsonl", "-p", project, "--json")
    assert ran.code == 0
    records = _records(ran)
    assert {"info", "warning"} == {each["level"] for each in records}
    for each in records:
        assert each["logger"] == "tunewright"
        assert datetime.datetime.fromisoformat(each["time"]).tzinfo is not None
    assert len(ran.stdout.splitlines()) == 1
    assert ran.document["version"]


def test_error_has_its_place_and_its_fix_in_fields(project: Path) -> None:
    ran = tunewright("--log-format", "json", "train", "--minutes", "3", "-p", project)
    assert ran.code == 2
    (record,) = _records(ran)
    assert record["level"] == "error"
    assert record["message"] == "--minutes requires --sweep"
    assert (record["where"], record["fix"]) == ("--minutes", "Add --sweep.")


def test_variable_of_the_environment_chooses_the_format(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEWRIGHT_LOG_FORMAT", "json")
    (record,) = _records(tunewright("train", "--minutes", "3", "-p", project))
    assert record["level"] == "error"


def test_progress_has_its_numbers_in_fields(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    monkeypatch.setattr(LineTask, "every_s", 0.0)
    with json_log(quiet=False), JsonReporter(Console(stderr=True)).task("Training", 4, "steps") as task:
        task.measured(1, {"loss": 2.5})
        task.advance()
        task.advance()
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (first["task"], first["done"], first["total"], first["unit"]) == ("Training", 1, 4, "steps")
    assert first["measured"] == {"step": 1, "loss": 2.5}
    assert "measured" not in second


def test_libraries_and_pythons_warnings_are_lines_too(capsys: pytest.CaptureFixture[str]) -> None:
    with json_log(quiet=True):
        logging.getLogger("httpx").warning("slow\nserver")
        logging.getLogger("tunewright").info("not shown by this process")
        warnings.warn("old", stacklevel=1)
        try:
            raise ValueError("odd")
        except ValueError:
            logging.getLogger("other").exception("failed")
    first, second, third = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (first["logger"], first["level"], first["message"]) == ("httpx", "warning", "slow\nserver")
    assert second["logger"] == "py.warnings"
    assert "ValueError: odd" in third["exception"]


def test_unexpected_exception_and_stop_are_lines(tmp_path: Path) -> None:
    code = "from tunewright.cli.live import json_log\nwith json_log(quiet=False):\n    raise ValueError('odd')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    (record,) = (json.loads(line) for line in done.stderr.splitlines())
    assert record["level"] == "critical"
    assert "Traceback" in record["exception"]
    command = [sys.executable, "-m", "tunewright", "--log-format", "json", "studio", "--port", "0", "--no-browser"]
    process = subprocess.Popen(
        [*command, "-p", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    for line in errors.splitlines():
        json.loads(line)


def test_command_is_a_span_with_its_tasks_and_its_log_has_their_ids(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    assert tunewright("data", "add", project / "pairs.jsonl", "-p", project).code == 0
    with collector() as found:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
        monkeypatch.setenv("TRACEPARENT", f"00-{trace}-{parent}-01")
        ran = tunewright("--log-format", "json", "train", "-p", project)
        assert ran.code == 0
    job, training = found.one("tunewright train"), found.one("Training tiny")
    assert (job.trace, job.parent) == (trace, parent)
    assert training.parent == job.id
    assert training.attributes["tunewright.unit"] == "steps"
    assert job.start <= training.start <= training.end <= job.end
    assert {each.get("trace_id") for each in _records(ran)} == {trace}


def test_unreachable_collector_does_not_fail_a_command(project: Path) -> None:
    variables = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    command = [sys.executable, "-m", "tunewright", "config", "show", "-p", str(project)]
    assert subprocess.run(command, env=variables, capture_output=True, check=False, timeout=300).returncode == 0
