"""Phrases that the project's prose avoids: none is left in strings and comments of the source, or in the docs."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
AVOIDED = re.compile(
    r"\b(whoever|(is|are) none(?! of)|so many|told|tells|anew|beside|held to|(goes|go|went|going) on|under way"
    r"|(comes|came) to|let go|all that|of one's own|till|wholly|reckon\w*)\b"
    r"|(?<!as soon )(?<!as long )(?<!as far )\bas (it is|they are)\b(?! \w+(ed|ing|en|n)\b)",
    re.IGNORECASE,
)
ALLOWED = (
    # Python's None; "all that fit" selects.
    r"None if|is None|none is|are None|is none of the choices|all that (fit|the)\b"
)


def _texts(file: Path) -> Iterator[tuple[int, str]]:
    """The line and text of each string and comment; of a page, its prose without code blocks."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        prose = re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), text, flags=re.M | re.S)
        yield from enumerate(prose.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in {tokenize.STRING, tokenize.COMMENT}:
            yield token.start[0], token.string


def test_source_and_docs_have_none_of_the_avoided_phrases() -> None:
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    found = [
        f"{file.relative_to(ROOT)}:{line}: {match[0]}"
        for file in files
        for line, text in _texts(file)
        for match in AVOIDED.finditer(text)
        if not re.search(ALLOWED, text[max(0, match.start() - 20) : match.end() + 20])
    ]
    assert not found, "\n".join(found)
