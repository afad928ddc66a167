"""Faults of rows: stable codes, the place inside the row, and the fix (listed in the reference, "Row errors")."""

from __future__ import annotations

import re

from tunewright.core.errors import UserError

JsonPath = tuple[str | int, ...]

CODES: dict[str, tuple[str, str]] = {
    "E101": ("an invalid byte for the file's encoding", "Save the file as UTF-8."),
    "E102": ("not JSON", "Write one JSON object per line, or one JSON array."),
    "E103": (
        "a row that is not an object",
        "Write each row as an object with named keys, or name the places in an array: --input 0 --output 1. Leave "
        "out a file without pairs.",
    ),
    "E104": ("a duplicate key in one object", "Keep one of the two values."),
    "E105": ("NaN or Infinity, which JSON does not allow", "Write text, or leave the row out."),
    "E106": ("lists or objects nested too deep", "Flatten the row, or leave it out."),
    "E107": ("a CSV row with more or fewer fields than the header", "Put fields with delimiters or quotes in quotes."),
    "E108": ("a row of more than 64 MiB", "Leave it out, or leave out its largest column."),
    "E109": (
        "a spreadsheet cell without a value: an error, or a formula that was never calculated",
        "Correct the formula, or open the file in a spreadsheet program and save it.",
    ),
    "E201": (
        "a key of no known row format",
        "Correct its spelling, name it in data.drop_columns, or name your keys in data.input and data.output.",
    ),
    "E202": (
        "a missing key of this row format",
        "Add it, or name your keys in data.input and data.output.",
    ),
    "E203": ("a row format without an input and an ideal output", "Write prompt and completion, or messages."),
    "E204": (
        "tools or tool calls in a row format that does not hold them",
        "Write chat rows: messages with tool_calls, and tools.",
    ),
    "E205": (
        "a missing or invalid group value",
        "Give each row the key of data.group_by: text, number or null.",
    ),
    "E206": ("turns that are not a list", "Write a list of at least one user and one assistant turn."),
    "E207": (
        "a missing key of data.input or data.output",
        "Add it, or handle rows without it in the template (is defined, default).",
    ),
    "E208": ("an image; only text is supported", "Leave such rows out, or name the key in data.drop_columns."),
    "E209": (
        "a preference row without two different answers to one prompt",
        "Write input, preferred_output and non_preferred_output, or prompt, chosen and rejected.",
    ),
    "E210": (
        "a missing, empty or unknown split",
        "Give each row train, dev or test in data.split_column, or give the whole file a split: --split test, or "
        "{path: FILE, split: test} in data.sources.",
    ),
    "E211": (
        "a row whose column names another split than its file has",
        "Correct the cell, or the file's split in data.sources or --split.",
    ),
    "E301": ("a turn that is not an object", "Write each turn as an object with a role and its content."),
    "E302": ("a turn without role or content", "Give the turn both."),
    "E303": (
        "an unknown key of a turn",
        "Delete it: a turn has role and content, perhaps weight, reasoning_content, tool_calls or tool_call_id.",
    ),
    "E304": ("an unknown role", "Use system, user, assistant or tool."),
    "E305": ("a value that is not text", "Write text in quotes, or leave the row out."),
    "E306": (
        "a text given as a list of parts that are not all text",
        "Write the text, take it from the parts in a template such as {{ parts[0].text }}, or leave the row out.",
    ),
    "E307": ("an invalid weight", "Give assistant turns the weight 1 or 0, and other turns none."),
    "E308": ("a last turn that is not trained", "End the conversation at its last trained answer."),
    "E309": ("a turn with a name", "Delete the name, which chat templates do not render."),
    "E310": (
        "thinking that is given twice, or has no end",
        "Write an assistant turn's thinking once: as reasoning_content, or as <think>…</think> before the answer.",
    ),
    "E401": ("an empty text", "Fill it in, or leave the row out."),
    "E402": ("half of a surrogate pair, which is not a character", "Correct the text where it was cut."),
    "E403": ("a conversation with too many characters", "Shorten it, or raise data.max_characters."),
    "E404": ("a system turn that is not the first turn", "Keep one system turn, at the beginning."),
    "E405": ("a first turn that is not the user's", "Begin with the user's turn, after the system turn."),
    "E406": ("two turns of one role in a row", "Merge them, or add the turn between them."),
    "E407": ("a last turn that is not the assistant's", "End with the ideal output."),
    "E408": ("too many combining marks in a row", "Remove the marks, or leave the row out."),
    "E501": (
        "a function declaration that is not valid",
        "Write name, description and parameters: a JSON Schema (Draft 2020-12) of the type object.",
    ),
    "E502": (
        "a function's schema that is recursive, too large or too slow, or refers to another document",
        "Simplify it: inline what it refers to, and leave out the recursion.",
    ),
    "E503": ("a call of a function that is not declared", "Declare it in tools, or correct the name."),
    "E504": ("arguments of a call that are not a JSON object", "Write an object, or its text in JSON."),
    "E505": ("arguments of a call that violate the function's schema", "Correct the arguments, or the schema."),
    "E506": ("a result that answers no open call", "Put one result after each call, with the call's id."),
    "E507": ("a call that repeats an id", "Give each call of the conversation a different id."),
    "E508": ("a call without a result before the next turn", "Add the result, or end the conversation with the call."),
    "E509": ("a call in a row that declares no functions", "Declare the functions in tools."),
    "E510": (
        "several calls in one turn where parallel_tool_calls is false",
        "Write one call in each turn, or drop the key.",
    ),
    "E511": (
        "a malformed call or result",
        'Write {"id": …, "type": "function", "function": {"name": …, "arguments": …}}.',
    ),
    "E512": ("a call or result without an id", "Give the call an id, and the result the same as tool_call_id."),
    "E513": ("a user turn right after a result", "Add the assistant's answer to the result before it."),
}
"""Code to description and fix. A code's meaning never changes; a new meaning gets a new code."""


class RowError(ValueError):
    """A fault of a row, with its place in the row; the caller knows file and line."""

    def __init__(self, code: str, reason: str, path: JsonPath = ()) -> None:
        assert code in CODES, code
        super().__init__(reason)
        self.code = code
        self.path = path

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str, JsonPath]]:
        return type(self), (self.code, str(self), self.path)

    @property
    def fix(self) -> str:
        """The action that fixes the fault."""
        return CODES[self.code][1]


class RowsElsewhereError(UserError):
    """The rows of a file, or their header, are at another place, which data.rows or data.header_row has to name."""


def json_path(path: JsonPath) -> str:
    """Return a place in a row as JSONPath (RFC 9535), such as ``$.messages[2].content``; ``$`` is the row."""
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
    """Return a place in a row for messages, such as ``messages[2].content``."""
    return json_path(path)[1:].removeprefix(".")
