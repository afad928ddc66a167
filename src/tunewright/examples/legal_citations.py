"""Court name and location to citation abbreviation: a real formatting task, from the package ``courts-db``."""

from __future__ import annotations

import json
from importlib.metadata import version

from tunewright.config.io import write_config
from tunewright.config.project import CONFIG_FILE
from tunewright.core.errors import UserError

NAME = "legal-citations"
PAIRS_FILE = "pairs.jsonl"


def project_files() -> dict[str, str]:
    """Return the project's files by name.

    Raises:
        UserError: the package ``courts-db`` is not installed.
    """
    try:
        from courts_db import courts
    except ImportError:
        raise UserError(
            f"The example {NAME} needs the package courts-db", fix="pip install 'tunewright[examples]'"
        ) from None
    pairs = sorted(
        {
            (f"{court['name'].strip()}, {court['location'].strip()}", court["citation_string"].strip())
            for court in courts
            if court["citation_string"].strip()
        }
    )
    lines = [json.dumps({"prompt": p, "completion": c}, ensure_ascii=False) + "\n" for p, c in pairs]
    return {CONFIG_FILE: _config(), PAIRS_FILE: "".join(lines), "README.md": _readme(len(pairs))}


def _config() -> str:
    return write_config(
        {
            "name": NAME,
            "base_model": "bundled:smollm2-135m-instruct",
            "data": {"sources": [PAIRS_FILE], "system_prompt": "Give the citation abbreviation of this court."},
            # A model this small learns at a higher rate than the 7B models that the preset's 2e-4 is for.
            "train": {"preset": "all-linear", "learning_rate": 1e-3, "epochs": 2},
            # Not the default's sixteen: retrieved, they would add two thirds to the time that all measuring takes.
            "evaluate": {"num_fewshot": [1, 2, 4, 8]},
        }
    )


def _readme(pairs: int) -> str:
    return f"""# {NAME}

{pairs:,} pairs of a court's name and location and the abbreviation that citations use for it, from the package
`courts-db` {version("courts-db")} (Free Law Project, BSD-2-Clause).

    tunewright run              the whole road: data, advise, train, evaluate, verdict, report
    tunewright serve            the base and the adapter behind an OpenAI-compatible API
"""
