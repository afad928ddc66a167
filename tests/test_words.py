"""Rules for the project's words: phrases that it avoids, how docstrings open, and how errors begin and end.

`tests/golden/messages.txt` has the words of each error.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
THIS = Path(__file__)
AVOIDED = re.compile(
    r"\b(whoever|(is|are) none(?! of)|so many|told|tells|anew|beside|held to|(goes|go|went|going) on|under way"
    r"|(comes|came) to|let go|all that|of one's own|till|wholly|reckon\w*)\b"
    r"|(?<!as soon )(?<!as long )(?<!as far )\bas (it is|they are)\b(?! \w+(ed|ing|en|n)\b)",
    re.IGNORECASE,
)
# Most files have none of these, which are found ten times as quickly.
PIECES = (
    "whoever", "is none", "are none", "so many", "told", "tells", "anew", "beside", "held to", "goes on", "go on",
    "went on", "going on", "under way", "comes to", "came to", "let go", "all that", "of one's own", "till", "wholly",
    "reckon", "as it is", "as they are",
)  # fmt: skip
ALLOWED = (
    # Python's None; "all that fit" selects.
    r"None if|is None|none is|are None|is none of the choices|all that (fit|the)\b"
)
QUESTION = re.compile(r"(What|Whether|How|Who|Whose|Which|Where|When|Why)\b")
# Errors of the server, whose clients get whole sentences.
CLIENT_ERRORS = {"ApiError", "EngineStoppedError", "RequestFailedError", "AdapterFailedError"}
# A first word that keeps its own spelling: an option, a key, a path, or a name.
NAME = re.compile(
    r"(llama\.cpp|vLLM|lm-eval|bfloat16|nf4|peft|pip|gold|torch|mistral-common|presidio-analyzer|llm-compressor|compressed-tensors|liger-kernel)\b"
    r"|-|[a-z]+[\d_./`=\[]"
)


def _texts(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and text of each string and comment; of a page, its prose without code blocks."""
    text = file.read_text(encoding="utf-8")
    lower = text.replace("is None", "").lower()
    if not any(piece in lower for piece in PIECES):
        return
    if file.suffix == ".md":
        prose = re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), text, flags=re.M | re.S)
        yield from enumerate(prose.splitlines(), 1)
    elif AVOIDED.search(text):
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in {tokenize.STRING, tokenize.COMMENT}:
                yield token.start[0], token.string


def _python(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")) if file != THIS]


def _place(file: Path, line: int) -> str:
    return f"{file.relative_to(ROOT)}:{line}"


def test_source_docs_and_tests_have_none_of_the_avoided_phrases() -> None:
    files = [*_python("src", "benchmarks", "tests"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    found = [
        f"{_place(file, line)}: {match[0]}"
        for file in files
        for line, text in _texts(file)
        for match in AVOIDED.finditer(text)
        if not re.search(ALLOWED, text[max(0, match.start() - 20) : match.end() + 20])
    ]
    assert not found, "\n".join(found)


def test_docstrings_never_open_with_a_question_word() -> None:
    found = []
    for file in _python("src", "benchmarks", "tests"):
        if not re.search(f'"""{QUESTION.pattern}', file.read_text(encoding="utf-8")):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if QUESTION.match(text):
                    found.append(f"{_place(file, node.body[0].lineno)}: {text.splitlines()[0]}")
    assert not found, "\n".join(found)


def _errors(*names: str) -> list[str]:
    """Return what each message of these errors says first."""
    lines = (ROOT / "tests" / "golden" / "messages.txt").read_text(encoding="utf-8").splitlines()
    found = [text.split(" | ")[0] for kind, _, text in (line.partition(": ") for line in lines) if kind in names]
    assert len(found) > 50
    return found


def test_errors_begin_with_a_capital_letter_or_a_name() -> None:
    assert [text for text in _errors("UserError", *CLIENT_ERRORS) if text[:1].islower() and not NAME.match(text)] == []


def test_errors_end_without_a_full_stop_except_for_clients_of_the_server() -> None:
    assert [
        text for text in _errors("UserError") if text.endswith(".") and not text.endswith(").") and "\\n" not in text
    ] == []
    assert [text for text in _errors(*CLIENT_ERRORS) if not text.endswith((".", "}", "…"))] == []
