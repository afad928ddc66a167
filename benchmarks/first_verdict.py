"""Minutes from nothing to the first verdict on 500 short rows, by the command line with its defaults.

The rows are drawn from BANKING77's published training file (Casanueva et al. 2020, arXiv 2003.04807; CC-BY-4.0): the
same number of rows of each of some intents. The first project converts the base (`cold`), the second finds it in the
cache (`warm`); everything is written to a temporary folder. Processor minutes count the command and its children.

python benchmarks/first_verdict.py DATA [--rows 500] [--intents 10] [--only cold] [--keep]
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

ROWS = "tickets.csv"
COMMANDS = ("init", "data add", "advise", "train", "evaluate", "verdict")
MEASURED = {0, 3, 4}
"""Exit codes of yes, of a measured no, and of can't tell."""
RESULT = Path(__file__).parent / "results" / "first_verdict.json"


def main() -> None:
    """Draw the rows, run the commands in a new project for each run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder of BANKING77's train.csv")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--intents", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", choices=("cold", "warm"), help="one of the two runs; warm expects a base in the cache"
    )
    parser.add_argument("--keep", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_rows(options.data / "train.csv", folder / ROWS, options.rows, options.intents, options.seed)
        environment = dict(os.environ)
        if options.only != "warm":
            environment["XDG_CACHE_HOME"] = str(folder / "cache")
        for run in (options.only,) if options.only else ("cold", "warm"):
            print(f"{run:<10} {'wall':>10} {'processor':>12}", flush=True)
            found[run] = time_commands(folder, run, environment)
    if options.keep:
        RESULT.write_text(
            json.dumps({"rows": options.rows, "intents": options.intents, "minutes": found}, indent=2) + "\n"
        )


def draw_rows(published: Path, drawn: Path, rows: int, intents: int, seed: int) -> None:
    """Write as many rows of each drawn intent as give `rows` together."""
    by_intent = defaultdict(list)
    with published.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            by_intent[row["category"]].append(row["text"])
    rng, each = random.Random(seed), rows // intents
    enough = sorted(intent for intent, texts in by_intent.items() if len(texts) >= each)
    pairs = [(text, intent) for intent in rng.sample(enough, intents) for text in rng.sample(by_intent[intent], each)]
    rng.shuffle(pairs)
    with drawn.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "category"), *pairs])


def time_commands(folder: Path, run: str, environment: dict[str, str]) -> dict[str, dict[str, float]]:
    """Run the commands in a new project, print and return their minutes; their own output goes to stderr."""
    arguments: dict[str, Sequence[str]] = {"init": (run, "--data", ROWS), "data add": (str(folder / ROWS),)}
    found = {}
    for command in COMMANDS:
        line = [sys.executable, "-m", "tunewright", *command.split(), *arguments.get(command, ())]
        where = folder if command == "init" else folder / run
        wall, before = time.perf_counter(), _processor()
        code = subprocess.run(line, cwd=where, env=environment, stdout=sys.stderr, check=False).returncode
        if code not in MEASURED:
            sys.exit(f"tunewright {command} ended with exit code {code}")
        found[command] = {"wall": (time.perf_counter() - wall) / 60, "processor": (_processor() - before) / 60}
        _show(command, found[command])
    _show("sum", {unit: sum(each[unit] for each in found.values()) for unit in ("wall", "processor")})
    return found


def _show(command: str, minutes: dict[str, float]) -> None:
    print(f"{command:<10} {minutes['wall']:>6.2f} min {minutes['processor']:>8.2f} min", flush=True)


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
