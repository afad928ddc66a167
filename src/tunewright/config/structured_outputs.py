"""The config of structured outputs: the form that answers must have."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from tunewright.config.section import Section


class ConstrainConfig(Section):
    """The form of a constrained answer: choices, a regular expression or a JSON schema."""

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

    @model_validator(mode="after")
    def _one_of_three(self) -> ConstrainConfig:
        if [self.choices, self.regex, self.json_schema].count(None) != 2:
            raise ValueError("set exactly one of choices, regex and json_schema")
        return self
