"""Lines of the audit log in words, as the command line and the studio show them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tunewright.core.clock import minute

if TYPE_CHECKING:
    from tunewright.serving.tenants import AuditLine

_IN_OTHER_COLUMNS = {"id", "alias", "author", "created", "action", "digest"}
_ELSEWHERE = {"totals"}  # `tenant usage` shows them


def audit_details(line: AuditLine) -> list[str]:
    """Return a line's details in words, without those that are empty or stand in its other fields."""
    return list(_details(json.loads(line.details)))


def _details(details: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield a line's details in words, without those that are empty or in other columns."""
    for name, value in details.items():
        if value in (None, [], "") or name in _IN_OTHER_COLUMNS | _ELSEWHERE:
            continue
        words = prefix + name.replace("_", " ")
        if name == "system_prompt":
            if not value:
                yield f"{prefix}without its system prompt"
        elif name == "isolation":
            yield f"isolation test: {value['verdict']} on {value['engine']}, {value['tested'][:16].replace('T', ' ')}"
            if value["verdict"] != "isolated":
                yield from value["reasons"]
        elif name == "serving":
            passed = "failed" if value["reasons"] else "passed"
            yield f"serving check: {passed} on {value['engine']}, {value['checked'][:16].replace('T', ' ')}"
            yield from value["reasons"]
        elif isinstance(value, dict):
            yield from _details(value, "" if name == "grounds" else f"{words} ")
        elif name.endswith("expires"):
            yield f"{words} {minute(value)}"
        else:
            yield f"{words} {', '.join(value) if isinstance(value, list) else value}"
