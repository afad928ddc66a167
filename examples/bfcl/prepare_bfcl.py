"""The Berkeley Function Calling Leaderboard, version 4, as rows with functions and calls.

The data is that of https://github.com/ShishirPatil/gorilla (Apache-2.0), folder
``berkeley-function-call-leaderboard/bfcl_eval/data``, which the package ``bfcl-eval`` ships too. It has one file of
questions for each category, and the acceptable calls of most in ``possible_answer``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from tunewright.config import DataConfig
from tunewright.config.io import write_config
from tunewright.config.project import CONFIG_FILE
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json
from tunewright.core.progress import Reporter
from tunewright.core.text import count_of, listed
from tunewright.data.readers.row_errors import RowError
from tunewright.data.readers.validate import MOST_CHARACTERS, example_from_object
from tunewright.metrics.calls import ACCEPTABLE, OPTIONAL, alternative

NAME = "bfcl"
ROWS_FILE = "bfcl.jsonl"
LEFT_OUT_FILE = "left-out.txt"
PREFIX = "BFCL_v4_"
WHERE = "Give the folder bfcl_eval/data of BFCL's repository or of the package bfcl-eval."

CATEGORIES = (
    "simple_python",
    "multiple",
    "parallel",
    "parallel_multiple",
    "irrelevance",
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
    "live_irrelevance",
)
"""The order of rows. Other files whose items have one assistant turn follow, such as those for Java."""

NO_FUNCTION_FITS = "None of the functions can answer this."
"""The ideal output where no function fits: BFCL gives no text for it, only that there must be no call."""

_OTHER_CATEGORY = "its items declare no functions: code runs between their turns"
_FOREIGN = "its lines are neither items of BFCL (id, question, function) nor acceptable calls (id, ground_truth)"
_CATEGORY = re.compile(r"(\w+?)_\d[\d-]*")
"""An item's id, such as ``live_simple_0-0-0``."""

_TYPES = {
    "any": None,
    **dict.fromkeys(("string", "char"), "string"),
    **dict.fromkeys(("integer", "long", "short", "byte", "bigint"), "integer"),
    **dict.fromkeys(("number", "float", "double"), "number"),
    "boolean": "boolean",
    **dict.fromkeys(("array", "tuple", "arraylist", "set", "queue", "stack"), "array"),
    **dict.fromkeys(("object", "dict", "hashmap", "hashtable"), "object"),
}
"""BFCL's types in lower case, Java's and JavaScript's among them, as JSON Schema's; ``any`` has none."""

_FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""Names that OpenAI's API takes. BFCL replaces dots by underscores for such APIs."""


_SECTIONS: dict[str, dict[str, Any]] = {
    # Published questions about a database server have made-up passwords.
    "data": {"sources": [ROWS_FILE], "group_by": ["family"], "allow": ["password"]},
    # The bundled base's own template has no form for functions.
    "chat": {"tools": "hermes"},
    # A model this small learns at a higher rate than the 7B models that the preset's 2e-4 is for.
    "train": {"preset": "all-linear", "learning_rate": 1e-3, "epochs": 2, "max_length": 8192},
    "evaluate": {
        "metric": "call_ast_match",
        "extra_metrics": [
            "call_exact_match",
            "call_name_match",
            "call_argument_f1",
            "call_schema_valid",
            "irrelevance_detection",
        ],
        # Demonstrations with their functions are long.
        "num_fewshot": [1, 2, 4],
    },
}


class _UnconvertibleError(ValueError):
    """The reason why an item is no row."""


@dataclass(frozen=True)
class Converted:
    """Rows, and the items that cannot be rows."""

    rows: tuple[dict[str, Any], ...]
    left_out: tuple[str, ...]
    """``ID: reason``, or ``FILE: reason`` for a whole file."""

    @cached_property
    def text(self) -> str:
        """The rows as JSON Lines."""
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)


def project_files(folder: Path | None, reporter: Reporter) -> dict[str, str]:
    """Return the prepared files of the project by name: its config, its rows, and the items that cannot be rows.

    Raises:
        UserError: no folder, or as for :func:`convert`.
    """
    if folder is None:
        raise UserError(f"The example {NAME} needs its data", where="--data", fix=WHERE)
    converted = convert(folder)
    if not converted.rows:
        raise UserError(f"No item can be a row\n{_some(converted.left_out)}", where=str(folder), fix=WHERE)
    families = len({row["family"] for row in converted.rows})
    counts = Counter(row["category"] for row in converted.rows)
    found = ", ".join(f"{category} {count:,}" for category, count in counts.items())
    reporter.say(f"{len(converted.rows):,} rows, in {families:,} families: {found}")
    if converted.left_out:
        reporter.warn(f"Items and files left out, with their reasons in {LEFT_OUT_FILE}: {len(converted.left_out):,}")
    base = {"name": NAME, "base_model": "bundled:smollm2-135m-instruct"}
    files = {
        CONFIG_FILE: write_config({**base, **_SECTIONS}),
        ROWS_FILE: converted.text,
        "README.md": _readme(converted),
    }
    if converted.left_out:
        files[LEFT_OUT_FILE] = "".join(f"{line}\n" for line in converted.left_out)
    return files


def _readme(converted: Converted) -> str:
    return f"""# {NAME}

{len(converted.rows):,} rows of the Berkeley Function Calling Leaderboard, version 4 (BFCL; Apache-2.0,
https://github.com/ShishirPatil/gorilla): a question, the functions declared for it, and the calls that answer it.

    tunewright run              the whole pipeline: data, advise, train, evaluate, verdict, report
    tunewright serve            the base and the adapter behind an OpenAI-compatible API
"""


def convert(folder: Path) -> Converted:
    """Convert all of BFCL's files in a folder, which are found by their content.

    The ideal output is the first acceptable value of each argument that satisfies its schema. All acceptable values are
    the row's metadata ``acceptable``. ``family`` is the same for rows that declare a function of the same name, and for
    rows connected by others: as ``data.group_by``, it keeps every function on one side of the split.

    Raises:
        UserError: no file of the folder has items with one assistant turn, or a file cannot be read.
    """
    files, others = _question_files(folder)
    if not files:
        raise UserError(
            f"No file with rows for training ({count_of(len(others), 'JSON file')})\n{_some(others)}".strip(),
            where=str(folder),
            fix=f"{WHERE} Any name will do: files are found by their content.",
        )
    answers: dict[str, dict[str, Any]] = {}
    for path in (*_json_files(folder), *_json_files(folder, "*/")):
        if "ground_truth" in _first_object(path):
            answers[path.name] = {item["id"]: item.get("ground_truth") for item in _items(path)}
    all_answers = {key: value for found in answers.values() for key, value in found.items()}
    rows, left_out = [], []
    asked: dict[str, dict[str, Any]] = {}
    for path in files:
        truths = all_answers | answers.get(path.name, {})
        for item in _items(path):
            by_id, of_file = _CATEGORY.fullmatch(item["id"]), path.stem.removeprefix(PREFIX)
            category = by_id[1] if by_id and of_file not in CATEGORIES else of_file
            try:
                row = _row(item, category, truths)
                example_from_object(row, DataConfig())  # `data add` would refuse the whole file
                first = asked.setdefault(canonical_json([row["tools"], row["messages"][:-1]]), row)
                if first["messages"] != row["messages"]:
                    raise _UnconvertibleError(f"its question and functions have another answer in {first['id']}")
                rows.append(row)
            except RowError as error:
                left_out.append(f"{item['id']}: {error} [{error.code}]")
            except _UnconvertibleError as error:
                left_out.append(f"{item['id']}: {error}")
    left_out += others
    families = _families([[tool["function"]["name"] for tool in row["tools"]] for row in rows])
    named = [{**row, "family": family} for row, family in zip(rows, families, strict=True)]
    return Converted(tuple(named), tuple(left_out))


def _some(reasons: Sequence[str]) -> str:
    return listed(reasons, len(reasons), 10, "left out for like reasons")


def _items(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"Cannot read BFCL's file: {error.strerror}", where=str(path)) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            yield {**item, "id": str(item["id"])}
        except (ValueError, KeyError, TypeError):
            raise UserError("Expected a JSON object with an id", where=f"{path}:{number}") from None


def _json_files(folder: Path, below: str = "") -> list[Path]:
    return sorted(path for suffix in ("json", "jsonl") for path in folder.glob(f"{below}*.{suffix}") if path.is_file())


def _first_object(path: Path) -> dict[str, Any]:
    """Return the first line's object; empty if the line is none."""
    with path.open(encoding="utf-8", errors="replace") as file:
        try:
            value = json.loads(next((line for line in file if line.strip()), ""))
        except ValueError:
            return {}
    return value if isinstance(value, dict) else {}


def _question_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the files of items with functions, and a reason for each other one without acceptable calls."""
    files, others = [], []
    for path in _json_files(folder):
        first, known = _first_object(path), path.stem.removeprefix(PREFIX) in CATEGORIES
        if known or {"id", "question", "function"} <= first.keys():  # a known file that is damaged is an error
            files.append(path)
        elif "ground_truth" not in first:
            others.append(f"{path.name}: {_OTHER_CATEGORY if 'question' in first else _FOREIGN}")
    order = {f"{PREFIX}{name}": place for place, name in enumerate(CATEGORIES)}
    return sorted(files, key=lambda path: order.get(path.stem, len(order))), others


def _row(item: dict[str, Any], category: str, answers: dict[str, Any]) -> dict[str, Any]:
    try:
        (messages,), functions = item["question"], item["function"]
    except (KeyError, ValueError, TypeError):
        raise _UnconvertibleError("expected one turn of messages, and functions") from None
    if not functions:
        raise _UnconvertibleError("it declares no function")
    tools = [_tool(function) for function in functions]
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    if len(schemas) < len(tools):
        raise _UnconvertibleError("two functions have the same name")
    row: dict[str, Any] = {"id": item["id"], "category": category, "tools": tools}
    if category.endswith("irrelevance"):
        return {**row, "messages": [*messages, {"role": "assistant", "content": NO_FUNCTION_FITS}]}
    if not answers.get(item["id"]):
        raise _UnconvertibleError("it has no acceptable calls")
    calls, acceptable = [], []
    for call in answers[item["id"]]:
        ((function, options),) = call.items()
        name = _name(function)
        if name not in schemas:
            raise _UnconvertibleError(f"the acceptable call is of {function}, which is not declared")
        arguments, listed = _arguments(options, schemas[name])
        calls.append({"name": name, "arguments": canonical_json(arguments)})
        acceptable.append(listed)
    if any(acceptable):
        if len(json.dumps({ACCEPTABLE: acceptable}, ensure_ascii=False)) > MOST_CHARACTERS:
            raise _UnconvertibleError(f"its acceptable values have more than {MOST_CHARACTERS:,} characters")
        row[ACCEPTABLE] = acceptable
    turn = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": f"call_{place}", "type": "function", "function": call} for place, call in enumerate(calls)
        ],
    }
    return {**row, "messages": [*messages, turn]}


def _tool(function: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(function.get("name"), str):
        raise _UnconvertibleError("a function has no name")
    declared: dict[str, Any] = {"name": _name(function["name"])}
    # OpenAI's API, too, takes functions without a description or parameters.
    if "description" in function:
        declared["description"] = function["description"]
    declared["parameters"] = _schema(function.get("parameters", {"type": "dict", "properties": {}}))
    return {"type": "function", "function": declared}


def _name(name: str) -> str:
    converted = name.replace(".", "_")
    if not _FUNCTION_NAME.fullmatch(converted):
        raise _UnconvertibleError(
            f"the function name {name!r} has other characters than letters, digits, _, - and dots"
        )
    return converted


def _schema(declared: dict[str, Any]) -> dict[str, Any]:
    """Return a declared type as JSON Schema."""
    schema: dict[str, Any] = {}
    for key, value in declared.items():
        match key:
            case "type":
                if str(value).lower() not in _TYPES:
                    raise _UnconvertibleError(f"the type {value!r} is unknown")
                if (known := _TYPES[str(value).lower()]) is not None:
                    schema[key] = known
            case "properties":
                schema[key] = {name: _schema(inner) for name, inner in value.items()}
            case "items":
                schema[key] = _schema(value)
            case "optional":  # `required` says it too
                continue
            case _:
                schema[key] = value
    return schema


def _arguments(options: dict[str, Any], schema: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the ideal arguments of a call, and the acceptable values of those that have others."""
    declared, required = schema.get("properties", {}), schema.get("required", ())
    chosen: dict[str, Any] = {}
    listed: dict[str, Any] = {}
    for name, values in options.items():
        optional = OPTIONAL in values
        if name not in declared:
            if not optional:
                raise _UnconvertibleError(f"the acceptable calls have {name}, which is not declared")
            continue
        value = _first(values, declared[name], required=name in required)
        if value is not _LEFT_OUT:
            chosen[name] = value
        elif not optional or name in required:
            raise _UnconvertibleError(f"no acceptable value of {name} satisfies its schema: {json.dumps(values)}")
        if value is _LEFT_OUT or values != [alternative(value, declared[name])]:
            listed[name] = values
    errors = Draft202012Validator(schema).iter_errors(chosen)
    if error := next(errors, None):
        raise _UnconvertibleError(f"the acceptable call does not satisfy its schema: {error.message}")
    return chosen, listed


_LEFT_OUT = object()


def _first(values: Sequence[Any], schema: dict[str, Any], *, required: bool, nested: bool = False) -> Any:
    """Return the first acceptable value that satisfies the schema, or ``_LEFT_OUT``.

    The mark of an optional argument leaves it out where it comes first. A required one takes it last, as empty text.
    """
    if values and values[0] == OPTIONAL and not required:
        return _LEFT_OUT
    for value in sorted(values, key=lambda value: value == OPTIONAL):
        if value == OPTIONAL and not required:
            continue
        # Objects inside objects have plain values.
        plain = value if nested else _plain(value, schema)
        if Draft202012Validator(schema).is_valid(plain):
            return plain
    return _LEFT_OUT


def _plain(value: Any, schema: dict[str, Any]) -> Any:
    """Return an acceptable value with one value for each key of its objects, which have lists of them."""
    if schema.get("type") == "object" and isinstance(value, dict):
        declared, required = schema.get("properties", {}), schema.get("required", ())
        inner = {
            key: _first(options, declared.get(key, {}), required=key in required, nested=True)
            for key, options in value.items()
        }
        return {key: found for key, found in inner.items() if found is not _LEFT_OUT}
    if isinstance(value, list) and schema.get("items", {}).get("type") == "object":
        return [_plain(each, schema["items"]) for each in value]
    return value


def _families(functions: Sequence[Sequence[str]]) -> list[str]:
    """Return each row's family: the first name of all functions that its own are connected to by shared rows."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for first, *others in functions:
        for other in others:
            one, two = sorted((root(first), root(other)))
            parent[two] = one
    return [root(first) for first, *_ in functions]
