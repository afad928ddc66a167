"""Each public set becomes pairs by the one command that docs/how-to/public-sets.md has for it."""

from __future__ import annotations

import csv
import shlex
from pathlib import Path

import pytest

from making.command_line import tunewright
from making.real_data import DATA_SETS, SHARED
from tunewright.data.examples import Example
from tunewright.data.versions import load_version

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "public-sets.md"


def _commands() -> dict[str, str]:
    """The command below each set's heading."""
    commands, heading = {}, ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        heading = line.removeprefix("## ") if line.startswith("## ") else heading
        if line.startswith("tunewright data add "):
            commands[heading] = line.strip()
    return commands


def _counts() -> dict[str, tuple[int, int]]:
    """Pairs and new examples of each set, by the page's table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.read_text("utf-8").splitlines()]
    return {
        r[0].split()[0].rstrip(","): (_number(r[2]), _number(r[3])) for r in rows if len(r) == 4 and r[3][0].isdigit()
    }


def _number(text: str) -> int:
    return int(text.replace(",", ""))


def _words(command: str) -> list[str]:
    """The command's arguments, with names of files as a shell in this folder makes them."""
    words = shlex.split(command)[1:]
    return [
        name
        for word in words
        for name in (sorted(map(str, Path().glob(word))) if word.startswith("sets/") and "*" in word else [word])
    ]


KNOWN = {
    "banking77": ("train.csv:6", "How do I know if I will get my card, or if it is lost?", "card_arrival"),
    "gsm8k": (
        "test.jsonl:2",
        "A robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts in total does it take?",
        "It takes 2/2=<<2/2=1>>1 bolt of white fiber\n"
        "So the total amount of fabric is 2+1=<<2+1=3>>3 bolts of fabric\n#### 3",
    ),
    "snips_slots": (
        "train_AddToPlaylist_full.json:3",
        "Add another song to the Cita Romántica playlist. ",
        '{"intent": "AddToPlaylist", "slots": [{"text": "song", "entity": "music_item"}, '
        '{"text": "Cita Romántica", "entity": "playlist"}]}',
    ),
    "self_instruct": (
        "seed_tasks.jsonl:2",
        "What is the relation between the given pairs?\n\nNight : Day :: Right : Left",
        "The relation between the given pairs is that they are opposites.",
    ),
    "arc_easy": (
        "arc_easy.jsonl:2",
        "Question: Which piece of safety equipment is used to keep mold spores from entering the respiratory system?\n"
        "A. safety goggles\nB. breathing mask\nC. rubber gloves\nD. lead apron",
        "B. breathing mask",
    ),
}


def test_real_sets_page_has_a_command_and_counts_for_each_set() -> None:
    sets = [*KNOWN, "pubmedqa"]
    assert sorted(_commands()) == sorted(_counts()) == sorted(sets)


# The largest sets take a minute.
QUICK = ("gsm8k", "self_instruct")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in sorted([*KNOWN, "pubmedqa"])],
)
def test_add_imports_each_real_set_like_its_reference_reader(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"the data set {name} is not next to the project")
    monkeypatch.chdir(tmp_path)
    assert tunewright("init", ".").code == 0
    (tmp_path / "sets").symlink_to(SHARED.resolve())
    ran = tunewright(*_words(_commands()[name]), "--json")
    assert ran.code == 0, ran.stderr
    pairs, added = _counts()[name]
    done = ran.document
    assert (done["added"], done["added"] + len(done["duplicates"])) == (added, pairs)
    version = load_version(tmp_path / "dataset")
    assert len(version.members) == added
    if name in KNOWN:
        row, asked, answer = KNOWN[name]
        turns = tunewright("data", "show", row, "--json").document["messages"]
        assert [turn["content"] for turn in turns] == [asked, answer]
    if name in DATA_SETS:
        expected = {_pair(example) for example in DATA_SETS[name]()}
        assert {_pair(member.example) for member in version.members} <= expected


@pytest.mark.slow
def test_authors_split_of_banking77_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (SHARED / "banking77").is_dir():
        pytest.skip("the data set banking77 is not next to the project")
    page = PAGE.read_text(encoding="utf-8")
    config = page.split("```yaml\n")[1].split("```")[0]
    assert "split: test" in config
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tunewright.yaml").write_text(config, encoding="utf-8")
    (tmp_path / "sets").symlink_to(SHARED.resolve())
    ran = tunewright(*_words(_commands()["banking77"]), "--json")
    assert ran.code == 0, ran.stderr
    with (SHARED / "banking77" / "test.csv").open(encoding="utf-8", newline="") as file:
        authors = {" ".join(row["text"].split()).casefold() for row in csv.DictReader(file)}
    tested = load_version(tmp_path / "dataset").examples("test")
    assert {" ".join(m.example.input_text.split()).casefold() for m in tested} == authors
    counts = ran.document["version"]["counts"]
    assert all(f"{count:,}" in page for count in (counts["train"], counts["dev"], counts["test"]))
    assert f"{len(ran.document['overlapping'])} rows left out" in page


def _pair(example: Example) -> tuple[str, str]:
    return example.input_text, example.output
