"""The evidence's record of the engine that computed the answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunewright.evidence.base import Part


class EngineUsed(Part):
    """The engine of all arms, and of the noise floor: engines round differently, so evidence names its own."""

    name: Annotated[Literal["peft", "vllm"], Field(description="peft is the embedded loop over transformers and peft.")]
    version: Annotated[str, Field(description="Of the package with the engine's name.")]
    packages: Annotated[dict[str, str], Field(description="Versions that decide numbers, of the engine's environment.")]
    device: Annotated[str, Field(description="cpu or cuda.")]
    dtype: str
    rows: Annotated[int, Field(description="The most answers that decode at once.")]
    why: Annotated[str, Field(description="Why this engine: what evaluate.engine says, and what is installed here.")]

    @property
    def text(self) -> str:
        """Name, version, device and precision, for people."""
        return f"{self.name} {self.version} ({self.device}, {self.dtype})"
