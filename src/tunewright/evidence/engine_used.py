"""The evidence's record of the engine that computed the answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunewright.evidence.base import Part


class EngineUsed(Part):
    """The engine of all arms and of the noise floor, recorded because engines round differently."""

    name: Annotated[Literal["peft", "vllm"], Field(description="peft: the built-in loop over transformers and peft.")]
    version: Annotated[str, Field(description="Version of the package with the engine's name.")]
    packages: Annotated[dict[str, str], Field(description="Versions in the engine's environment that affect numbers.")]
    device: Annotated[str, Field(description="cpu or cuda.")]
    dtype: str
    rows: Annotated[int, Field(description="Maximum number of answers decoded at once.")]
    why: Annotated[str, Field(description="Reason for this engine: evaluate.engine, and the engines installed.")]

    @property
    def text(self) -> str:
        """Name, version, device and precision, for display."""
        return f"{self.name} {self.version} ({self.device}, {self.dtype})"
