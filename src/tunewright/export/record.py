"""``export.json``: what lies beside every artefact, or is left of one that was not good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.evidence.base import Part
from tunewright.export.parity import Figures, Limits

RECORD = "export.json"

Kind = Literal["merged", "gguf-lora", "gguf-merged", "ollama"]


class WayMeasured(Part):
    """One right way to merge, and how close it comes to the trained model."""

    way: Literal["original", "dequantized"]
    kl: Annotated[float, Field(description="Mean KL divergence from the trained model, nats.")]


class Export(Part):
    """What an artefact is, what it was made of and what was measured of it."""

    schema_version: Literal[1] = 1
    kind: Kind
    made_of: Annotated[dict[str, Any], Field(description="Digests of adapter, base and chat format, and the settings.")]
    lineage: Annotated[dict[str, Any], Field(description="The adapter's own lineage.")]
    ways: Annotated[
        tuple[WayMeasured, ...], Field(description="Ways to merge that were measured; empty where there is only one.")
    ]
    way: Annotated[str, Field(description="The way that was taken: the one closest to the trained model.")]
    figures: Annotated[Figures | None, Field(description="None where the engine did not take the file.")]
    limits: Limits
    shortcomings: Annotated[tuple[str, ...], Field(description="Why it is not good; empty of one that was kept.")]
    notes: Annotated[tuple[str, ...], Field(description="What whoever uses it has to know.")]
    files: Annotated[dict[str, str], Field(description="SHA-256 of each file, by name.")]
    packages: dict[str, str]
    created: Annotated[str, Field(description="UTC, ISO 8601.")]

    @property
    def inputs_digest(self) -> str:
        """SHA-256 over what it was made of."""
        return digest(self.made_of)


def read_record(folder: Path) -> Export:
    """Return the record of an exported folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = folder / RECORD
    try:
        return Export.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"no {RECORD}: nothing was exported here", where=str(folder)) from None
    except (ValueError, ValidationError) as error:
        raise UserError(f"it cannot be read: {error}", where=str(path)) from None
