"""The base class of all config sections, and types that several of them share."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

RetrieverName = Literal["bm25", "tfidf", "dense", "sentence-transformers"]
"""Ways to retrieve demonstrations for a question."""
DemonstrationOrder = Literal["similar_last", "similar_first"]
"""Places of the most similar demonstration: nearest to the question, or farthest from it."""

EngineName = Literal["peft", "vllm", "llamacpp"]
AnswerEngineName = Literal["auto", "peft", "vllm"]
"""Engines that can compute an evaluation's answers."""
Quantization = Literal["none", "nf4"]
"""Ways to hold a base in memory."""


class Section(BaseModel):
    """A frozen section of the config that rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
