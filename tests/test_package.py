"""Effects of `import tunewright` itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("load", "running", "given", "expected"),
    [
        (100.0, 100, {}, "3000"),
        (0.0, 100, {}, "None"),
        (100.0, 1, {}, "None"),  # a program that has ended, such as the server that this one replaces
        (100.0, 100, {"GOMP_SPINCOUNT": "7"}, "7"),
        (100.0, 100, {"OMP_WAIT_POLICY": "active"}, "None"),
    ],
)
def test_import_bounds_the_spins_of_openmp_on_a_busy_machine(
    load: float, running: int, given: dict[str, str], expected: str
) -> None:
    ours = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    environment = {name: value for name, value in os.environ.items() if name not in ours} | given
    program = (
        f"import os, pathlib, sys; os.getloadavg = lambda: ({load}, 0, 0);"
        f"pathlib.Path.read_text = lambda path: 'cpu 1 procs_running {running} procs_blocked 0';"
        "import tunewright; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True, text=True)
    assert ran.stdout.split() == [expected, "False"]
