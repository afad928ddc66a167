"""Whatever a file holds, each reader gives rows, faults or one UserError, and never a traceback.

`make test` tries 25 cases for each reader, `make test-all` 100, and `make fuzz` 10,000.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tool_rows import FORMATS, OSLO

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.data.readers import read_pairs
from tunewright.data.readers.row_errors import CODES

MAPPED = DataConfig(input="q", output="a")
TEMPLATED = DataConfig(input="{{ q }}{{ b | tojson }}", output='{{ row["a"] | default(x[0].y) }}', drop_columns=("id",))
RECIPES = st.sampled_from([DataConfig(), MAPPED, TEMPLATED, DataConfig(group_by=("g",), drop_columns=("id",))])
PAIR = b'{"prompt": "two and two?", "completion": "four"}'
CHAT = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]}'

CALL = json.dumps(
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]},
        ],
        "tools": [{"name": "f"}],
    }
).encode()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """One folder for all cases: a folder for each of 10,000 takes longer than reading."""
    with TemporaryDirectory() as name:
        yield Path(name)


def _check(path: Path, data: DataConfig) -> None:
    try:
        reading = read_pairs(path, data)
    except UserError as error:
        assert error.what
        assert error.where
        return
    assert reading.rows or reading.faults
    for fault in reading.faults:
        assert fault.code in CODES
        assert fault.line >= 1
    for row in reading.rows:
        assert row.example.output.strip()
        assert row.example.pair_key


def _check_bytes(folder: Path, name: str, content: bytes, data: DataConfig) -> None:
    (folder / name).write_bytes(content)
    _check(folder / name, data)


_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["user", "gpt", "[]", "tool"]),
)
_NAMES = ["messages", "role", "content", "weight", "prompt", "completion", "instruction", "output", "history", "tools"]
_NAMES += ["chosen", "rejected", "input", "preferred_output", "non_preferred_output"]
_NAMES += ["conversations", "from", "value", "text", "system", "q", "a", "b", "x", "g", "id", "row"]
_NAMES += ["functions", "tool_calls", "function", "name", "arguments", "parameters", "tool_call_id", "function_call"]
_keys = st.sampled_from(_NAMES)
_json = st.recursive(
    _scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_keys, inner, max_size=4)),
    max_leaves=12,
)


def _pieces(*special: bytes) -> st.SearchStrategy[bytes]:
    """Bytes at random, or pieces of what such files are made of, put together at random."""
    pieces = [b"[", b"]", b"{", b"}", b",", b":", b'"', b"\n", b"\r\n", b" ", b"\t", b"\\", b"\\ud800", b"\\u", b"x"]
    pieces += [b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"\xe9", b"\x81", b"\xc3\xa9", b"NaN", b"-Infinity", b"1e999"]
    return st.one_of(
        st.binary(max_size=200),
        st.lists(st.sampled_from([*pieces, PAIR, CHAT, CALL, b'{"q": "x", "a": "y"}', *special]), max_size=25).map(
            b"".join
        ),
    )


def _dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


@given(st.lists(_json, min_size=1, max_size=4), RECIPES)
def test_json_lines_survive_any_values(folder: Path, values: list[Any], data: DataConfig) -> None:
    _check_bytes(folder, "b.jsonl", PAIR + b"\n" + b"\n".join(map(_dumped, values)), data)


_turn = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", 1]), "content": _scalars})
_side = st.one_of(_scalars, _turn, st.lists(_turn | _json, max_size=4))


@given(
    st.dictionaries(st.sampled_from(["prompt", "system", "tools", "input", "messages"]), _side, max_size=2),
    st.dictionaries(st.sampled_from(["chosen", "rejected"]), _side, min_size=1),
    st.dictionaries(st.sampled_from(["preferred_output", "non_preferred_output"]), _side, max_size=2),
    RECIPES,
)
def test_preference_rows_survive_any_values(
    folder: Path, prompt: dict[str, Any], pair: dict[str, Any], outputs: dict[str, Any], data: DataConfig
) -> None:
    row = prompt | (outputs or pair)
    if outputs and "input" in row:
        row["input"] = {"messages": row["input"]}
    _check_bytes(folder, "p.jsonl", _dumped(row), data)


@given(st.lists(st.one_of(_json, st.dictionaries(_keys, _json, max_size=4)), max_size=4), st.integers(0, 2), RECIPES)
def test_json_objects_and_arrays_survive_any_values(
    folder: Path, values: list[Any], indent: int, data: DataConfig
) -> None:
    text = json.dumps(values, indent=indent) if indent else "\n".join(json.dumps(value, indent=1) for value in values)
    _check_bytes(folder, "d.json", text.encode(), data)


@given(
    _pieces(b"q,a\n", b"PAR1", b"q\ta\n"),
    st.sampled_from(["g.json", "g.jsonl", "g.csv", "g.tsv", "g.txt", "g.parquet", "g"]),
    RECIPES,
)
def test_readers_survive_any_bytes_under_any_name(folder: Path, content: bytes, name: str, data: DataConfig) -> None:
    _check_bytes(folder, name, content, data)


_COLUMNS = {"q": ["one", "two", None], "a": ["x", "y", "z"], "b": [[{"y": 1}], [], None], "x": [1.5, float("nan"), 2]}


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[str, bytes]:
    """The files of a saved dataset, by name."""
    import datasets

    datasets.disable_progress_bars()
    kinds = {"b": datasets.List({"y": datasets.Value("int64")}), "x": datasets.Value("float64")}
    names = datasets.ClassLabel(names=["x", "y", "z"])
    features = datasets.Features({"q": datasets.Value("string"), "a": names, **kinds})
    columns = {**_COLUMNS, "a": [0, 1, 2]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder / "whole"))
    return {file.name: file.read_bytes() for file in (folder / "whole").iterdir()}


@given(draw=st.data(), data=RECIPES)
def test_damaged_rows_are_examples_or_faults(folder: Path, draw: st.DataObject, data: DataConfig) -> None:
    """Rows with functions in each format, with one to three of their values changed or left out."""
    row: Any = draw.draw(st.sampled_from(FORMATS))(OSLO)
    for _ in range(draw.draw(st.integers(1, 3))):
        row = _changed(row, draw.draw)
    _check_bytes(folder, "t.jsonl", _dumped(row), data)


_FILES = ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"]


def _write(folder: Path, files: dict[str, bytes]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def _changed(value: Any, draw: Callable[[st.SearchStrategy[Any]], Any]) -> Any:
    """The JSON with one of its values, at any depth, put in place of by another, or left out."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 3)):
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
        if draw(st.integers(0, 4)):
            copy[key] = _changed(value[key], draw)
        else:
            del copy[key]
        return copy
    return draw(_meta)


_meta = st.one_of(
    _json,
    st.sampled_from(
        ["List", "LargeList", "Value", "ClassLabel", "Image", "Audio", "Array2D", "Sequence", "Translation"]
    ),
    st.sampled_from(["int64", "string", "arrow", "numpy", "../x", "_type", "null", "binary"]),
    st.just({"dtype": "string", "_type": "Value"}),
    st.just({"filename": "data-00000-of-00001.arrow"}),
)


@given(draw=st.data(), file=st.sampled_from(_FILES[:2]), data=RECIPES, gone=st.booleans())
def test_saved_dataset_survives_a_wrong_description(
    folder: Path, saved: dict[str, bytes], draw: st.DataObject, file: str, data: DataConfig, gone: bool
) -> None:
    described = _changed(json.loads(saved[file]), draw.draw)
    files = {**saved, file: json.dumps(described).encode()}
    if gone and draw.draw(st.booleans()):
        del files[draw.draw(st.sampled_from(_FILES))]
    _check(_write(folder / "changed", files), data)
