"""Effects of `import tunewright` itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("load", "given", "expected"),
    [
        (100.0, {}, "3000"),
        (0.0, {}, "None"),
        (100.0, {"GOMP_SPINCOUNT": "7"}, "7"),
        (100.0, {"OMP_WAIT_POLICY": "active"}, "None"),
    ],
)
def test_import_bounds_the_spins_of_openmp_on_a_busy_machine(load: float, given: dict[str, str], expected: str) -> None:
    ours = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    environment = {name: value for name, value in os.environ.items() if name not in ours} | given
    program = (
        f"import os, sys; os.getloadavg = lambda: ({load}, 0, 0); import tunewright;"
        "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True, text=True)
    assert ran.stdout.split() == [expected, "False"]
