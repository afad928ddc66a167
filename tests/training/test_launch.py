"""The launcher of several processes: its exit code is that of the process that failed."""

from __future__ import annotations

import subprocess
import sys

import pytest

# torchrun replaces $$ by $.
KILLED = "kill -9 $$$$"


@pytest.mark.slow
@pytest.mark.parametrize(("script", "code"), [("exit 2", 2), (KILLED, 1)])
def test_exit_code_of_a_process_is_that_of_the_launcher(script: str, code: int) -> None:
    command = [sys.executable, "-m", "tunewright.training.launch", "--standalone", "--nproc-per-node=1", "--no-python"]
    ran = subprocess.run([*command, "sh", "-c", script], capture_output=True, text=True)
    assert ran.returncode == code, ran.stderr
