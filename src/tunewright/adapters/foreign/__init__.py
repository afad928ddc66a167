"""Import of foreign adapters: copied, checked to the byte, and only then stored. Here are its options.

An adapter is untrusted input. Pickles run code, a header can claim more memory than exists, a configuration names
modules to import, and a link leads to another file. Everything that is not on an allowlist is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tunewright.core.options import Option


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """The importing user's statements about an adapter."""

    name: Annotated[str | None, Option("Name of the imported adapter.", default="the folder's")] = None
    """By default the manifest's name, if the adapter has a manifest."""
    base_matches: Annotated[
        bool,
        Option(
            "State that it was trained on this project's base and chat template, if no digest proves it. The "
            "lineage records who stated it.",
        ),
    ] = False
    quantization: Annotated[
        Literal["none", "nf4"] | None, Option("State how the base was quantized in its training.", default="none")
    ] = None
    system_prompt: Annotated[
        str | None, Option("State the system prompt of all its training rows.", default="unknown")
    ] = None
    unsigned: Annotated[bool, Option("Accept it without a signature of a key that the project trusts.")] = False
