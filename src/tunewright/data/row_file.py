"""Rows that are being added: their turns wait in a temporary file, and memory holds their keys."""

from __future__ import annotations

import pickle
from typing import Any, NamedTuple

from tunewright.core.spill import RecordFile
from tunewright.data.examples import Example, Message, rebuilt_example

_DIGEST = 32  # bytes


class _Record(NamedTuple):
    """Texts and counts that are asked for often, so that no turns have to be built for them, and the turns."""

    input_text: str
    output: str
    instructions: tuple[str, ...]
    trained_turns: int
    turns: list[tuple[Any, ...]]


class RowFile:
    """Turns of examples in a temporary file.

    Raises:
        UserError: the disk of temporary files is full.
    """

    def __init__(self) -> None:
        self._records = RecordFile()
        self._prompts = bytearray()
        self._last = (-1, _Record("", "", (), 0, []))

    def stored(self, example: Example) -> Example:
        """Write an example's turns, and return it without them: they are read when they are asked for."""
        turns = [(m.role, m.content, m.weight, m.calls, m.call_id) for m in example.messages]
        record = (example.input_text, example.output, example.instructions, example.trained_turns, turns)
        self._prompts += example.prompt_digest
        return _Stored(self, self._records.append(pickle.dumps(record, protocol=5)), example.pair_key)

    def record(self, number: int) -> _Record:
        """Return the record of an example."""
        last, record = self._last  # a row's input and output are often asked for one after the other
        if number != last:
            record = _Record(*pickle.loads(self._records[number]))
            self._last = number, record
        return record

    def prompt_digest(self, number: int) -> bytes:
        """Return the digest of an example's prompt."""
        return bytes(self._prompts[_DIGEST * number : _DIGEST * (number + 1)])


class _Stored(Example):
    """An example whose turns are in a file."""

    __slots__ = ("_file", "_number")
    _file: RowFile
    _number: int

    def __init__(self, file: RowFile, number: int, pair_key: str) -> None:
        self._keep("_file", file)
        self._keep("_number", number)
        self._keep("_pair_key", pair_key)
        for name in ("_prompt_digest", "_input_key", "_question_key", "_content_key"):
            self._keep(name, None)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Example) and self.messages == other.messages

    __hash__ = Example.__hash__

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuilt_example, (self._file.record(self._number).turns, self.pair_key, self.prompt_digest)

    @property
    def messages(self) -> tuple[Message, ...]:
        """All turns."""
        return tuple([Message(*turn) for turn in self._file.record(self._number).turns])

    @property
    def output(self) -> str:
        """The ideal output."""
        return self._file.record(self._number).output

    @property
    def input_text(self) -> str:
        """Text of the prompt without its instructions."""
        return self._file.record(self._number).input_text

    @property
    def instructions(self) -> tuple[str, ...]:
        """Texts of functions and system turns."""
        return self._file.record(self._number).instructions

    @property
    def trained_turns(self) -> int:
        """Number of turns that are not masked."""
        return self._file.record(self._number).trained_turns

    @property
    def prompt_digest(self) -> bytes:
        """The digest of the prompt."""
        return self._file.prompt_digest(self._number)
