"""Domain projects that run: what ``tunewright init --example`` writes.

``legal-citations``, court name and location to citation abbreviation, is a real formatting task from the
package ``courts-db``. The folders of the other examples are in the repository's ``examples``; a wheel
contains them here. ``prepare_NAME.py`` makes their config and rows, and every other file is copied.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

from tunewright.config.io import write_config
from tunewright.config.project import CONFIG_FILE
from tunewright.config.train import BUNDLED_TRAINING
from tunewright.core.errors import UserError
from tunewright.core.packages import COURTS, open_member
from tunewright.core.progress import LogReporter, Reporter

LEGAL_CITATIONS = "legal-citations"
NAMES = (LEGAL_CITATIONS, "bfcl", "orders")
PAIRS_FILE = "pairs.jsonl"


def example_files(name: str, data: Path | None, reporter: Reporter) -> dict[str, str]:
    """Return the files of the example project ``name``; ``data`` is the data folder if the example has no data."""
    if name not in NAMES:
        raise UserError(f"Unknown example {name!r}", where="--example", fix=f"Use {' or '.join(NAMES)}.")
    if data is not None and name != "bfcl":
        raise UserError(f"The example {name} brings its own data", where="--data", fix="Remove the option.")
    if name == LEGAL_CITATIONS:
        return project_files(reporter)
    here = Path(__file__).parent
    folder = here / name if (here / name).is_dir() else here.parents[2] / "examples" / name
    prepare = folder / f"prepare_{name}.py"
    copied = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("[!.]*.*") if path != prepare}
    prepared: dict[str, str] = runpy.run_path(str(prepare))["project_files"](data, reporter)
    return copied | prepared


def project_files(reporter: Reporter | None = None, *, quick: bool = False) -> dict[str, str]:
    """Return the project's files by name; ``quick`` is for a run of a few minutes on two cores."""
    with open_member(COURTS, "courts_db/data/courts.json", reporter or LogReporter()) as file:
        courts = json.load(file)
    pairs = sorted(
        {
            (f"{court['name'].strip()}, {court['location'].strip()}", court["citation_string"].strip())
            for court in courts
            if court["citation_string"].strip()
        }
    )
    lines = [json.dumps({"prompt": p, "completion": c}, ensure_ascii=False) + "\n" for p, c in pairs]
    return {CONFIG_FILE: config_text(quick=quick), PAIRS_FILE: "".join(lines), "README.md": _readme(len(pairs))}


_SECTIONS: dict[str, dict[str, Any]] = {
    "data": {"sources": [PAIRS_FILE], "system_prompt": "Give the citation abbreviation of this court."},
    "train": BUNDLED_TRAINING | {"epochs": 2},
    # Without the default's 16 demonstrations: retrieved, they would add two thirds to the time of all arms.
    "evaluate": {"num_fewshot": [1, 2, 4, 8]},
}
_QUICK: dict[str, dict[str, Any]] = {
    # The evaluation at step 50 keeps an earlier checkpoint, which answers the demo's second tenant.
    "train": {"epochs": 1, "eval_steps": 50, "eval_max_samples": 96},
    # With the whole config, the retrieved arms with 4 and 8 demonstrations lead (docs/benchmarks/evaluation.md).
    "evaluate": {
        "num_fewshot": [4, 8],
        "static_seeds": 2,
        "screening_items": 48,
        "finalists": 2,
        "tuned_retrieved": False,
        "batch_size": 64,
    },
    "regressions": {"samples": 16},
}
"""Changes for a quick run. The data, its splits and the test set are the same."""


def config_text(*, quick: bool) -> str:
    """Return the project's config."""
    changes = _QUICK if quick else {}
    sections = {name: _SECTIONS.get(name, {}) | changes.get(name, {}) for name in _SECTIONS | changes}
    return write_config({"name": LEGAL_CITATIONS, "base_model": "bundled:smollm2-135m-instruct", **sections})


def _readme(pairs: int) -> str:
    return f"""# {LEGAL_CITATIONS}

{pairs:,} pairs of a court's name and location and the abbreviation that citations use for it, from the package
`courts-db` {COURTS.version} (Free Law Project, BSD-2-Clause). `tunewright demo FOLDER` also makes this project, runs
it and serves the result. It resumes where it was stopped.

    tunewright run              the whole pipeline: data, advise, train, evaluate, verdict, report
    tunewright serve            the base and the adapter behind an OpenAI-compatible API
"""
