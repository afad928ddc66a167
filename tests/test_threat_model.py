"""Every test that the threat model's page names is there, and every threat names one."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "concepts" / "threat-model.md").read_text(encoding="utf-8")
DEFENDED, _, OPEN = PAGE.partition("## Not defended")


def test_named_tests_exist_where_the_page_states() -> None:
    named = 0
    file = None
    for token in re.findall(r"`((?:tests/[\w/]+\.py)|(?:test_\w+))`", PAGE):
        if token.startswith("tests/"):
            file = ROOT / token
            assert file.is_file(), f"{token} is not there"
            continue
        assert file is not None, token
        defined = re.search(rf"^(?:async )?def {token}\(", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert defined, f"{file.name} has no test {token}"
        named += 1
    assert named > 50


def test_defended_threats_name_a_test() -> None:
    threats = re.split(r"^#{2,3} ", DEFENDED, flags=re.MULTILINE)[1:]
    # A heading over others has no text of its own.
    defended = [threat for threat in threats if threat.partition("\n")[2].strip()]
    assert len(defended) > 12
    for threat in defended:
        held = threat.partition("Tests:")[2]
        assert re.search(r"`tests/[\w/]+\.py`: `test_\w+`", " ".join(held.split())), threat.splitlines()[0]
