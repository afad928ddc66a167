"""``data review`` and ``data suspects``: a pass by keys, on a terminal and without one, and by way of a spreadsheet."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tunewright as library
from making.command_line import pairs, tunewright, write_jsonl
from making.terminal import Terminal
from tunewright.cli import commands
from tunewright.core.progress import LogReporter
from tunewright.data.review.report import review_status
from tunewright.data.review.reviews import read_reviews
from tunewright.data.review.session import ReviewItem, ReviewSession
from tunewright.data.versions import load_version


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("review") / "project"
    folder.mkdir()
    (folder / "tunewright.yaml").write_text("name: review\n")
    write_jsonl(folder / "pairs.jsonl", pairs(150))
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    return folder


@pytest.fixture
def project(added: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(added, tmp_path / "project"))


@pytest.fixture
def press(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The keys that the reviewer will press; all of them have to be asked for."""
    import tunewright.cli.data_review as cli

    commands()
    keys: list[str] = []
    monkeypatch.setattr(cli, "interactive", lambda: True)
    monkeypatch.setattr(cli, "read_key", lambda: keys.pop(0))
    yield keys
    assert keys == []


def _status(project: Path) -> str:
    message = review_status(project / "dataset")
    assert message is not None
    return message.split(" ", 2)[2]


def _editor(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """An editor that does what ``script`` says with the file ``$1``."""
    path = folder / "editor.sh"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", str(path))


def test_review_shows_rows_with_neighbours_and_counts_verdicts(project: Path, press: list[str]) -> None:
    press += "rrwx" + "q"
    ran = tunewright("data", "review", "--reviewer", "ada", "-p", project)
    assert ran.code == 0
    assert "Nearest rows" in ran.stderr
    assert "Unknown key 'x'" in ran.stderr
    assert "under review: 1 of 3 wrong" in ran.stdout
    assert _status(project).startswith("under review: 1 of 3 wrong")


def test_review_edit_opens_the_editor_and_creates_a_version(
    project: Path, press: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _editor(monkeypatch, project, "echo 'a better answer' > $1")
    press += "eq"
    assert tunewright("data", "review", "--reviewer", "ada", "-p", project).code == 0
    ran = tunewright("data", "review", "--apply", "-m", "first look", "-p", project)
    assert "1 answer edited in review (ada): first look" in ran.stdout
    outputs = [m.example.output for m in load_version(project / "dataset").members]
    assert outputs.count("a better answer") == 1
    # The sample continues, and the row that was wrong in it still counts as wrong.
    assert _status(project) == (
        "under review: 1 of 1 wrong, at least 111 more to check, 1 checked in an earlier version"
    )


def test_enter_takes_the_answer_that_other_rows_suggest(project: Path, press: list[str]) -> None:
    suspects = tunewright("data", "suspects", "-p", project, "--json").document["suspects"]
    first = next(each for each in suspects if each["suggested"])
    press += ["s"] * suspects.index(first) + ["\r", "q"]
    ran = tunewright("data", "review", "--suspects", "--reviewer", "ada", "-p", project)
    assert f"Enter {first['suggested']}, as other rows suggest" in ran.stderr
    judged = read_reviews(project / "dataset").current_verdicts(first["key"])["ada"]
    assert (judged.verdict, judged.output) == ("edit", first["suggested"])


@pytest.mark.parametrize(
    ("script", "message"),
    [("exit 1", "The editor failed"), ("true", "is unchanged"), ("printf '\\377' > $1", "The editor failed")],
)
def test_review_records_nothing_when_the_editor_fails_or_changes_nothing(
    project: Path, press: list[str], monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    _editor(monkeypatch, project, script)
    press += "eq"
    assert message in tunewright("data", "review", "-p", project).stderr
    assert "no row checked yet" in _status(project)


def test_review_status_exits_with_the_verdict(project: Path, press: list[str]) -> None:
    assert tunewright("data", "review", "--status", "-p", project).code == 4
    press += "ww"
    tunewright("data", "review", "-p", project)
    ran = tunewright("data", "review", "--status", "-p", project, "--json")
    assert (ran.code, ran.document["status"]) == (3, "rejected: 2 of 2 wrong, not under 5%")


def test_conflicts_are_settled_with_all_verdicts_and_notes_in_sight(
    project: Path, press: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import tunewright.cli.data_review as cli

    monkeypatch.setattr(cli, "read_note", lambda _: "not \x1b[31mred")
    press += "nrq" + "w"
    tunewright("data", "review", "--reviewer", "ada", "-p", project)
    ran = tunewright("data", "review", "--reviewer", "ben", "--second", "-p", project)
    assert "Reviewers disagree on 1 row: `tunewright data review --conflicts` settles them." in " ".join(
        ran.stdout.split()
    )
    assert "not \\u001b[31mred" not in ran.stderr
    press += "r"
    ran = tunewright("data", "review", "--reviewer", "ben", "--conflicts", "-p", project, "--json")
    assert "ada: right (not \\u001b[31mred)" in ran.stderr and "ben: wrong" in ran.stderr
    assert ran.document["conflicts"] == []
    assert ran.document["agreements"][0]["agreed"] == 0
    assert tunewright("data", "review", "--conflicts", "--export", project / "out.csv", "-p", project).code == 2


def test_review_without_a_terminal_names_alternatives(project: Path) -> None:
    ran = tunewright("data", "review", "-p", project, "--json")
    assert ran.code == 2
    assert "--export and --import" in ran.document["error"]["fix"]
    assert not (project / "dataset" / "reviews.jsonl").exists()
    assert tunewright("data", "review", "--status", "--redraw", "-p", project).code == 2


@pytest.mark.slow
def test_review_completes_a_pass_on_a_terminal(project: Path) -> None:
    terminal = Terminal("data", "review", "-p", project, "--reviewer", "ada")
    terminal.wait_for("q quit")
    for key, shown in zip("rwus", ("0 of 1 wrong", "1 of 2 wrong", "Taken back", "unsettled"), strict=True):
        terminal.press(key)
        terminal.wait_for(shown)
    terminal.press("\x03")  # Ctrl-C: what was judged is kept
    terminal.wait_for("Stopped")
    assert terminal.code() == 130
    session = ReviewSession(project / "dataset", load_version(project / "dataset"), "ada", LogReporter())
    assert "0 of 2 wrong, at least 70 more to check, 1 unsettled" in session.status
    for _ in range(67):
        item = session.next()
        assert item is not None
        session.judge(item, "right")
    again = Terminal("data", "review", "-p", project, "--reviewer", "ada")
    again.wait_for("0 of 68 wrong, at least 4 more to check")
    for number in range(69, 72):
        again.press("r")
        again.wait_for(f"0 of {number} wrong, at least {72 - number} more to check\x1b")
    again.press("r")
    again.wait_for("accepted: 0 of 72 wrong, under 5% at 95%")
    assert again.code() == 0
    events = [json.loads(line)["event"] for line in (project / "dataset" / "reviews.jsonl").read_text().splitlines()]
    assert events.count("verdict") == 74  # right, wrong and skip before, then 71
    assert events.count("undo") == 1


def test_commands_report_whether_the_version_is_accepted(project: Path) -> None:
    digest = tunewright("data", "log", "-p", project, "--json").document["versions"][-1]["digest"][:12]
    for arguments in (["data", "log"], ["data", "show", "pairs.jsonl:1"], ["data", "suspects"], ["data", "verify"]):
        assert tunewright(*arguments, "-p", project).stderr.rstrip().endswith(f"Version {digest} not reviewed")
    asked = tunewright("data", "review", "--export", project / "rows.csv", "-p", project, "--reviewer", "ada")
    assert asked.code == 0
    message = tunewright("data", "log", "-p", project).stderr
    assert f"Version {digest} under review: no row checked yet" in message
    assert tunewright("data", "log", "-p", project, "--json").document["versions"]


def test_terminals_and_studios_offer_different_rows_until_they_end(project: Path, press: list[str]) -> None:
    data = library.open(project).data
    order = [card.key for card in _offered(data.review("ben"), 2)]
    folder = project / ".tunewright" / "leases"
    code = (
        "import sys, pathlib\n"
        "from tunewright import open as opened\n"
        "from tunewright.annotation import Leases\n"
        f"review = opened({str(project)!r}).data.review('ben')\n"
        f"leases = Leases(pathlib.Path({str(folder)!r}))\n"
        "print(leases.next(review, 'screen', 'sample').key, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline().decode().strip() == order[0]
        press += "rq"
        assert tunewright("data", "review", "--reviewer", "ada", "-p", project).code == 0
        found = read_reviews(project / "dataset")
        assert found.current_verdicts(order[0]) == {} and "ada" in found.current_verdicts(order[1])
        other.kill()
    press += "wq"
    assert tunewright("data", "review", "--reviewer", "ada", "-p", project).code == 0
    assert read_reviews(project / "dataset").current_verdicts(order[0])["ada"].verdict == "wrong"


def test_verdict_on_a_row_that_was_judged_meanwhile_is_refused(
    project: Path, press: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    review = library.open(project).data.review("ben")
    first = _offered(review, 1)[0]

    def key() -> str:
        if not read_reviews(project / "dataset").stacks:
            review.judge(first, "right")
            return "w"
        return "q"

    monkeypatch.setattr("tunewright.cli.data_review.read_key", key)
    ran = tunewright("data", "review", "--reviewer", "ada", "-p", project)
    assert f"{first.key[:12]} was judged meanwhile. Nothing was recorded" in ran.stderr
    assert set(read_reviews(project / "dataset").current_verdicts(first.key)) == {"ben"}
    assert press == []


def _offered(review: ReviewSession, most: int) -> list[ReviewItem]:
    return [review.item(key) for key in review.open_keys(most)]
