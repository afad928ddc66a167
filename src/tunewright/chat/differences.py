"""How two chat formats differ, by their descriptions: an adapter's lineage holds one, the base at hand has another."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two formats' descriptions don't have in common, each told in a few words; empty if they render alike."""
    told = []
    if before["kind"] != now["kind"]:
        names = {"own": "the base's own template", "plain": "the plain form"}
        told.append(f"they had {names[before['kind']]} and now have {names[now['kind']]}")
    elif before["template"] != now["template"]:
        old, new = (str(side["template"]).splitlines() for side in (before, now))
        changed = (i for i, pair in enumerate(zip_longest(old, new), start=1) if pair[0] != pair[1])
        line = next(changed, len(old))  # none: white space at the end
        told.append(f"the chat template differs from its line {line} on")
    if before["date"] != now["date"]:
        told.append(f"the date in the chat template was {before['date']} and is {now['date']}")
    for name in ("special_tokens", "end_tokens"):
        if before[name] != now[name]:
            told.append(f"the {name.replace('_', ' ')} were {before[name]} and are {now[name]}")
    if before["probe"] != now["probe"] and not told:
        told.append("the tokenizer makes other tokens of the same text (another version of it, or of tokenizers?)")
    return told
