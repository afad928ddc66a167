"""``export.json``: the record of every artifact, kept also for one that failed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.evidence.common import Part
from tunewright.gate.parity import Figures, Limits

RECORD = "export.json"

Kind = Literal["merged", "gguf-lora", "gguf-merged", "ollama", "compressed", "hub"]


class MergeMeasurement(Part):
    """A merge method and its distance from the trained model."""

    way: Literal["original", "dequantized"]
    kl: Annotated[float, Field(description="Mean KL divergence from the trained model, nats.")]


class Export(Part):
    """An artifact's kind, inputs and measurements."""

    schema_version: Literal[1] = 1
    kind: Kind
    made_of: Annotated[dict[str, Any], Field(description="Digests of adapter, base and chat format, and the settings.")]
    lineage: Annotated[dict[str, Any], Field(description="The adapter's own lineage.")]
    ways: Annotated[
        tuple[MergeMeasurement, ...],
        Field(description="Measured merge methods; empty if there is only one."),
    ]
    way: Annotated[str, Field(description="The merge method: the one closest to the trained model.")]
    figures: Annotated[
        Figures | None, Field(description="None if the engine rejected the file, or for an adapter itself.")
    ]
    limits: Limits
    shortcomings: Annotated[tuple[str, ...], Field(description="Why the artifact failed; empty for one that was kept.")]
    notes: Annotated[tuple[str, ...], Field(description="Notes for the user.")]
    files: Annotated[dict[str, str], Field(description="SHA-256 of each file, by name.")]
    packages: dict[str, str]
    created: Annotated[str, Field(description="UTC, ISO 8601.")]

    @property
    def inputs_digest(self) -> str:
        """The SHA-256 of the inputs."""
        return digest(self.made_of)


def read_record(folder: Path) -> Export:
    """Return the record of an exported folder.

    Raises:
        UserError: the record is missing or unreadable.
    """
    path = folder / RECORD
    try:
        return Export.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"No {RECORD}: this folder is not an export", where=str(folder)) from None
    except (ValueError, ValidationError) as error:
        raise UserError(f"The record cannot be read: {error}", where=str(path)) from None
