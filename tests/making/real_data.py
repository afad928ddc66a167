"""Real data sets as pairs, for tests and benchmarks; they are no part of the project."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

from tunewright.data.examples import Example, Message

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"


def _example(system: str, prompt: str, completion: str) -> Example:
    return Example((Message("system", system), Message("user", prompt), Message("assistant", completion)))


def pubmedqa() -> list[Example]:
    """Long contexts: abstract and question to a conclusion and yes, no or maybe (Jin et al. 2019, arXiv 1909.06146)."""
    rows = json.loads((SHARED / "pubmedqa" / "ori_pqal.json").read_text(encoding="utf-8"))
    return [
        _example(
            "Answer the question from the abstract; end with yes, no or maybe.",
            "\n\n".join([*row["CONTEXTS"], row["QUESTION"]]),
            f"{row['LONG_ANSWER']}\n{row['final_decision']}",
        )
        for row in rows.values()
    ]


def snips_slots() -> list[Example]:
    """JSON answers: a request to its intent and slots (Coucke et al. 2018, arXiv 1805.10190)."""
    examples = []
    for path in sorted((SHARED / "snips_slots").glob("*.json")):
        # One emoji in train_PlayMusic_full.json is written as two halves (CESU-8); the rest of that file is UTF-8.
        text = path.read_text(encoding="utf-8", errors="replace")
        ((intent, rows),) = json.loads(text).items()
        for row in rows:
            slots = [{"text": part["text"], "entity": part["entity"]} for part in row["data"] if "entity" in part]
            answer = json.dumps({"intent": intent, "slots": slots}, ensure_ascii=False)
            examples.append(_example("Give intent and slots as JSON.", "".join(p["text"] for p in row["data"]), answer))
    return examples


def banking77() -> list[Example]:
    """Short questions to one of 77 intents (Casanueva et al. 2020, arXiv 2003.04807)."""
    examples = []
    for name in ("train.csv", "test.csv"):
        with (SHARED / "banking77" / name).open(encoding="utf-8", newline="") as file:
            examples += [_example("Name the intent.", r["text"], r["category"]) for r in csv.DictReader(file)]
    return examples


DATA_SETS: dict[str, Callable[[], list[Example]]] = {
    "pubmedqa": pubmedqa,
    "snips_slots": snips_slots,
    "banking77": banking77,
}
