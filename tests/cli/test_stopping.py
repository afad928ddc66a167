"""Ctrl-C and SIGTERM: announced at once, over within seconds, and what is left can be used."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from making.command_line import pairs, tunewright, write_jsonl

pytestmark = pytest.mark.slow

PATIENCE_S = 300
"""A guard against tests that hang, no expectation."""

BUSY = """
import hashlib, sys, threading, time

import typer

from tunewright.cli.console import RESUMES, session
from tunewright.cli.stopping import mark_command_process

mark_command_process()
try:
    with session({as_json}, kept=RESUMES, log_json={log_json}):
        {before}
        print("busy", flush=True)
        {work}
except typer.Exit as end:
    sys.exit(end.exit_code)
"""
NATIVE = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2_000_000_000)"
"""Minutes in which Python gives the main thread no chance to handle a signal."""
PATIENT = f"import tunewright.cli.stopping; tunewright.cli.stopping.PATIENCE_S = {PATIENCE_S}"
"""A busy machine may leave the main thread no time to clean up within the usual seconds."""
THREAD = "threading.Thread(target=time.sleep, args=(600,)).start()"
"""A thread that the interpreter's end waits for."""


def _started(
    work: str, *, before: str = "pass", as_json: bool = False, log_json: bool = False
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY.format(before=before, work=work, as_json=as_json, log_json=log_json)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "busy\n"
    if work == NATIVE:
        # A signal that came before the native call would end the command as any other work.
        spent = psutil.Process(process.pid).cpu_times().user
        while psutil.Process(process.pid).cpu_times().user < spent + 0.1:
            time.sleep(0.01)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_is_announced_and_command_exits_with_130(number: signal.Signals) -> None:
    # A signal between the last bytecode and one long sleep would be handled only after the sleep.
    process = _started("while True: time.sleep(0.01)", before=PATIENT)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, stdout) == (130, "")
    kept = "what was finished is kept, and the same command resumes from there"
    assert stderr.split("\n\n") == [
        "\nStopping. Ctrl-C again ends at once.",
        f"Stopped; {kept}.\n",
    ]


def test_requested_stop_is_no_error_in_the_log_of_a_job() -> None:
    process = _started("while True: time.sleep(0.01)", before=PATIENT, log_json=True)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    last = json.loads(stderr.splitlines()[-1])
    assert (last["level"], last["message"].partition(";")[0]) == ("info", "Stopped")


@pytest.mark.parametrize(("before", "work"), [("pass", NATIVE), (THREAD, "time.sleep(600)")])
def test_command_ends_while_its_main_thread_or_exit_waits(before: str, work: str) -> None:
    process = _started(work, before=before)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "\nStopping. Ctrl-C again ends at once.\n" in stderr
    assert stderr.endswith("\nStopped at once; what was finished is kept, and the same command resumes from there.\n")


@pytest.mark.parametrize("work", [NATIVE, "\n        try: time.sleep(600)\n        finally: time.sleep(600)"])
def test_second_signal_ends_command_before_the_timeout(work: str) -> None:
    process = _started(work)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    message = ""
    while "Ctrl-C again ends at once." not in message:
        message += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    with process:
        # A second KeyboardInterrupt in the main thread may be quicker than the watcher.
        ended = r"Stopped( at once)?; what was finished is kept, and the same command resumes from there\.\n"
        assert re.search(f"{ended}$", process.stderr.read())
    assert process.returncode == 130


def test_json_is_one_document_when_second_signal_ends_command() -> None:
    process = _started(NATIVE, as_json=True)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert json.loads(stdout)["error"]["what"].startswith("Stopped at once; what was finished is kept")


def _stopped_on_terminal(seen: str, *arguments: str | Path) -> tuple[int, str]:
    """Run a command on a terminal, press Ctrl-C once it shows ``seen``, and return its exit code and screen."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tunewright", *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"},
    )
    os.close(theirs)
    screen, pressed, until = "", False, time.monotonic() + 4 * PATIENCE_S
    while time.monotonic() < until:
        ready, _, _ = select.select([ours], [], [], 0.1)
        if ready:
            try:
                screen += os.read(ours, 65536).decode(errors="replace")
            except OSError:  # Linux: the other side is closed
                break
        if not pressed and seen in screen:
            process.send_signal(signal.SIGINT)
            pressed = True
    assert pressed, screen
    code = process.wait(PATIENCE_S)
    os.close(ours)
    return code, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)


def test_data_add_adds_nothing_when_stopped(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "tunewright.yaml").write_text(f"name: tiny\nbase_model: {tiny_base_folder}\n")
    many = write_jsonl(folder / "many.jsonl", pairs(60_000))
    code, screen = _stopped_on_terminal("reading", "data", "add", many, "-p", folder)
    assert code == 130
    message = " ".join(screen.split())
    assert "Stopping. Ctrl-C again ends at once." in message
    assert message.count("nothing was added; run the same command again.") == 1
    assert "Traceback" not in screen
    assert tunewright("data", "log", "-p", folder, "--json").document["versions"] == []
    few = write_jsonl(folder / "few.jsonl", pairs(60))
    assert tunewright("data", "add", few, "-p", folder, "--json").document["added"] == 60
