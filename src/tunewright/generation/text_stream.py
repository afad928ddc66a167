"""Incremental detokenization: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_UNFINISHED = "\ufffd"  # decoders write it for bytes that are not (yet) a character


class Detokenizer:
    """Turns token ids into text piece by piece; the pieces joined are the text of all ids.

    Each piece is decoded together with the one before it, because a token's text depends on its left neighbour. For
    example, SentencePiece drops the space before a text's first word.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._before: list[int] = []
        self._after: list[int] = []

    def push(self, token: int) -> str:
        """Return the new text that this token completes: empty while a character lacks some of its bytes."""
        self._after.append(token)
        text = self._new()
        if not text or text.endswith(_UNFINISHED):
            return ""
        self._before, self._after = self._after, []
        return text

    def flush(self) -> str:
        """Return the remaining text: U+FFFD for a character that the answer's end cut off."""
        text = self._new() if self._after else ""
        self._after = []
        return text

    def _new(self) -> str:
        return self._decode(self._before + self._after)[len(self._decode(self._before)) :]


class StopFilter:
    """Passes text on up to the first complete stop string; of two that complete at once, the longer counts.

    Text that may be the beginning of a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Return the text that is certain to belong to the answer."""
        for character in text:
            self._held += character
            hits = [stop for stop in self._stops if self._held.endswith(stop)]
            if hits:
                self.stopped = True
                return self._release(len(self._held) - len(max(hits, key=len)))
        held_back = next(
            length
            for length in range(len(self._held), -1, -1)
            if length == 0 or any(stop.startswith(self._held[-length:]) for stop in self._stops)
        )
        return self._release(len(self._held) - held_back)

    def flush(self) -> str:
        """Return the text held back, once the answer has ended without a stop string."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text


class TextStream:
    """One answer's text: tokens in, text out; ``stopped`` once a stop string has ended it."""

    def __init__(self, decode: Decode, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(decode)
        self._filter = StopFilter(stops)

    @property
    def stopped(self) -> bool:
        """True if a stop string has ended the answer."""
        return self._filter.stopped

    def push(self, token: int) -> str:
        """Return the text to send after this token."""
        return self._filter.push(self._detokenizer.push(token))

    def flush(self) -> str:
        """Return the rest of the text after the last token."""
        return self._filter.push(self._detokenizer.flush()) + self._filter.flush()
