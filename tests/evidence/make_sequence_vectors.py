"""Write the boundaries of confseq and glide-py to ``sequence_vectors.json``, next to this script.

    python tests/evidence/make_sequence_vectors.py confseq    # Python 3.10 with confseq 0.0.11 and Boost's headers
    python tests/evidence/make_sequence_vectors.py glide-py   # Python 3.12 or newer with glide-py 0.11.0

Each run replaces one library's vectors. Neither library is a dependency, and no test runs this script.
"""

import json
import random
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("sequence_vectors.json")


def confseq() -> dict[str, Any]:
    """Return gamma-exponential mixture bounds."""
    bound = import_module("confseq.boundaries").gamma_exponential_mixture_bound
    squares = [0.01, 1.0, 2.5, 10.0, 49.0, 300.0, 5000.0]
    cases = []
    for largest in (1.0, 3.0, 9.0, 39.0):
        for alpha, tightest_at in ((0.025, 50.0), (0.05, 20.0), (0.005, 200.0)):
            bounds = [bound(v, alpha, tightest_at, largest, alpha) for v in squares]
            cases.append({"largest": largest, "alpha": alpha, "tightest_at": tightest_at, "bounds": bounds})
    return {"squares": squares, "cases": cases}


def glide() -> dict[str, Any]:
    """Return lower bounds of a mean from twelve batches."""
    numpy, monitors = import_module("numpy"), import_module("glide.monitors")
    draw = random.Random(0)
    batches = [draw.choices([-1, 0, 1], [1, 6, 2], k=20) for _ in range(12)]
    cases = []
    for alpha, tightest_at in ((0.025, 10), (0.05, 4)):
        found = monitors.AsymptoticClassicalRM().detect(
            numpy.array(batches, dtype=float).ravel(),
            numpy.repeat(numpy.arange(12), 20),
            higher_is_better=False,
            threshold=0.0,
            confidence_level=1 - alpha,
            tightest_at_batch=tightest_at,
        )
        low = found.confidence_sequence.confidence_bounds.tolist()
        cases.append({"alpha": alpha, "tightest_at_batch": tightest_at, "low": low})
    return {"batches": batches, "cases": cases}


if __name__ == "__main__":
    vectors = json.loads(FILE.read_text()) if FILE.exists() else {}
    library = sys.argv[1]
    made = {"confseq": confseq, "glide-py": glide}[library]()
    vectors[library] = {"version": version(library), **made}
    FILE.write_text(json.dumps(vectors) + "\n")
