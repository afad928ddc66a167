"""Optimized prompts in the project, one file for each optimization, and the one that fits the current inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunewright.core.errors import UserError
from tunewright.core.io import json_document
from tunewright.core.progress import Reporter
from tunewright.evaluation.access_log import AccessLog
from tunewright.evidence.prompt_optimization import OptimizedPrompt

_NAMES = {
    "dataset": "dataset version",
    "base": "base",
    "template": "chat template",
    "metrics": "metric",
}
"""Inputs whose change makes an optimized prompt stale."""


def instruction_digest(text: str) -> str:
    """Return the name of an instruction: 12 hex digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def store(file: Path, prompt: OptimizedPrompt, evaluations: Path) -> None:
    """Write an optimization, with a line in the access log that binds it."""
    AccessLog(evaluations).write(file, json_document(prompt.model_dump(mode="json")))


def load(file: Path, evaluations: Path) -> OptimizedPrompt:
    """Load an optimization, checked against the access log."""
    AccessLog(evaluations).require(file)
    try:
        return OptimizedPrompt.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise UserError(
            f"The optimized prompt cannot be read ({error.error_count()} invalid fields)",
            where=str(file),
            fix="Remove it and run `tunewright optimize-prompt` again: kept replies and answers are reused.",
        ) from None


def find_optimized(
    folder: Path, evaluations: Path, inputs: Mapping[str, Any], reporter: Reporter
) -> OptimizedPrompt | None:
    """Return the newest optimization of the same inputs; stale ones are named in a warning if there is no other.

    ``evaluations`` is the folder whose access log binds the prompts, and ``inputs`` are those of `ArmRunner.inputs`.
    """
    found = [load(file, evaluations) for file in sorted(folder.glob("[!.]*.json"))]
    found.sort(key=lambda prompt: prompt.created)
    fitting = [prompt for prompt in found if not changed(prompt, inputs)]
    if fitting:
        return fitting[-1]
    if found:
        reporter.warn(
            f"The optimized prompt {found[-1].id} is stale and not used, since it was found with another "
            f"{' and another '.join(changed(found[-1], inputs))}. `tunewright optimize-prompt` finds one for the "
            "current inputs."
        )
    return None


def changed(prompt: OptimizedPrompt, inputs: Mapping[str, Any]) -> list[str]:
    """Return the names of the inputs that differ from those of an optimization."""
    return [name for key, name in _NAMES.items() if _deciding(prompt.lineage, key) != _deciding(inputs, key)]


def _deciding(inputs: Mapping[str, Any], key: str) -> Any:
    value = inputs.get(key)
    return value[:1] if key == "metrics" and isinstance(value, list) else value  # the first metric decides
