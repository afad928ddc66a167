"""Append-only logs: whole lines only, whatever a crash left, and no line changed unseen."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright.core.errors import UserError
from tunewright.core.log import (
    AUTHOR_VARIABLE,
    SealedLine,
    authored_by,
    extend,
    numbered_lines,
    stated_author,
    whole_lines,
)
from tunewright.core.numbers import NUMBERS_FILE, give_number, name_numbered, read_numbers
from tunewright.data.versions.version import current_author

ROWS = st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3), max_size=4)


class Fact(SealedLine):
    name: str
    count: int | None = None


@given(rows=ROWS, cut=st.integers(min_value=0), row=st.dictionaries(st.text(max_size=5), st.integers(), max_size=2))
def test_record_cut_at_any_byte_keeps_its_whole_lines_and_takes_further_ones(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]], cut: int, row: dict[str, int]
) -> None:
    path = tmp_path_factory.mktemp("log") / "record.jsonl"
    lines = [json.dumps(each, ensure_ascii=False).encode() for each in rows]
    data = b"".join(line + b"\n" for line in lines)
    data = data[: cut % (len(data) + 1)]
    path.write_bytes(data)
    # A line whose text is whole counts, even where its line end is missing.
    whole = [line for end, line in _ends(lines) if end <= len(data)]
    assert [line for _, line in numbered_lines(whole_lines(data)[0])] == whole
    seen: list[bytes] = []

    def news(existing: bytes) -> str:
        seen.extend(line for _, line in numbered_lines(existing))
        return json.dumps(row) + "\n"

    extend(path, news)
    assert seen == whole
    assert path.read_bytes() == b"".join(line + b"\n" for line in [*whole, json.dumps(row).encode()])


def _ends(lines: list[bytes]) -> list[tuple[int, bytes]]:
    """Return each line with the number of bytes up to the end of its text."""
    found, end = [], 0
    for line in lines:
        end += len(line)
        found.append((end, line))
        end += 1
    return found


@pytest.mark.parametrize("count", [3, None])
def test_sealed_line_is_read_back_and_refused_once_it_was_changed(count: int | None) -> None:
    fact = Fact(name="ä", count=count)
    line = fact.line.encode().removesuffix(b"\n")
    assert Fact.parse(line, "facts.jsonl:1", "fact") == fact
    for changed in (line.replace("ä".encode(), b"a"), line.replace(b'"name"', b' "name"')):
        with pytest.raises(UserError, match="The fact was changed") as caught:
            Fact.parse(changed, "facts.jsonl:1", "fact")
        assert caught.value.where == "facts.jsonl:1"


@pytest.mark.parametrize("line", [b"[]", b"1", b"{", b'{"count": 3}', b'{"name": "a", "other": 1}', b"\xff"])
def test_line_of_another_form_is_refused_by_its_place(line: bytes) -> None:
    with pytest.raises(UserError) as caught:
        Fact.parse(line, "facts.jsonl:7", "fact")
    assert caught.value.where == "facts.jsonl:7"


def test_stated_author_precedes_gits_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(AUTHOR_VARIABLE, raising=False)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(["git", "-C", tmp_path, "config", "user.name", "Git Name"], check=True)
    assert current_author(tmp_path) == "Git Name"
    monkeypatch.setenv(AUTHOR_VARIABLE, " Dana \n Weber ")
    assert current_author(tmp_path) == "Dana Weber"
    with authored_by("ada"):
        assert current_author(tmp_path) == "ada"
    assert current_author(tmp_path) == "Dana Weber"
    monkeypatch.setenv(AUTHOR_VARIABLE, " ")
    assert current_author(tmp_path) == "Git Name"


def test_author_of_one_request_is_not_that_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(AUTHOR_VARIABLE, raising=False)
    found: list[str | None] = []
    with authored_by("ada"):
        other = Thread(target=lambda: found.append(stated_author()))
        other.start()
        other.join()
        assert stated_author() == "ada"
    assert found == [None] and stated_author() is None


def test_numbers_stay_with_their_names_and_one_given_twice_is_refused(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    for name in ("legal-4f1c", "legal-99aa", "legal-4f1c"):
        give_number(ours / "adapters", name)
    give_number(ours / "evaluations", "0badcafe")
    assert read_numbers(ours / "adapters") == {"legal-4f1c": 1, "legal-99aa": 2}
    assert [name_numbered(ours / "adapters", each) for each in ("2", "3", "legal")] == ["legal-99aa", None, None]
    assert name_numbered(ours / "evaluations", "1") == "0badcafe"
    shutil.copytree(ours, theirs)
    give_number(ours / "adapters", "ours")
    give_number(theirs / "adapters", "theirs")
    merged, other = ours / NUMBERS_FILE, theirs / NUMBERS_FILE
    merged.write_bytes(merged.read_bytes() + other.read_bytes().splitlines(keepends=True)[-1])
    with pytest.raises(UserError, match=r"The number 3 was given twice, (.|\n)*Use a name: ours, theirs\."):
        name_numbered(ours / "adapters", "3")
    assert name_numbered(ours / "adapters", "2") == "legal-99aa"
    # A full disk cuts the line that is being written.
    other.write_bytes(other.read_bytes()[:-20])
    assert read_numbers(theirs / "adapters") == {"legal-4f1c": 1, "legal-99aa": 2}
    give_number(theirs / "adapters", "again")
    assert name_numbered(theirs / "adapters", "3") == "again"
