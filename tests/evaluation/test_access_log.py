"""The access log of openings: a line that was changed, removed or put in is found and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factories import make_evidence, make_items, make_opening
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json, write_text
from tunewright.evaluation.access_log import ACCESS_LOG, AccessLog
from tunewright.evidence.logged_access import EarlierAccess, LoggedAccess, openings_text
from tunewright.evidence.schema import EVIDENCE_FILE
from tunewright.evidence.verdict import verdict

EVIDENCE = make_evidence(make_items())


def chain(count: int) -> list[LoggedAccess]:
    openings: list[LoggedAccess] = []
    for number in range(1, count + 1):
        openings.append(make_opening(number, openings[-1].digest if openings else ""))
    return openings


def lines(openings: list[LoggedAccess]) -> list[str]:
    return [canonical_json(opening.model_dump(mode="json")) for opening in openings]


def written(folder: Path, text: list[str]) -> Path:
    write_text(folder / ACCESS_LOG, "".join(f"{line}\n" for line in text))
    return folder


def facts(opening: LoggedAccess) -> dict[str, Any]:
    kept = set(LoggedAccess.model_fields) - {"schema_version", "number", "time", "previous", "digest"}
    return {name: getattr(opening, name) for name in kept}


def found(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        AccessLog(folder)
    assert error.value.where is not None
    assert "Restore the access log" in str(error.value.fix)
    return error.value.where.removeprefix(str(folder / ACCESS_LOG))


def test_openings_are_chained_and_read_back(tmp_path: Path) -> None:
    access_log = AccessLog(tmp_path)
    assert access_log.openings == []
    first, second = (access_log.open(**facts(make_opening(n))) for n in (1, 2))
    assert (first.number, first.previous, second.number, second.previous) == (1, "", 2, first.digest)
    assert AccessLog(tmp_path).openings == [first, second]


def test_ledger_never_rewrites_a_line(tmp_path: Path) -> None:
    access_log = AccessLog(tmp_path)
    access_log.open(**facts(make_opening(1)))
    before = (tmp_path / ACCESS_LOG).read_text()
    access_log.open(**facts(make_opening(2)))
    assert (tmp_path / ACCESS_LOG).read_text().startswith(before)


def test_ledger_counts_a_resumed_evaluation_as_one_opening(tmp_path: Path) -> None:
    first = AccessLog(tmp_path).open(**facts(make_opening(1)))
    AccessLog(tmp_path).open(**facts(make_opening(2)))
    assert AccessLog(tmp_path).open(**facts(make_opening(1))) == first
    assert len(AccessLog(tmp_path).openings) == 2


def test_ledger_records_both_of_two_concurrent_openings(tmp_path: Path) -> None:
    one, other = AccessLog(tmp_path), AccessLog(tmp_path)
    one.open(**facts(make_opening(1)))
    assert other.open(**facts(make_opening(2))).number == 2
    assert len(AccessLog(tmp_path).openings) == 2


CHANGES = [("margin", "0.02", "0.01"), ("author", '"ann"', '"bob"'), ("time", "2026-01", "2025-01")]


@pytest.mark.parametrize("line", [1, 2, 3])
@pytest.mark.parametrize(("field", "was", "becomes"), CHANGES)
def test_ledger_names_a_changed_line(tmp_path: Path, line: int, field: str, was: str, becomes: str) -> None:
    text = lines(chain(3))
    assert was in text[line - 1], field
    text[line - 1] = text[line - 1].replace(was, becomes)
    assert found(written(tmp_path, text)) == f":{line}"


@given(st.integers(0, 2), st.data())
def test_ledger_detects_any_changed_character(tmp_path_factory: Any, line: int, data: st.DataObject) -> None:
    text = lines(chain(3))
    place = data.draw(st.integers(0, len(text[line]) - 1))
    other = data.draw(st.characters(codec="utf-8", exclude_characters="\n" + text[line][place]))
    text[line] = text[line][:place] + other + text[line][place + 1 :]
    folder = written(tmp_path_factory.mktemp("access-log"), text)
    try:
        assert AccessLog(folder).openings == chain(3)  # white space between values says nothing
    except UserError as error:
        assert str(error.where).endswith((f":{line + 1}", f":{line + 2}"))


@pytest.mark.parametrize("line", [1, 2])
def test_ledger_detects_a_removed_line(tmp_path: Path, line: int) -> None:
    text = lines(chain(3))
    del text[line - 1]
    assert found(written(tmp_path, text)) == f":{line}"


def test_ledger_detects_a_line_changed_with_its_digest(tmp_path: Path) -> None:
    openings = chain(3)
    forged = openings[1].model_copy(update={"author": "bob", "digest": ""})
    openings[1] = forged.model_copy(update={"digest": forged.true_digest})
    assert found(written(tmp_path, lines(openings))) == ":3"


def test_ledger_detects_an_inserted_or_swapped_line(tmp_path: Path) -> None:
    first, second, third = lines(chain(3))
    assert found(written(tmp_path, [first, first, second, third])) == ":2"
    assert found(written(tmp_path, [first, third, second])) == ":2"


def test_ledger_names_an_invalid_line(tmp_path: Path) -> None:
    text = lines(chain(2))
    assert found(written(tmp_path, [*text, "{}"])) == ":3"
    assert found(written(tmp_path, [*text, text[0][:40]])) == ":3"


@pytest.mark.parametrize("left", [0, 1])
def test_ledger_detects_truncation_by_the_evidence(tmp_path: Path, left: int) -> None:
    openings = chain(2)
    evidence = EVIDENCE.model_copy(update={"opening": openings[1], "id": openings[1].evaluation})
    write_text(tmp_path / evidence.id / EVIDENCE_FILE, evidence.model_dump_json())
    assert AccessLog(written(tmp_path, lines(openings))).openings == openings
    assert found(written(tmp_path, lines(openings)[:left])) == ":2"
    (tmp_path / ACCESS_LOG).unlink()
    assert found(tmp_path) == ":2"


def test_ledger_detects_a_rebuilt_chain_by_the_evidence(tmp_path: Path) -> None:
    opening = chain(1)[0]
    evidence = EVIDENCE.model_copy(update={"opening": opening})
    write_text(tmp_path / evidence.id / EVIDENCE_FILE, evidence.model_dump_json())
    assert found(written(tmp_path, lines([make_opening(1, author="bob")]))) == ":1"


def test_evidence_older_than_the_ledger_needs_none(tmp_path: Path) -> None:
    older = {k: v for k, v in json.loads(EVIDENCE.model_dump_json()).items() if k not in {"opening", "openings"}}
    write_text(tmp_path / EVIDENCE.id / EVIDENCE_FILE, json.dumps(older))
    assert AccessLog(tmp_path).openings == []


# What a verdict says of earlier openings


def earlier(number: int, shared: int | None = 60) -> EarlierAccess:
    opening = make_opening(number)
    return EarlierAccess(**opening.model_dump(include=set(EarlierAccess.model_fields)), shared_items=shared)


def test_verdict_warns_of_earlier_openings() -> None:
    assert "opened" not in " ".join(verdict(EVIDENCE).reasons)
    opened = EVIDENCE.model_copy(update={"openings": (earlier(1), earlier(2))})
    (caution,) = [reason for reason in verdict(opened).reasons if "opened" in reason]
    assert caution.startswith("Caution: The test items had been opened 2 times before this (last on 2026-01-02")
    assert "by ann, with court-citations-2" in caution
    assert verdict(opened).decision == verdict(EVIDENCE).decision


def test_openings_text_counts_opened_and_unknown_items() -> None:
    assert openings_text([earlier(1, 13)], 60).startswith("13 of the 60 test items had been opened once")
    unknown = openings_text([earlier(1, None)], 60)
    assert "The items of line 1 are unknown" in unknown
