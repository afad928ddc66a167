"""Checks of an answer's form that a rule can decide, in the spirit of IFEval (Zhou et al. 2023, arXiv 2311.07911).

No check depends on the answer's language. Each can make a text that passes and one that fails: with
these texts, a suite tests its checks.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(min_length=1)]


class _Check(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @abstractmethod
    def passes(self, text: str) -> bool:
        """Return whether the text passes the check."""

    @abstractmethod
    def examples(self) -> tuple[str, str]:
        """Return a text that passes, and one that fails."""


class _Count(_Check):
    """A count of something in the text; at least one of the two bounds is required."""

    at_least: Annotated[int | None, Field(ge=0)] = None
    at_most: Annotated[int | None, Field(ge=0)] = None

    @model_validator(mode="after")
    def _bounds(self) -> _Count:
        least, most = self.at_least, self.at_most
        if (least, most) in ((None, None), (0, None)):
            raise ValueError("set at_least (above 0) or at_most")
        if least is not None and most is not None and least > most:
            raise ValueError("at_least is above at_most")
        return self

    def passes(self, text: str) -> bool:
        count = self.count(text)
        return (self.at_least or 0) <= count and (self.at_most is None or count <= self.at_most)

    def examples(self) -> tuple[str, str]:
        least, most = self.at_least, self.at_most or 0
        return self.make(most if least is None else least), self.make(least - 1 if least else most + 1)

    @abstractmethod
    def count(self, text: str) -> int:
        """Return the count in the text."""

    @abstractmethod
    def make(self, times: int) -> str:
        """Return a text with this count."""


class Words(_Count):
    """Runs of letters, digits and underscores, as IFEval counts them."""

    check: Literal["words"]

    def count(self, text: str) -> int:
        return len(re.findall(r"\w+", text))

    def make(self, times: int) -> str:
        return " ".join(["word"] * times)


class Sentences(_Count):
    """Pieces that end in a mark (of any script) before white space, or at the end; IFEval's has a model for English."""

    check: Literal["sentences"]

    def count(self, text: str) -> int:
        pieces = re.split(r"(?<=[.!?…。！？।؟])[\"')\]»”’]*(?:\s+|$)|(?<=[。！？])", text)
        return sum(bool(re.search(r"\w", piece)) for piece in pieces)

    def make(self, times: int) -> str:
        return " ".join(["So it is."] * times)


class Bullets(_Count):
    """Lines that begin with ``*`` or ``-``."""

    check: Literal["bullets"]

    def count(self, text: str) -> int:
        return len(re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)) + len(re.findall(r"^\s*-.*$", text, re.MULTILINE))

    def make(self, times: int) -> str:
        return "So:\n" + "\n".join(["* this"] * times)


class Paragraphs(_Count):
    """Paragraphs between empty lines, or between ``separator``; an empty one in the middle makes the count -1."""

    check: Literal["paragraphs"]
    separator: Text | None = None

    def count(self, text: str) -> int:
        between = r"\n\s*\n" if self.separator is None else rf"\s?{re.escape(self.separator)}\s?"
        pieces = [bool(piece.strip()) for piece in re.split(between, text)]
        inner = pieces[1:-1]
        return -1 if not all(inner) and self.separator is not None else sum(pieces)

    def make(self, times: int) -> str:
        return f"\n{self.separator}\n".join(["So."] * times) if self.separator else "\n\n".join(["So."] * times)


class Placeholders(_Count):
    """Texts in square brackets, such as [address]."""

    check: Literal["placeholders"]

    def count(self, text: str) -> int:
        return len(re.findall(r"\[.*?\]", text))

    def make(self, times: int) -> str:
        return "To " + " ".join(["[name]"] * times)


class Highlights(_Count):
    """Texts between single or double asterisks on one line."""

    check: Literal["highlights"]

    def count(self, text: str) -> int:
        single = [found.strip("*").strip() for found in re.findall(r"\*[^\n\*]*\*", text)]
        double = [
            found.removeprefix("**").removesuffix("**").strip() for found in re.findall(r"\*\*[^\n\*]*\*\*", text)
        ]
        return sum(map(bool, single)) + sum(map(bool, double))

    def make(self, times: int) -> str:
        return "It is " + " and ".join(["*so*"] * times)


class Sections(_Count):
    """Sections that begin with ``marker`` and a number."""

    check: Literal["sections"]
    marker: Text

    def count(self, text: str) -> int:
        return len(re.split(rf"\s?{re.escape(self.marker)}\s?\d+\s?", text)) - 1

    def make(self, times: int) -> str:
        return "Here:\n" + "\n".join(f"{self.marker} {number}\nso" for number in range(1, times + 1))


class Occurrences(_Count):
    """The number of occurrences of a text, ignoring case."""

    check: Literal["occurrences"]
    of: Text

    def count(self, text: str) -> int:
        return len(re.findall(re.escape(self.of), text, re.IGNORECASE))

    def make(self, times: int) -> str:
        beside = next(text for text in ("it is", "\u2014") if self.count(text) == 0)
        return "\n".join([beside, *[self.of] * times])


class Contains(_Check):
    """Required texts, ignoring case."""

    check: Literal["contains"]
    texts: Annotated[tuple[Text, ...], Field(min_length=1)]

    def passes(self, text: str) -> bool:
        return all(re.search(re.escape(wanted), text, re.IGNORECASE) for wanted in self.texts)

    def examples(self) -> tuple[str, str]:
        return " and ".join(self.texts), "\n"


class ContainsOne(_Check):
    """Alternative texts, of which one has to occur as written."""

    check: Literal["contains_one"]
    texts: Annotated[tuple[Text, ...], Field(min_length=1)]

    def passes(self, text: str) -> bool:
        return any(wanted in text for wanted in self.texts)

    def examples(self) -> tuple[str, str]:
        return self.texts[-1], ""


class Forbids(_Check):
    """Forbidden words, ignoring case; parts of longer words do not count."""

    check: Literal["forbids"]
    words: Annotated[tuple[Text, ...], Field(min_length=1)]

    def passes(self, text: str) -> bool:
        return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in self.words)

    def examples(self) -> tuple[str, str]:
        return "x" * (max(map(len, self.words)) + 1), f"It is {self.words[-1]}."


class Case(_Check):
    """A single case, lower or upper, for all cased letters; the text needs at least one."""

    check: Literal["case"]
    letters: Literal["lower", "upper"]

    def passes(self, text: str) -> bool:
        return text.islower() if self.letters == "lower" else text.isupper()

    def examples(self) -> tuple[str, str]:
        return ("so it is" if self.letters == "lower" else "SO IT IS"), "So it is"


class StartsWith(_Check):
    """A required beginning, ignoring case and outer white space."""

    check: Literal["starts_with"]
    text: Text

    def passes(self, text: str) -> bool:
        return text.strip().lower().startswith(self.text.strip().lower())

    def examples(self) -> tuple[str, str]:
        return f"{self.text} and more", f"\u2014 {self.text}"


class EndsWith(_Check):
    """A required ending, ignoring case, outer white space and quotation marks."""

    check: Literal["ends_with"]
    text: Text

    def passes(self, text: str) -> bool:
        return text.strip().strip('"').lower().endswith(self.text.strip().lower())

    def examples(self) -> tuple[str, str]:
        return f"First this. {self.text}", f"{self.text} \u2014"


class Quoted(_Check):
    """Double quotation marks around the whole text."""

    check: Literal["quoted"]

    def passes(self, text: str) -> bool:
        stripped = text.strip()
        return len(stripped) > 1 and stripped[0] == '"' and stripped[-1] == '"'

    def examples(self) -> tuple[str, str]:
        return '"So it is."', 'So "it" is.'


class Title(_Check):
    """A title in double angle brackets."""

    check: Literal["title"]

    def passes(self, text: str) -> bool:
        return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", text))

    def examples(self) -> tuple[str, str]:
        return "<<How it is>>\nSo.", "How it is\nSo."


class Postscript(_Check):
    """A ``marker``, ignoring case, with or without a space after each of its full stops."""

    check: Literal["postscript"]
    marker: Text

    def passes(self, text: str) -> bool:
        return bool(re.search(re.escape(self.marker.lower()).replace(r"\.", r"\.\s?"), text.lower()))

    def examples(self) -> tuple[str, str]:
        return f"So it is.\n{self.marker} Not so.", "\u2014"


class Json(_Check):
    """JSON, with or without a Markdown fence."""

    check: Literal["json"]

    def passes(self, text: str) -> bool:
        inner = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE)
        try:
            json.loads(inner)
        except (ValueError, RecursionError):
            return False
        return True

    def examples(self) -> tuple[str, str]:
        return '```json\n{"so": true}\n```', "{so: true}"


Check = Annotated[
    Words
    | Sentences
    | Bullets
    | Paragraphs
    | Placeholders
    | Highlights
    | Sections
    | Occurrences
    | Contains
    | ContainsOne
    | Forbids
    | Case
    | StartsWith
    | EndsWith
    | Quoted
    | Title
    | Postscript
    | Json,
    Field(discriminator="check"),
]
