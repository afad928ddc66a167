"""Write a small project with every kind of file that the next version has to open, as one archive.

Run it with the code whose files are to be kept, and give the archive a new name: those that are there stay. From the
repository: PYTHONPATH=tests:tests/serving .venv/bin/python tests/golden/write_project.py FOLDER ARCHIVE
"""

from __future__ import annotations

import csv
import json
import os
import sqlite3
import sys
import tarfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from states import reservation

from making.command_line import pairs, tunewright, write_jsonl
from making.hosted_model import stand_in
from making.scripted_judge import honest, scripted
from making.small_adapters import create_key
from making.tiny_bases import build_base
from tunewright.core.log import AUTHOR_VARIABLE
from tunewright.evaluation.generations import Decoding, Generator
from tunewright.serving.tenants import State
from tunewright.serving.tenants.quota import RequestUsage

EXPECTED = "expected.json"
"""The documents of `READING`, a tenant's key, and what decides the answers of each journal of generations."""
READING = (
    ("data", "log"),
    ("data", "verify"),
    ("data", "review", "--status"),
    ("keys", "list"),
    ("adapters", "list"),
    ("adapters", "show"),
    ("adapters", "verify"),
    ("access-log",),
    ("verdict",),
    ("human-eval", "--results"),
    ("judge", "--estimate"),
    ("releases",),
    ("tenant", "list"),
    ("tenant", "usage"),
    ("audit", "show"),
    ("audit", "verify"),
)
"""Commands that read what the others have written."""
STATE = Path("serving") / "state.sqlite"
JOURNALS = ("generations", "incumbents", "judge")


def write_project(folder: Path) -> None:
    """Go the whole pipeline, with reviews, opinions, tenants and releases."""
    os.environ |= {AUTHOR_VARIABLE: "ann", "HOME": str(folder.parent / "home")}
    folder.mkdir(parents=True)
    build_base(folder / "base")
    decodings = _recorded_decodings()
    with stand_in() as hosted, scripted(honest) as judge:
        _write_config(folder, hosted.url, judge.url)
        _write_dataset(folder)
        run("keys", "trust", create_key("ann-key"), "-p", folder)
        run("train", "-p", folder)
        run("adapters", "sign", "-p", folder)
        run("crossval", "--folds", "2", "--force", "-p", folder)
        run("evaluate", "-p", folder)
        run("judge", "-p", folder)
    _fill_in(folder, "human-eval", verdict=lambda number: "AB"[number % 2], how=("--items", "8"))
    key = _write_serving(folder)
    os.environ["HOME"] = str(folder.parent / "of-somebody-else")
    documents = {" ".join(command): run(*command, "-p", folder) for command in READING}
    expected = {"key": key, "decodings": decodings, "documents": documents}
    (folder / EXPECTED).write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _recorded_decodings() -> dict[str, object]:
    """Collect, while arms answer, the facts that decide the answers of each journal, by the journal's name."""
    found: dict[str, object] = {}
    decoding = Generator.decoding

    def recording(self: Generator, *arguments: Any, **options: Any) -> Decoding:
        made = decoding(self, *arguments, **options)
        found[made.key[:16]] = asdict(made)
        return made

    setattr(Generator, "decoding", recording)  # noqa: B010
    return found


def _write_config(folder: Path, hosted: str, judge: str) -> None:
    config = {
        "name": "golden",
        "base_model": "base",
        "data": {"sources": ["pairs.jsonl", "more.jsonl"], "test_size": 0.3},
        "train": {
            "preset": "all-linear",
            "learning_rate": 0.003,
            "lora_r": 2,
            "batch_size": 8,
            "epochs": 1,
            "dtype": "float32",
        },
        "evaluate": {
            "num_fewshot": [1],
            "incumbents": [
                {"name": "hosted", "base_url": hosted, "model": "stand-in", "price_input": 1.0, "price_output": 2.0}
            ],
        },
        "judge": {"base_url": judge, "model": "scripted", "controls": 14},
        "regressions": {"samples": 0},
    }
    (folder / "tunewright.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def _write_dataset(folder: Path) -> None:
    """Three files, of which one is removed again, and reviews by two people."""
    rows = pairs(110)
    turns = [{"role": "user", "content": "a conversation"}, {"role": "assistant", "content": "about nothing"}]
    for name, lines in (("pairs", rows[:90]), ("more", [*rows[90:105], {"messages": turns}]), ("wrong", rows[105:])):
        file = write_jsonl(folder / f"{name}.jsonl", lines)
        run("data", "add", str(file), "--message", f"add {name}", "-p", folder)
        file.unlink()
    run("data", "remove", "--source", "wrong.jsonl", "--because", "a wrong file", "-p", folder)
    _fill_in(folder, "data", "review", verdict=lambda number: "wrong" if number == 2 else "right", how=("--fixed", "1"))
    _fill_in(folder, "data", "review", verdict=lambda _: "right", how=("--second",), reviewer="bob")


def _fill_in(
    folder: Path, *command: str, verdict: Callable[[int], str], reviewer: str = "ada", how: tuple[str, ...] = ()
) -> None:
    """Answer an exported table."""
    table = folder.parent / "table.csv"
    run(*command, *how, "--export", str(table), "--reviewer", reviewer, "-p", folder)
    with table.open(encoding="utf-8-sig", newline="") as written:
        rows = list(csv.DictReader(written))
    with table.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "verdict": verdict(number)} for number, row in enumerate(rows[:12]))
    run(*command, "--import", str(table), "--reviewer", reviewer, "-p", folder)
    table.unlink()


def _write_serving(folder: Path) -> str:
    """Two aliases, one taken back, tenants with limits, keys and requests, one of them disabled; acme's key."""
    adapter = next((folder / "adapters").iterdir()).name
    for alias in ("courts", "recipes"):
        run("deploy", alias, adapter, "--force", "--because", "a test", "--untested", "no engine", "-p", folder)
    run("undeploy", "recipes", "-p", folder)
    run("tenant", "add", "acme", "--alias", "courts", "--requests", "60", "-p", folder)
    run("tenant", "add", "globex", "--alias", "recipes", "-p", folder)
    key = str(run("tenant", "key", "add", "acme", "-p", folder)["key"])
    run("tenant", "key", "add", "globex", "-p", folder)
    run("tenant", "disable", "globex", "-p", folder)
    with State(f"sqlite:///{folder / STATE}", "ann") as state:
        caller, release = state.keys.caller(key), state.releases.live()["courts"]
        for tokens in (10, 20, 30):
            number = state.quota.reserve(reservation(caller, release, tokens), "gateway")
            state.quota.settle(number, RequestUsage(tokens, 7, 0.0, 0.25, 0.5, "stop"))
    return key


def pack(folder: Path, archive: Path) -> None:
    """Write the project's files but the base, the working folder but its journals, and the database's log."""
    with closing(sqlite3.connect(folder / STATE)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.execute("VACUUM")
    with tarfile.open(archive, "w:xz", format=tarfile.USTAR_FORMAT) as out:
        for file in sorted(each for each in folder.rglob("*") if each.is_file()):
            name = file.relative_to(folder)
            left_out = name.parts[0] == "base" or (name.parts[0] == ".tunewright" and name.parts[1] not in JOURNALS)
            if not left_out and "-" not in name.suffix:
                entry = tarfile.TarInfo(str(name))
                entry.size = file.stat().st_size
                with file.open("rb") as data:
                    out.addfile(entry, data)


def run(*command: str | Path) -> dict[str, Any]:
    """Run a command; its JSON document."""
    ran = tunewright(*command, "--json")
    if ran.code not in (0, 3, 4):  # a measured no, and "can't tell", are results
        raise SystemExit(f"{command} ended with {ran.code}:\n{ran.stdout}\n{ran.stderr}")
    return ran.document


if __name__ == "__main__":
    write_project(Path(sys.argv[1]))
    pack(Path(sys.argv[1]), Path(sys.argv[2]))
