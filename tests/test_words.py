"""Rules for the project's words: phrases that it avoids, how docstrings open, and how errors begin and end."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
THIS = Path(__file__)
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
QUESTION = re.compile(r"(What|Whether|How|Who|Whose|Which|Where|When|Why)\b")
# Errors that reach a user or a client: their first argument is a sentence, with a full stop for clients of the server.
ERRORS = {"UserError", "DivergedError", "StateUnavailableError", "IntegrityIssue"}
CLIENT_ERRORS = {"ApiError", "EngineStoppedError", "RequestFailedError", "AdapterFailedError"}
# A first word that keeps its own spelling: an option, a key, a path, or a name.
NAME = re.compile(
    r"(llama\.cpp|vLLM|lm-eval|bfloat16|nf4|peft|pip|gold|torch|mistral-common|presidio-analyzer|llm-compressor|compressed-tensors)\b"
    r"|-|[a-z]+[\d_./`=\[]"
)
# Stands for an interpolated value.
VALUE = "\0"


def _texts(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and text of each string and comment; of a page, its prose without code blocks."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        prose = re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), text, flags=re.M | re.S)
        yield from enumerate(prose.splitlines(), 1)
        return
    if not AVOIDED.search(text):
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in {tokenize.STRING, tokenize.COMMENT}:
            yield token.start[0], token.string


def _python(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")) if file != THIS]


@cache
def _nodes(file: Path) -> list[tuple[ast.AST, ast.AST | None]]:
    """Return each node of a file with the function around it."""
    found: list[tuple[ast.AST, ast.AST | None]] = []

    def walk(node: ast.AST, function: ast.AST | None) -> None:
        found.append((node, function))
        inner = node if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
        for child in ast.iter_child_nodes(node):
            walk(child, inner)

    walk(ast.parse(file.read_text(encoding="utf-8")), None)
    return found


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
        for node, _ in _nodes(file):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if QUESTION.match(text):
                    found.append(f"{_place(file, node.body[0].lineno)}: {text.splitlines()[0]}")
    assert not found, "\n".join(found)


def _messages(node: ast.expr, function: ast.AST | None) -> Iterator[tuple[int, str]]:
    """Yield the line and text of a message's variants; each interpolated value becomes ``VALUE``."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.lineno, node.value
    elif isinstance(node, ast.JoinedStr):
        first = node.values[0]
        if isinstance(first, ast.FormattedValue) and isinstance(first.value, ast.IfExp):
            yield from _messages(first.value, None)
        parts = [str(part.value) if isinstance(part, ast.Constant) else VALUE for part in node.values]
        yield node.lineno, "".join(parts)
    elif isinstance(node, ast.IfExp):
        yield from _messages(node.body, function)
        yield from _messages(node.orelse, function)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _messages(value, function)
    elif isinstance(node, ast.Name) and function is not None:
        for each in ast.walk(function):
            if isinstance(each, ast.Assign) and any(isinstance(t, ast.Name) and t.id == node.id for t in each.targets):
                yield from _messages(each.value, None)


def _errors(file: Path, names: set[str]) -> Iterator[tuple[int, str]]:
    """Yield the line and text of each message of these errors in a file."""
    for node, function in _nodes(file):
        if isinstance(node, ast.Call) and node.args:
            name = ast.unparse(node.func).split(".")[-1]
            if name in names:
                yield from _messages(node.args[1 if name == "IntegrityIssue" else 0], function)


def test_errors_begin_with_a_capital_letter_or_a_name() -> None:
    found = [
        f"{_place(file, line)}: {text}"
        for file in _python("src")
        for line, text in _errors(file, ERRORS | CLIENT_ERRORS)
        if text[:1].islower() and not NAME.match(text)
    ]
    assert not found, "\n".join(found)


def test_errors_end_without_a_full_stop_except_for_clients_of_the_server() -> None:
    found = []
    for file in _python("src"):
        for line, text in _errors(file, ERRORS):
            if text.endswith(".") and not text.endswith("…") and "\n" not in text:
                found.append(f"{_place(file, line)}: {text}")
        for line, text in _errors(file, CLIENT_ERRORS):
            if text and not text.endswith((".", VALUE)):
                found.append(f"{_place(file, line)}: {text}")
    assert not found, "\n".join(found)
