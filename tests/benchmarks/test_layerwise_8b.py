"""benchmarks/layerwise_8b.py at toy size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "layerwise_8b.py"


@pytest.mark.slow
def test_layerwise_trains_over_nf4_and_writes_peak_and_estimate(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "layerwise.json"
    subprocess.run([sys.executable, SCRIPT, "--toy", "--out", out], check=True, capture_output=True)
    found = json.loads(out.read_text())
    assert found["shape"] == "toy"
    assert len(found["losses"]) == len(found["gradient_norms"]) == found["steps"]
    # The first step's rate is 0 (warm-up): the second has the same loss, the third another.
    first, second, third = found["losses"]
    assert first == second
    assert third != second
    assert found["peak_bytes"] >= 0
    assert found["predicted_bytes"] > 0
