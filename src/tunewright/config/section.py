"""The base class of all config sections, and types that several of them share."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic_core import CoreSchema

RetrieverName = Literal["bm25", "tfidf", "dense", "sentence-transformers"]
"""Ways to retrieve demonstrations for a question."""
DemonstrationOrder = Literal["similar_last", "similar_first"]
"""Places of the most similar demonstration: nearest to the question, or farthest from it."""

AnswerEngineName = Literal["auto", "peft", "vllm"]
"""Engines that can compute an evaluation's answers."""
Quantization = Literal["none", "nf4"]
"""Ways to hold a base in memory."""


class ConfigSection(BaseModel):
    """A frozen section of the config that rejects unknown keys; the text below each key describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the schema, whose descriptions do not keep the line ends of the source."""
        found = handler(schema)
        for each in handler.resolve_ref_schema(found).get("properties", {}).values():
            if "description" in each:
                each["description"] = " ".join(each["description"].split())
        return found
