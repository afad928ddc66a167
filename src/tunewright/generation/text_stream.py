"""Incremental detokenization: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_UNFINISHED = "\ufffd"  # decoders write it for bytes that are not (yet) a character
_MOST_HELD = 16  # tokens: with at least a byte each, far more than a character's four


class Detokenizer:
    """Turns token ids into text piece by piece; the pieces joined are the text of all ids.

    Each piece is decoded together with the piece before it, because a token's text depends on its
    left neighbour. For example, SentencePiece drops the space before a text's first word.
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
            return self._certain() if len(self._after) > _MOST_HELD else ""
        self._before, self._after = self._after, []
        return text

    def _certain(self) -> str:
        """Return the text of the held tokens that later tokens cannot change.

        A model may repeat U+FFFD or invalid bytes. Decoding all of them at each token would take quadratic time.
        """
        text, held = self._new(), self._after
        cuts = []
        # The last three tokens may be an unfinished character, and one of five cuts is between two characters.
        for last in range(3, 8):
            self._after = held[:-last]
            if (certain := self._new()) and text.startswith(certain):
                cuts.append((len(certain) / len(self._after), last, certain))
        self._after = held
        if not cuts:
            return ""
        # Within a character, SentencePiece's decoders write U+FFFD for each byte: more text than between two.
        _, last, certain = min(cuts)
        self._before, self._after = held[:-last], held[-last:]
        return certain

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
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.stop: str | None = None
        """The stop string that has ended the text."""

    @property
    def stopped(self) -> bool:
        """True if a stop string has ended the text."""
        return self.stop is not None

    def push(self, text: str) -> str:
        """Return the text that is certain to belong to the answer."""
        before = len(self._held)
        self._held += text
        for end in range(before + 1, len(self._held) + 1):
            hits = [stop for stop in self._stops if self._held.endswith(stop, 0, end)]
            if hits:
                self.stop = max(hits, key=len)
                self._held = self._held[:end]
                return self._release(end - len(self.stop))
        held_back = next(
            length
            for length in range(min(len(self._held), self._longest), -1, -1)
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
        self.decoded = 0
        """Characters decoded so far, with those held back."""

    @property
    def stopped(self) -> bool:
        """True if a stop string has ended the answer."""
        return self._filter.stopped

    @property
    def stop(self) -> str | None:
        """The stop string that has ended the answer."""
        return self._filter.stop

    def push(self, token: int) -> str:
        """Return the text to send after this token."""
        text = self._detokenizer.push(token)
        self.decoded += len(text)
        return self._filter.push(text)

    def flush(self) -> str:
        """Return the rest of the text after the last token."""
        return self._filter.push(self._detokenizer.flush()) + self._filter.flush()
