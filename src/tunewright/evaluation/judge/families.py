"""Model families by name: a judge of the base's own family favours the base's style."""

from __future__ import annotations

import re

_FAMILIES = {
    "smollm": r"smol-?lm|smolvlm",
    "mistral": r"mistral|mixtral|ministral|codestral|devstral|magistral|pixtral|mathstral|zephyr",
    "llama": r"llama|vicuna|alpaca",
}


def family(model: str) -> str | None:
    """Return the family that a model's name indicates (smollm, mistral or llama, for example), or None."""
    name = model.lower()
    return next((name_of for name_of, words in _FAMILIES.items() if re.search(words, name)), None)


def shared_family(judge: str, base: str) -> str | None:
    """Return the family of both models, if it is the same one.

    Judges favour text that they find likely themselves (Wataoka et al. 2024, arXiv 2410.21819). The untuned base of
    their family writes such text.
    """
    found = family(judge)
    return found if found is not None and found == family(base) else None
