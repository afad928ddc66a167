"""Outputs compared with each other: which are labels, and what is left of one when its literals are masked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from tunewright.data.examples import normalised
from tunewright.data.review.suspects import class_like

# A string in double or single quotes, where a doubled or escaped quote is a part of it; or a number. An apostrophe
# inside a word opens no string, and a digit inside a name ("t1", "city_name0") begins no number. Every repetition is
# possessive: unpaired quotes cost one look at the rest of the text, not one for each way to divide it.
_LITERAL = re.compile(
    r"""
    (?P<string> "(?:[^"\\]|\\.|"")*+" | (?<!\w)'(?:[^'\\]|\\.|'')*+'(?!\w) )
    | (?<!\w)[-+]?\d++(?:[.,:/-]\d++)*+
    """,
    re.VERBOSE | re.DOTALL,
)
_COLON = re.compile(r"\s*:(?!:)")


def output_template(output: str) -> str:
    """Return the output with its literals masked: ``where city = "austin"`` gives ``where city = <string>``.

    Masked are strings in double or single quotes (``<string>``) and numbers, dates and times among them
    (``<number>``). A string before a colon is a key, as in JSON, and stays; ``::`` is a cast, not a colon. Case and
    white space are set aside, as for inputs. Free text without quotes and digits is its own template.
    """
    text = normalised(output)

    def masked(match: re.Match[str]) -> str:
        if match["string"] is None:
            return "<number>"
        return match[0] if _COLON.match(text, match.end()) else "<string>"

    return _LITERAL.sub(masked, text)


def template_groups(outputs: Mapping[str, str]) -> dict[str, str]:
    """Return the template of each output that shares it with another, by the same keys, as a group's value."""
    templates = {key: output_template(output) for key, output in outputs.items()}
    counts = Counter(templates.values())
    return {key: f"output_template={template}" for key, template in templates.items() if counts[template] > 1}


def labels_among(outputs: Sequence[str]) -> frozenset[str]:
    """Return the different outputs, without outer white space, if they are labels (``class_like``); else none."""
    stripped = [output.strip() for output in outputs]
    return frozenset(stripped) if class_like(stripped) else frozenset()
