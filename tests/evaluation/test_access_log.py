"""The access log: changed, removed and inserted lines are named, and so are files that differ from their lines."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from making.command_line import tunewright
from making.evidence import make_evidence, make_items, make_opening
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json, digest, file_digest, write_text
from tunewright.core.progress import LogReporter
from tunewright.evaluation.access_log import ACCESS_LOG, AccessLog, amendable, load_checked
from tunewright.evidence.common import References
from tunewright.evidence.files import EVIDENCE_FILE, ITEMS_FILE
from tunewright.evidence.logged_access import EarlierAccess, LoggedAccess, openings_text
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
    assert "The items of line 1 are unknown" in openings_text([earlier(1, None)], 60)


# Files that lines bind


ITEMS = "a line of items\n"


def counted(several: int) -> References:
    """A section of the evidence."""
    return References(items=60, inputs=60, several=several, references=60)


BOUND = EVIDENCE.model_copy(update={"references": counted(0)})


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """An evaluation that was written, judged and measured again."""
    evaluations = tmp_path / "evaluations"
    folder = evaluations / EVIDENCE.id
    access_log = AccessLog(evaluations)
    access_log.add(folder, {ITEMS_FILE: ITEMS, EVIDENCE_FILE: EVIDENCE.model_dump_json()})
    access_log.amend(folder, {"judge.jsonl": "first\n"}, references=counted(0))
    access_log.write(evaluations / "advice-1.json", "{}")
    access_log.write(tmp_path / "advice" / "1.json", "{}")
    return folder


def refused(evaluation: Path, file: Path) -> str:
    """The message about a file that is not as its line says."""
    with pytest.raises(UserError) as error:
        AccessLog(evaluation.parent).load(evaluation)
    assert error.value.where == str(file)
    assert "Restore it" in str(error.value.fix)
    with pytest.raises(UserError, match=file.name):
        AccessLog(evaluation.parent).require_all()
    return error.value.what


def test_written_files_are_bound_by_their_newest_line(evaluation: Path) -> None:
    access_log = AccessLog(evaluation.parent)
    assert access_log.load(evaluation) == BOUND
    access_log.require_all()
    access_log.require(evaluation.parent / "advice-1.json", evaluation.parent.parent / "advice" / "1.json")
    lines = [json.loads(line) for line in access_log.path.read_text().splitlines()]
    assert [set(line["files"]) for line in lines] == [
        {f"{EVIDENCE.id}/{ITEMS_FILE}", f"{EVIDENCE.id}/{EVIDENCE_FILE}"},
        {f"{EVIDENCE.id}/judge.jsonl", f"{EVIDENCE.id}/{EVIDENCE_FILE}"},
        {"advice-1.json"},
        {"../advice/1.json"},
    ]
    assert lines[1]["files"][f"{EVIDENCE.id}/{EVIDENCE_FILE}"] == file_digest(evaluation / EVIDENCE_FILE)
    assert access_log.openings == []


@pytest.mark.parametrize("name", [EVIDENCE_FILE, ITEMS_FILE, "judge.jsonl"])
def test_load_refuses_a_file_with_one_changed_bit(evaluation: Path, name: str) -> None:
    file = evaluation / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    line = 1 if name == ITEMS_FILE else 2
    assert f"{name} was changed after it was written" in (what := refused(evaluation, file))
    assert f"in line {line} of" in what


def test_load_refuses_evidence_from_before_an_amendment(evaluation: Path) -> None:
    (evaluation / EVIDENCE_FILE).write_text(EVIDENCE.model_dump_json())
    assert "was changed after it was written" in refused(evaluation, evaluation / EVIDENCE_FILE)


def test_load_refuses_an_evaluation_without_a_line(evaluation: Path) -> None:
    other = evaluation.with_name("ffffffffffff")
    shutil.copytree(evaluation, other)
    assert "evidence.json has no line in" in refused(other, other / EVIDENCE_FILE)
    assert AccessLog(evaluation.parent).load(evaluation) == BOUND


def test_load_refuses_evidence_when_the_last_lines_are_missing(evaluation: Path) -> None:
    log = evaluation.parent / ACCESS_LOG
    text = log.read_text().splitlines(keepends=True)
    log.write_text(text[0])
    refused(evaluation, evaluation / EVIDENCE_FILE)
    log.unlink()
    assert "has no line in" in refused(evaluation, evaluation / EVIDENCE_FILE)


def test_removed_since_names_later_evaluations_of_the_adapter(tmp_path: Path) -> None:
    access_log, opening = AccessLog(tmp_path), make_opening(1)
    access_log.open(**facts(opening))
    folder = tmp_path / opening.evaluation
    access_log.add(folder, {EVIDENCE_FILE: EVIDENCE.model_dump_json()})
    adapter = str(opening.adapter_digest)
    assert access_log.removed_since("2026-01-01", adapter) == []
    shutil.rmtree(folder)
    assert access_log.removed_since("2026-01-01", adapter) == [opening.evaluation]
    assert access_log.removed_since("2026-01-01", digest("another")) == []
    assert access_log.removed_since("9999-01-01", adapter) == []


# Kills


def test_writer_reports_a_lock_that_a_stopped_process_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunewright.evaluation.access_log._LOCK_S", 0.05)
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"Another command has been writing the access log for 0\.05 s"):
            AccessLog(tmp_path).write(tmp_path / "advice.json", "[]")
    finally:
        os.close(handle)
    AccessLog(tmp_path).write(tmp_path / "advice.json", "[]")


def killed(work: Callable[[], object], calls: int, *, after: bool) -> bool:
    """Run in a process that kills itself before or after its n-th rename; return whether it came that far."""
    child = os.fork()
    if child == 0:
        rename, left = Path.replace, [calls]

        def replace(self: Path, target: Path) -> Path:
            left[0] -= 1
            if left[0] == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            moved = rename(self, target)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return moved

        Path.replace = replace  # type: ignore[method-assign, assignment]
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name.endswith(".staged")]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", range(1, 6))
def test_killed_first_write_is_completed_or_undone_by_the_next_command(tmp_path: Path, call: int, after: bool) -> None:
    folder = tmp_path / "evaluations" / EVIDENCE.id
    files = {ITEMS_FILE: ITEMS, EVIDENCE_FILE: EVIDENCE.model_dump_json()}
    assert killed(lambda: AccessLog(folder.parent).add(folder, files), call, after=after)
    committed = (call, after) >= (3, True)  # two staged files, then the line
    assert len((folder.parent / ACCESS_LOG).read_text().splitlines() if committed else []) == committed
    AccessLog(folder.parent)
    assert (folder / EVIDENCE_FILE).exists() == folder.exists() == committed
    assert hidden(tmp_path) == []
    AccessLog(folder.parent).add(folder, files)
    assert AccessLog(folder.parent).load(folder) == EVIDENCE
    assert (folder / ITEMS_FILE).read_text() == ITEMS
    assert len((folder.parent / ACCESS_LOG).read_text().splitlines()) == 1
    assert not killed(lambda: AccessLog(folder.parent).add(folder, files), 6, after=False)


def test_verdict_finds_an_evaluation_whose_write_was_killed_after_its_line(tmp_path: Path) -> None:
    folder = tmp_path / "evaluations" / EVIDENCE.id
    files = {EVIDENCE_FILE: EVIDENCE.model_dump_json()}
    assert killed(lambda: AccessLog(folder.parent).add(folder, files), 2, after=True)
    assert not (folder / EVIDENCE_FILE).exists()
    ran = tunewright("verdict", "-p", tmp_path, "--json")
    assert (ran.code, ran.document["decision"]) == (0, "ship"), ran.stderr


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", range(1, 6))
def test_killed_amendment_is_completed_or_undone_by_the_next_command(evaluation: Path, call: int, after: bool) -> None:
    access_log = AccessLog(evaluation.parent)
    work = lambda: access_log.amend(evaluation, {"judge.jsonl": "second\n"}, references=counted(1))  # noqa: E731
    assert killed(work, call, after=after)
    found = AccessLog(evaluation.parent).load(evaluation)
    committed = (call, after) >= (3, True)
    assert (found.references, (evaluation / "judge.jsonl").read_text()) == (
        (counted(1), "second\n") if committed else (counted(0), "first\n")
    )
    assert hidden(evaluation.parent) == []
    assert access_log.amend(evaluation, {"judge.jsonl": "third\n"}, references=counted(2)).references == counted(2)
    AccessLog(evaluation.parent).require_all()


@pytest.mark.parametrize("call", range(1, 4))
@pytest.mark.parametrize("after", [False, True])
def test_killed_write_of_advice_is_completed_or_undone(evaluation: Path, call: int, after: bool) -> None:
    file = evaluation.parent.parent / "advice" / "1.json"
    assert killed(lambda: AccessLog(evaluation.parent).write(file, "[]"), call, after=after)
    AccessLog(evaluation.parent).require(file)
    assert file.read_text() == ("[]" if (call, after) >= (2, True) else "{}")
    assert hidden(evaluation.parent.parent) == []


def test_planted_staged_file_is_not_put_in_place(evaluation: Path) -> None:
    (evaluation / f".{EVIDENCE_FILE}.staged").write_text("{}")
    assert AccessLog(evaluation.parent).load(evaluation) == BOUND
    assert hidden(evaluation) == []


def test_reader_is_never_refused_while_another_process_amends(evaluation: Path) -> None:
    child = os.fork()
    if child == 0:
        for number in range(1, 20):
            AccessLog(evaluation.parent).amend(evaluation, references=counted(number))
        os._exit(0)
    seen = []
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        found = AccessLog(evaluation.parent).load(evaluation).references
        assert found is not None
        seen.append(found.several)
    assert AccessLog(evaluation.parent).load(evaluation).references == counted(19)
    assert seen == sorted(seen)


# Evidence elsewhere


def test_evidence_of_another_project_is_checked_against_that_projects_log(evaluation: Path, tmp_path: Path) -> None:
    here = tmp_path / "here" / "evaluations"
    for place in (evaluation, evaluation / EVIDENCE_FILE):
        assert load_checked(place, here, LogReporter()) == BOUND
    file = evaluation / EVIDENCE_FILE
    file.write_text(file.read_text().replace("0.02", "0.01"))
    with pytest.raises(UserError, match="was changed after it was written"):
        load_checked(evaluation, here, LogReporter())


def test_evidence_without_a_log_is_read_with_a_warning_and_not_amended(
    evaluation: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = tmp_path / "alone" / "ID"
    shutil.copytree(evaluation, alone)
    assert load_checked(alone, evaluation.parent, LogReporter()) == BOUND
    assert "no access log shows that it was not changed" in caplog.text
    with pytest.raises(UserError, match="outside of a project"):
        amendable(alone, evaluation.parent)


@pytest.mark.parametrize("place", ["copy", "link", "file"])
def test_evidence_in_the_projects_folder_needs_its_log(evaluation: Path, tmp_path: Path, place: str) -> None:
    forged = tmp_path / "elsewhere" / "forged"
    shutil.copytree(evaluation, forged)
    given = evaluation.with_name("forged")
    if place == "link":
        given.symlink_to(forged)
    elif place == "copy":
        forged.rename(given)
    else:
        given = evaluation / "forged.json"
        shutil.copy(forged / EVIDENCE_FILE, given)
    with pytest.raises(UserError, match="has no line in"):
        load_checked(given, evaluation.parent, LogReporter())


@pytest.fixture
def opened_twice(tmp_path: Path) -> Path:
    """The evaluations of a project with a dataset, whose test split was opened twice."""
    (tmp_path / "dataset").mkdir()
    log = AccessLog(tmp_path / "evaluations")
    for opening in chain(2):
        log.open(**facts(opening))
    return tmp_path / "evaluations"


def test_deleted_evaluations_do_not_reset_the_openings(opened_twice: Path) -> None:
    before = AccessLog(opened_twice).openings
    shutil.rmtree(opened_twice)
    with pytest.raises(UserError, match=r"access log is missing: .* has 2 openings of the test split") as caught:
        AccessLog(opened_twice)
    assert caught.value.where == str(opened_twice / ACCESS_LOG)
    # The command that the error names restores it.
    assert os.system(str(caught.value.fix).partition("copy: ")[2]) == 0
    assert AccessLog(opened_twice).openings == before
    assert AccessLog(opened_twice).open(**facts(chain(3)[2])).number == 3


def test_log_that_began_anew_or_is_an_earlier_one_is_refused(opened_twice: Path) -> None:
    log = opened_twice / ACCESS_LOG
    whole = log.read_text()
    for text in (whole.splitlines(keepends=True)[0], "".join(f"{line}\n" for line in lines(chain(4)[:1]))):
        log.write_text(text)
        with pytest.raises(UserError, match=r"Line \d of the access log is not the one of its copy"):
            AccessLog(opened_twice)
    log.write_text(whole)
    assert len(AccessLog(opened_twice).openings) == 2


def test_log_of_an_earlier_version_without_a_copy_opens_and_gets_one(opened_twice: Path) -> None:
    copy = opened_twice.parent / "dataset" / ACCESS_LOG
    copy.unlink()
    log = AccessLog(opened_twice)
    assert len(log.openings) == 2 and not copy.exists()
    log.open(**facts(chain(3)[2]))
    assert copy.read_text() == (opened_twice / ACCESS_LOG).read_text()
    # A crash between the two writes leaves a copy that is behind.
    copy.write_text("".join(copy.read_text().splitlines(keepends=True)[:2]))
    assert len(AccessLog(opened_twice).openings) == 3
