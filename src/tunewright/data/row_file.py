"""Rows that are being added: their turns wait in a temporary file, and memory holds their keys."""

from __future__ import annotations

import pickle
from typing import Any

from tunewright.core.spill import RecordFile
from tunewright.data.examples import Example, Message

_DIGEST = 32  # bytes


class RowFile:
    """Turns of examples in a temporary file.

    Raises:
        UserError: the disk of temporary files is full.
    """

    def __init__(self) -> None:
        self._records = RecordFile()
        self._last: tuple[int, tuple[Message, ...]] = (-1, ())

    def stored(self, example: Example) -> Example:
        """Write an example's turns, and return it without them: they are read when they are asked for."""
        turns = [(m.role, m.content, m.weight, m.calls, m.call_id) for m in example.messages]
        return _Stored(self, self._records.append(example.prompt_digest + pickle.dumps(turns, protocol=5)), example)

    def turns(self, number: int) -> tuple[Message, ...]:
        """Return the turns of an example."""
        # A row's input and output are often asked for one after the other.
        if number != self._last[0]:
            turns = pickle.loads(memoryview(self._records[number])[_DIGEST:])
            self._last = number, tuple([Message(*turn) for turn in turns])
        return self._last[1]

    def prompt_digest(self, number: int) -> bytes:
        """Return the digest of an example's prompt."""
        return self._records[number][:_DIGEST]


class _Stored(Example):
    """An example whose turns are in a file."""

    __slots__ = ("_file", "_number")
    _file: RowFile
    _number: int

    def __init__(self, file: RowFile, number: int, example: Example) -> None:
        self._keep("_file", file)
        self._keep("_number", number)
        self._keep("_pair_key", example.pair_key)
        for name in ("_prompt_digest", "_input_key", "_question_key", "_content_key"):
            self._keep(name, None)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Example) and self.messages == other.messages

    __hash__ = Example.__hash__

    @property
    def messages(self) -> tuple[Message, ...]:  # type: ignore[override]
        """All turns, read from the file."""
        return self._file.turns(self._number)

    @property
    def prompt_digest(self) -> bytes:
        """The digest of the prompt, read from the file."""
        return self._file.prompt_digest(self._number)
