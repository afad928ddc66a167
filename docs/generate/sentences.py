"""Draw sentences at random from everything that a person reads, to judge how they read.

    python docs/generate/sentences.py --count 60 --seed 1

It reads README.md, the pages of docs/, the command line's help, and in src/ and tests/ docstrings, error messages and
test names. Each source has the same share of the sentences.
"""

from __future__ import annotations

import argparse
import ast
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^```.*?^```$|^---$.*?^---$|<[^>]+>", re.MULTILINE | re.DOTALL)
_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z`*\[])")
_MESSAGES = {"UserError", "warn", "say"}
_HELP = {"Option", "Argument", "Field"}


def sentences() -> dict[str, list[str]]:
    """Return the sentences of each source, with their place."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found = {"docs": [f"{page.relative_to(ROOT)}: {text}" for page in pages for text in _page(page)]}
    found |= {kind: [] for kind in ("docstrings", "messages", "help", "tests")}
    for folder in ("src", "tests"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for kind, text in _code(file, folder == "tests"):
                found[kind].append(f"{file.relative_to(ROOT)}: {text}")
    return found


def _page(page: Path) -> Iterator[str]:
    """Yield the sentences of a page's paragraphs and list items; tables and code are left out."""
    for block in re.split(
        r"\n\s*\n|^(?=[-*\d]+\.? )", _FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE
    ):
        text = " ".join(block.split())
        if text and not text.startswith(("|", "#", "!")):
            yield from (each for each in _END.split(text) if len(each.split()) >= 4)


def _code(file: Path, tests: bool) -> Iterator[tuple[str, str]]:
    """Yield the kind and the text of each sentence of a Python file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and tests and node.name.startswith("test_"):
            yield "tests", node.name
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not tests:
            summary = (ast.get_docstring(node) or "").split("\n\n")[0]
            yield from (("docstrings", each) for each in _END.split(" ".join(summary.split())) if each)
        if isinstance(node, ast.Call) and not tests:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in _MESSAGES and node.args:
                yield from (("messages", text) for text in _text(node.args[0]))
            for keyword in node.keywords:
                if name in _HELP and keyword.arg in ("help", "description"):
                    yield from (("help", text) for text in _text(keyword.value))


def _text(node: ast.expr) -> Iterator[str]:
    """Yield a literal text, with … for each value in it."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    if all(isinstance(part, ast.Constant | ast.FormattedValue) for part in parts):
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
        if len(text.split()) >= 3:
            yield " ".join(text.split())


def draw(count: int, seed: int) -> list[str]:
    """Return ``count`` sentences, as evenly from the sources as the count allows."""
    chosen = random.Random(seed)
    found = sentences()
    kinds = sorted(found)
    return [
        f"[{kind}] {text}"
        for place, kind in enumerate(kinds)
        for text in chosen.sample(found[kind], count // len(kinds) + (place < count % len(kinds)))
    ]


def main() -> int:
    """Print the sentences that were drawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="Number of sentences.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the draw.")
    options = parser.parse_args()
    sys.stdout.write("\n".join(draw(options.count, options.seed)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
