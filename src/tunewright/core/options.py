"""Options of a verb: fields of one frozen dataclass, which Python, the command line and the studio share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

EngineName = Literal["peft", "vllm", "llamacpp"]
"""An engine that serves. It is here because the command line reads options before it imports the config's pydantic."""
TaskName = Literal["labels", "short", "json", "sql", "calls", "text", "chat"]
"""The task of a project's answers: `tunewright.data.task` has each task's metric."""


@dataclass(frozen=True)
class Option:
    """Annotation of an options class's field, from which the command line makes an option.

    A field that is True by default is a flag that sets it to False.
    """

    help: str
    default: str | None = None
    """The effect of leaving the option out, in words; None means the field's own default."""
    name: str | tuple[str, ...] | None = None
    """The option's name, such as ``--input``, or its names; None means the field's."""
    min: int | None = None
    max: int | None = None
    metavar: str | None = None
    """The value's name in the help."""
    parse: Callable[[str, str], Any] | None = None
    """Converts the option's text, given the option's name, to the field's value; None: by the field's type."""
