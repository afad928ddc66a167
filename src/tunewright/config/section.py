"""What all sections of the config have in common."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

RetrieverName = Literal["bm25", "tfidf"]
"""How demonstrations are found for a question."""

EngineName = Literal["peft", "vllm", "llamacpp"]
AnswerEngineName = Literal["auto", "peft", "vllm"]
"""What computes an evaluation's answers."""
Quantize = Literal["none", "nf4"]
"""How a base is held in memory."""


class Section(BaseModel):
    """A frozen part of the config, in which an unknown key is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
