"""JSON arrays and objects, CSV with any delimiter, Parquet, saved datasets: detected by content, read row by row."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import openpyxl  # type: ignore[import-untyped]
import pytest
from data_helpers import Listener, write_rows
from hypothesis import given
from hypothesis import strategies as st

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.data.readers import (
    Fault,
    ReadResult,
    arrow,
    read_pairs,
    require_columns,
    scan_pairs,
    source_digest,
    source_size,
)
from tunewright.data.readers.arrow import parquet_rows
from tunewright.data.readers.json_rows import _CHUNK

DATA = DataConfig(input="q", output="a")
PAIRS = [{"prompt": f"question {i}, é", "completion": f"answer {i}"} for i in range(3)]
TABLE = [("q", "a"), ("one, two; three|four", "x"), ("five\nsix", 'seven "eight"'), ("nine", "ten")]


def _read(tmp_path: Path, content: bytes | str, name: str, data: DataConfig = DATA) -> ReadResult:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_pairs(path, data)


def _inputs(reading: ReadResult) -> list[str]:
    assert not reading.faults
    return [row.example.input_text for row in reading.rows]


def _places(reading: ReadResult) -> list[int]:
    return [row.line for row in reading.rows]


def _csv(delimiter: str, rows: list[tuple[str, str]] = TABLE) -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    return text.getvalue()


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl", "pairs.csv", "pairs.txt", "pairs.data", "pairs"])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_array_is_detected_under_any_name(tmp_path: Path, name: str, indent: int | None) -> None:
    reading = _read(tmp_path, json.dumps(PAIRS, indent=indent), name)
    assert _inputs(reading) == [pair["prompt"] for pair in PAIRS]
    assert _places(reading) == ([2, 6, 10] if indent else [1, 2, 3])
    assert any("places are row numbers" in note for note in reading.notes) is (indent is None)
    assert f"{tmp_path / name}: a JSON array: prompt/completion pairs" in reading.notes[-1]


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl", "pairs.csv", "pairs"])
def test_json_lines_are_detected_under_any_name(tmp_path: Path, name: str) -> None:
    reading = _read(tmp_path, "".join(json.dumps(pair) + "\n" for pair in PAIRS), name)
    assert (_inputs(reading), _places(reading)) == ([pair["prompt"] for pair in PAIRS], [1, 2, 3])


def test_json_objects_over_several_lines_are_read(tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": "b"}]}
        for pair in PAIRS
    ]
    reading = _read(tmp_path, "\n".join(json.dumps(chat, indent=1) for chat in chats), "pairs.json")
    assert _inputs(reading) == [pair["prompt"] for pair in PAIRS]
    assert _places(reading) == [1, 13, 25]


def test_json_array_fault_affects_one_item(tmp_path: Path) -> None:
    items = ['{"prompt": "a", "prompt": "b", "completion": "c"}', "7", '{"prompt": NaN, "completion": "c"}', '"x"']
    text = "[\n" + ",\n".join([json.dumps(PAIRS[0]), *items, json.dumps(PAIRS[1])]) + "\n]\n"
    reading = _read(tmp_path, text, "pairs.json")
    assert _places(reading) == [2, 7]
    assert [(f.line, f.code) for f in reading.faults] == [(3, "E104"), (4, "E103"), (5, "E105"), (6, "E103")]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('[\n{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}]', 3, "a comma or ] is missing"),
        ('[{"prompt": "a", "completion": "b"},\n\n{"prompt": }]', 3, "Expecting value"),
        ('[{"prompt": "a", "completion": "b"}', 1, "the array does not end"),
        ('[{"prompt": "a", "completion": "b"}]\n[]', 2, "text after the end"),
        ('[{"prompt": "a", "completion": "b"},]', 1, "Expecting value"),
        ('[\n{"prompt": "a tab:\t"}]', 2, "Invalid control character"),
        ("[" + "[" * 100_000, 1, "nested too deep"),
        ("[" + "9" * 10_000 + "]", 1, "digits"),
    ],
    ids=["comma", "value", "end", "after", "trailing", "tab", "deep", "digits"],
)
def test_json_array_refuses_invalid_json_with_its_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    with pytest.raises(UserError) as caught:
        _read(tmp_path, text, "pairs.json")
    assert caught.value.where == f"{tmp_path / 'pairs.json'}:{line}"
    assert words in caught.value.what


@given(
    lengths=st.lists(st.integers(0, 3 * _CHUNK), min_size=1, max_size=4),
    pad=st.integers(0, 40),
    character=st.sampled_from(["x", "é", "\\", '"', "\n", "🎉"]),
)
def test_json_array_is_read_equally_for_any_chunk_size(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], pad: int, character: str
) -> None:
    rows = [{"prompt": f"{i}{character * n}.", "completion": "b"} for i, n in enumerate(lengths)]
    text = " " * (_CHUNK - pad) + json.dumps(rows)
    data = DataConfig(max_characters=10**7)
    assert _inputs(_read(tmp_path_factory.mktemp("cut"), text, "a.json", data)) == [row["prompt"] for row in rows]


@pytest.mark.parametrize(("delimiter", "word"), [(",", "comma"), ("\t", "tab"), (";", "semicolon"), ("|", "bar")])
@pytest.mark.parametrize("name", ["pairs.csv", "pairs.tsv", "pairs.txt", "pairs.dat"])
def test_delimiter_is_detected_from_rows(tmp_path: Path, delimiter: str, word: str, name: str) -> None:
    reading = _read(tmp_path, _csv(delimiter), name)
    assert [(r.example.input_text, r.example.output) for r in reading.rows] == TABLE[1:]
    assert f"CSV, {word}-separated" in reading.notes[0]


def test_delimiter_is_tab_when_texts_have_commas(tmp_path: Path) -> None:
    text = "q, or question\ta\nhi, you, there\tho\nand, so, on\tx\n"
    reading = _read(tmp_path, text, "pairs.tsv", DataConfig(input="q, or question", output="a"))
    assert _inputs(reading) == ["hi, you, there", "and, so, on"]


def test_known_columns_need_no_config(tmp_path: Path) -> None:
    known = _read(tmp_path, "id,prompt,completion\n1,hi,ho\n", "a.csv", DataConfig(drop_columns=("id",)))
    assert _inputs(known) == ["hi"]
    alpaca = _read(tmp_path, "instruction,input,output\nSay,,ho\nSay,it,ho\n", "b.csv", DataConfig())
    assert _inputs(alpaca) == ["Say", "Say\nit"]


def test_table_groups_are_read_and_missing_ones_refused(tmp_path: Path) -> None:
    text = "q,a,customer\nhi,ho,7\nhe,ha,\n"
    data = DataConfig(input="q", output="a", group_by=("customer",))
    reading = _read(tmp_path, text, "a.csv", data)
    assert [row.groups for row in reading.rows] == [{"customer": "7"}, {}]
    assert not any("not used" in note for note in reading.notes)
    with pytest.raises(UserError, match=r"No column named .custmer. .data.group_by"):
        _read(tmp_path, text, "a.csv", data.model_copy(update={"group_by": ("custmer",)}))


def _saved(folder: Path, columns: dict[str, Any], **features: Any) -> Path:
    import datasets

    datasets.disable_progress_bars()
    kinds = datasets.Features(features) if features else None
    datasets.Dataset.from_dict(columns, features=kinds).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("suffix", [".parquet", ""])
def test_arrow_rows_are_numbered_and_null_and_nan_are_faults(tmp_path: Path, suffix: str) -> None:
    pairs = (("one", "x"), (None, "y"), ("three", None), ("four", "z"))
    rows = [{"q": q, "a": a, "n": n} for n, (q, a) in enumerate(pairs, start=1)]
    path = write_rows(tmp_path / f"rows{suffix}", rows)
    reading = read_pairs(path, DATA)
    assert [(r.line, r.example.input_text) for r in reading.rows] == [(1, "one"), (4, "four")]
    assert [(f.line, f.code, f.path) for f in reading.faults] == [(2, "E305", "$.q"), (3, "E305", "$.a")]
    assert [row.metadata for row in reading.rows] == [{"n": 1}, {"n": 4}]
    floats = write_rows(tmp_path / f"floats{suffix}", [{"q": "one", "a": float("nan")}])
    assert [f.reason for f in read_pairs(floats, DATA).faults] == ["a is float, not text"]


@pytest.mark.parametrize("suffix", [".parquet", ""])
def test_arrow_conversations_are_read_without_added_nulls(tmp_path: Path, suffix: str) -> None:
    user, answer = {"role": "user", "content": "a", "weight": None}, {"role": "assistant", "content": "b"}
    rows = [{"messages": [user, {**answer, "weight": w}], "customer": n} for w, n in ((1, 12), (None, None))]
    path = write_rows(tmp_path / f"rows{suffix}", rows)
    reading = read_pairs(path, DataConfig(group_by=("customer",)))
    assert (_inputs(reading), [row.groups for row in reading.rows]) == (["a", "a"], [{"customer": "12"}, {}])


def test_class_label_is_read_by_name(tmp_path: Path) -> None:
    from datasets import ClassLabel, Value, load_from_disk

    columns = {"q": ["one", "two"], "a": [1, 0]}
    folder = _saved(tmp_path / "rows", columns, q=Value("string"), a=ClassLabel(names=["no", "yes"]))
    load_from_disk(str(folder)).to_parquet(str(tmp_path / "rows.parquet"))
    for path in (folder, tmp_path / "rows.parquet"):
        assert [row.example.output for row in read_pairs(path, DATA).rows] == ["yes", "no"]


def test_saved_dataset_with_several_splits_is_refused(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    one = Dataset.from_dict({"q": ["a"], "a": ["b"]})
    DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(UserError, match="several splits") as caught:
        read_pairs(tmp_path / "both", DATA)
    assert str(tmp_path / "both" / "train") in str(caught.value)
    assert len(read_pairs(tmp_path / "both" / "train", DATA).rows) == 1


def _repeated(text: str, count: int) -> Any:
    """An array that repeats a text, held once."""
    import pyarrow as pa  # type: ignore[import-untyped]

    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([text]))


def _turns(user: Any, assistant: str, ends: list[int]) -> Any:
    """A column of chats: two turns for each user text, cut into rows at ``ends``."""
    import pyarrow as pa

    count = len(user)
    turns = pa.StructArray.from_arrays(
        [
            pa.array(["user", "assistant"] * count),
            pa.concat_arrays([user, _repeated(assistant, count)]).take(
                pa.array([at for one in range(count) for at in (one, count + one)])
            ),
        ],
        ["role", "content"],
    )
    return pa.ListArray.from_arrays(pa.array([0, *ends], pa.int32()), turns)


_READ_WITH_LITTLE_MEMORY = """
import resource, sys
from decimal import Decimal
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
from tunewright.config import DataConfig
from tunewright.data.readers import read_pairs
for path in sys.argv[1:]:
    reading = read_pairs(Path(path), DataConfig())
    print(len(reading.rows), *sorted({(fault.code, fault.line) for fault in reading.faults}))
"""


@pytest.mark.slow
def test_parquet_that_repeats_a_long_text_is_read_with_little_memory(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    rows = 200  # of 20 MB
    text = _repeated("x" * (20 << 20), rows)
    tables = {
        "pairs": pa.table({"prompt": text, "completion": ["b"] * rows}),
        "one_row": pa.table({"messages": _turns(text, "b", [2, 2 * rows - 2, 2 * rows])}),
    }
    for name, table in tables.items():
        pq.write_table(table, tmp_path / name, compression="zstd", store_schema=False)
        assert (tmp_path / name).stat().st_size < 10_000
    command = [sys.executable, "-c", _READ_WITH_LITTLE_MEMORY, *(str(tmp_path / name) for name in tables)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    every = " ".join(str(("E403", line)) for line in range(1, rows + 1))
    expected = [f"0 {every}", "0 ('E108', 2) ('E403', 1) ('E403', 3)"]
    assert (done.stdout.splitlines(), done.stderr) == (expected, "")


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}, {"row_group_size": 700, "data_page_size": 100}])
def test_parquet_rows_equal_arrows_own(tmp_path: Path, options: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 3000
    columns = {
        "q": [f"question {number}" for number in range(count)],
        "a": ["yes" if number % 2 else "no" for number in range(count)],
        "large": pa.array([None if number % 3 else f"{number}" for number in range(count)], pa.large_string()),
        "bytes": [b"x" * (number % 5) for number in range(count)],
        "decimal": pa.array([Decimal(number) / 8 for number in range(count)], pa.decimal128(20, 4)),
        "fixed": pa.array([[number, None] for number in range(count)], pa.list_(pa.int64(), 2)),
        "width": pa.array([b"abc"] * count, pa.binary(3)),
        "map": pa.array([[("k", f"{number % 7}")] for number in range(count)], pa.map_(pa.string(), pa.string())),
        "deep": [[{"t": [f"{number % 9}"] * (number % 4), "n": number}] * (number % 3) for number in range(count)],
        "class": pa.array([f"{number % 4}" for number in range(count)]).dictionary_encode(),
    }
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(columns), path, **options)
    rows = [raw.row for raw in parquet_rows(path, DATA, [], None)]
    assert rows == pq.read_table(path).to_pylist()


def test_parquet_batches_are_small_where_values_share_their_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(arrow, "_BATCH_BYTES", 4 << 20)
    path, long = tmp_path / "rows.parquet", "x" * (300 << 10)
    columns = pa.table({"q": [long + str(number) for number in range(30)], "a": ["b"] * 30})
    pq.write_table(columns, path, use_dictionary=False, column_encoding={"q": "DELTA_BYTE_ARRAY", "a": "PLAIN"})
    assert path.stat().st_size < 2 * len(long)
    rows = arrow._rows_per_batch(pq.ParquetFile(path).metadata, 0, ["q", "a"])
    assert 1 <= rows * len(long) <= 4 << 20


@pytest.mark.parametrize("cut", [5, 100, -3])
def test_parquet_is_refused_when_damaged(tmp_path: Path, cut: int) -> None:
    path = write_rows(tmp_path / "a.parquet", [{"q": "a", "a": "b"}])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match="Unreadable as Parquet"):
        read_pairs(path, DATA)


def test_saved_dataset_is_refused_when_offsets_point_out_of_the_file(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "rows", {"q": ["one", "three"], "a": ["b", "c"]})
    [file] = folder.glob("*.arrow")
    ends = b"".join(end.to_bytes(4, "little") for end in (0, 3, 8))
    assert file.read_bytes().count(ends) == 1
    file.write_bytes(file.read_bytes().replace(ends, ends[:8] + (2**30).to_bytes(4, "little")))
    with pytest.raises(UserError, match="Unreadable as a saved dataset"):
        read_pairs(folder, DATA)


def test_progress_counts_every_byte_of_any_format(tmp_path: Path) -> None:
    rows = [{"q": "x\ny", "a": "z"}] * 1100
    names = ("a.jsonl", "a.json", "a.csv", "a.parquet", "saved")
    files = [write_rows(tmp_path / name, rows) for name in names]
    for name, content in (
        ("wide.csv", _csv(",").encode("utf-16")),
        ("a.jsonl.gz", gzip.compress(files[0].read_bytes())),
    ):
        (tmp_path / name).write_bytes(content)
        files.append(tmp_path / name)
    book = openpyxl.Workbook()
    for pair in [("q", "a"), *(("x", "y"),) * 300]:
        book.active.append(pair)
    book.save(tmp_path / "a.xlsx")
    for path in (*files, tmp_path / "a.xlsx"):
        listener = Listener()
        with listener.task("reading", source_size(path), "bytes") as task:
            read_pairs(path, DATA, task)
        assert listener.steps["reading"] == (source_size(path), source_size(path)), path


def test_rows_are_read_lazily(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS * 30_000))
    listener = Listener()
    with listener.task("reading", source_size(path), "bytes") as task:
        rows = scan_pairs(path, DataConfig(), [], task)
        assert not isinstance(next(rows), Fault)
        done, total = listener.steps["reading"]
    assert done < total / 10


def test_source_digest_of_a_folder_depends_on_its_contents(tmp_path: Path) -> None:
    first, second, other = (
        _saved(tmp_path / name, {"q": [q], "a": ["b"]}) for name, q in (("one", "a"), ("two", "a"), ("three", "c"))
    )
    (second / "state.json").write_bytes((first / "state.json").read_bytes())
    assert source_digest(first) == source_digest(second) != source_digest(other)


def test_source_table_is_true_for_formats_with_columns(tmp_path: Path) -> None:
    for name, text, expected in (
        ("a.tsv", _csv("\t"), True),
        ("b.jsonl", '{"q": "x", "a": "y"}\n', True),
        ("c.jsonl", '{"prompt": "x", "completion": "y"}\n', False),
    ):
        (tmp_path / name).write_text(text)
        with contextlib.nullcontext() if expected else pytest.raises(UserError, match="no row has both") as refusal:
            require_columns([tmp_path / name], DATA, "--input")
        if refusal:
            assert refusal.value.fix == 'Keys of the first rows: prompt ("x"), completion ("y")'
