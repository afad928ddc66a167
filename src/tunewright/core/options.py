"""Options of a verb: fields of one frozen dataclass, which Python, the command line and the studio share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """Annotation of an options class's field, from which the command line makes an option."""

    help: str
    default: str | None = None
    """What applies if the option is not given, in words; None: the field's own default."""
    name: str | None = None
    """The option's name, such as ``--input``; None: the field's."""
