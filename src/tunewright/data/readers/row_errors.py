"""Why a row is no example: stable codes, the place inside the row, and what to do (docs/formats.md lists them)."""

from __future__ import annotations

import re

JsonPath = tuple[str | int, ...]

CODES: dict[str, tuple[str, str]] = {
    "E101": ("a byte that the file's encoding does not have", "Save the file in one encoding, UTF-8."),
    "E102": ("not JSON", "Write one JSON object per line, or one JSON array."),
    "E103": ("a row that is not an object", "Write each row as an object with named keys."),
    "E104": ("a key that stands twice in one object", "Keep one of the two: they may differ."),
    "E105": ("NaN or Infinity, which JSON does not have", "Write text, or leave the row out."),
    "E106": ("lists or objects nested too deep to be read", "Leave the row out, or flatten it."),
    "E107": ("a CSV row with more or fewer fields than the header", "Put fields with delimiters or quotes in quotes."),
    "E201": ("a key that no known kind of row has", "Correct its spelling, or name it in data.drop_columns."),
    "E202": (
        "a key that this kind of row needs is missing",
        "Add it, or name your keys by data.input and data.output.",
    ),
    "E203": ("a kind of row that has no input with an ideal output", "Write prompt and completion, or messages."),
    "E204": ("tools or tool calls, which are not trained", "Write the call as the text of a turn."),
    "E205": (
        "a group's value that is missing or not plain",
        "Give each row the key of data.group_by: text, number or null.",
    ),
    "E206": ("turns that are not a list", "Write a list of at least one user and one assistant turn."),
    "E207": (
        "a row that lacks what data.input or data.output uses",
        "Add it, or have the template provide for rows without it: is defined, default.",
    ),
    "E208": ("an image, and only text is trained", "Leave such rows out, or name the key in data.drop_columns."),
    "E301": ("a turn that is not an object", "Write each turn as an object with a role and its content."),
    "E302": ("a turn without role or content", "Give the turn both."),
    "E303": ("a key that a turn does not have", "Take it out: a turn is a role, its content and perhaps a weight."),
    "E304": ("an unknown role", "Write system, user or assistant."),
    "E305": ("a value that is not text", "Write text in quotes; leave out rows that have none."),
    "E306": ("a text given as a list of parts", "Join the texts of its parts."),
    "E307": ("a weight that says nothing", "Give assistant turns the weight 1 or 0, and other turns none."),
    "E308": ("a last turn that is not trained", "End the conversation at its last trained answer."),
    "E309": ("a turn with a name", "Take the name out: chat templates do not write it."),
    "E401": ("an empty text", "Fill it in, or leave the row out."),
    "E402": ("half of a surrogate pair, which is no character", "Mend the text where it was cut."),
    "E403": ("a conversation of too many characters", "Shorten it, or raise data.max_characters."),
    "E404": ("a system turn that is not the first, or a second one", "Keep one system turn, at the beginning."),
    "E405": ("a first turn that is not the user's", "Begin with the user's turn, after the system turn."),
    "E406": ("two turns of one role in a row", "Merge them, or add the turn between them."),
    "E407": ("a last turn that is not the assistant's", "End with the ideal output."),
}
"""Code: what is wrong, what to do. A code's meaning never changes; a new meaning gets a new code."""


class RowError(ValueError):
    """Why a row is no example, and where in the row; the caller knows its file and line."""

    def __init__(self, code: str, reason: str, path: JsonPath = ()) -> None:
        assert code in CODES, code
        super().__init__(reason)
        self.code = code
        self.path = path

    @property
    def fix(self) -> str:
        """What to do about it."""
        return CODES[self.code][1]


def json_path(path: JsonPath) -> str:
    """Return a place inside a row as a JSONPath (RFC 9535): ``$.messages[2].content``; ``$`` is the row."""
    steps = []
    for step in path:
        if isinstance(step, int):
            steps.append(f"[{step}]")
        elif re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", step):
            steps.append(f".{step}")
        else:
            quoted = step.replace("\\", "\\\\").replace("'", "\\'")
            steps.append(f"['{quoted}']")
    return "$" + "".join(steps)


def place(path: JsonPath) -> str:
    """Return the same for a sentence: ``messages[2].content``."""
    return json_path(path)[1:].removeprefix(".")
