"""The config of structured outputs: the form that answers must have."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tunewright.config.section import Section


class ConstrainConfig(Section):
    """The form of a constrained answer: choices, a regular expression, a JSON schema or function calls."""

    choices: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...] | None,
        Field(min_length=1, description="The whole answer is one of these texts."),
    ] = None
    regex: Annotated[
        Annotated[str, Field(min_length=1)] | None,
        Field(
            description="The whole answer matches this regular expression. The syntax is that of Rust's regex: like "
            "Python's, without look-around and back-references; \\d means 0 to 9."
        ),
    ] = None
    json_schema: Annotated[
        str | dict[str, Any] | None,
        Field(
            description="The whole answer is JSON of this schema: the schema itself, or its file relative to this one."
        ),
    ] = None
    tools: Annotated[
        Literal["auto", "required"] | None,
        Field(
            description="Calls in the answer are of functions that the row declares, with arguments by their schemas. "
            "`auto` allows text too; `required` allows calls alone. Rows without functions are not constrained."
        ),
    ] = None

    @model_validator(mode="after")
    def _one_of_four(self) -> ConstrainConfig:
        if [self.choices, self.regex, self.json_schema, self.tools].count(None) != 3:
            raise ValueError("set exactly one of choices, regex, json_schema and tools")
        return self
