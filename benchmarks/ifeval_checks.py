"""IFEval's checks: agreement with lm-eval's copy of Google's code, check by check, and the processor time of both.

    pip install langdetect immutabledict nltk
    python benchmarks/ifeval_checks.py FILE.jsonl

FILE is Google's input_data.jsonl. Each of its checks judges texts made by hand, some prompts of the file, and a text
made to pass and one made to fail the check. Numbers of sentences are left out, because nltk's model has to be fetched.
Prints a line for each kind of check with differences, and one JSON line.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

from pydantic import TypeAdapter

from tunewright.evaluation.benchmarks.checks import Check
from tunewright.evaluation.benchmarks.instructions import _google

TEXTS = (
    "So it is.",
    "SO IT IS, AND MORE OF IT. THE ANSWER IS YES AND IT IS GOOD.",
    "the answer is short and it is in lower case only, as it was asked for.",
    "* one thing\n* another thing\n* a third",
    "<<Title>>\nFirst paragraph.\n\n***\n\nSecond paragraph.",
    "P.S. And so it goes.",
    '"The whole answer is quoted."',
    '{"a": 1}',
    "My answer is yes.",
    "[name] and [address] and [date]",
    "*a* and **b** and *c d*",
)
PROMPTS = 25
LEFT_OUT = "length_constraints:number_sentences"


def main(file: Path) -> None:
    """Compare all judgements."""
    # langdetect draws, and Google's code counts a random letter in place of one that is no letter.
    random.seed(0)
    importlib.import_module("langdetect").DetectorFactory.seed = 0
    theirs = importlib.import_module("lm_eval.tasks.ifeval.instructions_registry").INSTRUCTION_DICT
    checks: TypeAdapter[Check] = TypeAdapter(Check)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    texts = [*TEXTS, *(row["prompt"] for row in rows[:PROMPTS])]
    judged, different = 0, Counter[str]()
    seconds = {"tunewright": 0.0, "lm_eval": 0.0}
    for row in rows:
        for name, values in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            given = {key: value for key, value in values.items() if value is not None}
            wanted = _google(name, given)
            if wanted is None or name == LEFT_OUT:
                continue
            check, reference = checks.validate_python(wanted), theirs[name](name)
            reference.build_description(**given)
            for text in filter(str.strip, [*texts, *check.examples()]):
                began = time.process_time()
                found = check.passes(text)
                between = time.process_time()
                expected = bool(reference.check_following(text))
                seconds["tunewright"] += between - began
                seconds["lm_eval"] += time.process_time() - between
                judged += 1
                different[name] += found != expected
    for name, count in (+different).most_common():
        print(f"{name:>45} {count:>5} different")
    equal = judged - different.total()
    print(f"{equal:,} of {judged:,} judgements are equal; " + ", ".join(f"{k} {v:.1f} s" for k, v in seconds.items()))
    print(json.dumps({"equal": equal, "judged": judged, "different": dict(+different), "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
