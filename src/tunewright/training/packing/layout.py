"""Where each token of a packed row stands, and which tokens it attends to.

A packed row is a sequence of groups; a group is its prefix and then its rows' suffixes, those of like length beside
each other in *blocks*::

    |prefix|  a a a a  b b b b  |  c c c c c c c c  d d d d d d d .  |prefix|  e e e  ...
               block               block (padded in attention only)

Attention computes a block as rows of equal length, so like lengths keep its padding small; all that goes token by
token has no padding at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

_MOST_PADDING = 0.25
"""A block's shortest row is at most this share shorter than its longest."""


@dataclass(frozen=True)
class Piece:
    """Tokens of one row that stand together in the packed row."""

    row: int
    """The row's place in the batch; of a prefix, any of the rows that share it."""
    first: int
    """Which of the row's tokens comes first."""
    length: int
    start: int
    """Where the first stands in the packed row."""

    @property
    def tokens(self) -> int:
        """Its length, by the name that a block has for it."""
        return self.length


@dataclass(frozen=True)
class Block:
    """Suffixes of like length that follow the same prefix (of length 0 where there is none)."""

    prefix: Piece
    suffixes: tuple[Piece, ...]
    pick: Tensor | None
    """Of a padded block: where in the block each token of [rows, longest] comes from, flat; padding repeats one."""
    valid: Tensor | None
    """Of a padded block: where in [rows, longest], flat, each token of the block is [tokens]."""

    @property
    def start(self) -> int:
        """Where the block begins in the packed row."""
        return self.suffixes[0].start

    @cached_property
    def tokens(self) -> int:
        """How many tokens the suffixes have together."""
        return sum(piece.length for piece in self.suffixes)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest suffix."""
        return max(piece.length for piece in self.suffixes)


@dataclass(frozen=True)
class Sequences:
    """The same attention for kernels that take ragged batches: query sequence i sees the keys of key sequence i.

    Query sequences stand in the packed row's order, one for each prefix and each suffix. The last query of one sees all
    keys, the one before all but the last, and so on: causal, aligned at the ends.
    """

    ends_q: Tensor
    """Where query sequences begin, and where the last one ends: int32 [N + 1]."""
    ends_k: Tensor
    """The same of key sequences."""
    longest_q: int
    longest_k: int
    key_places: Tensor | None
    """Where in the packed row each key comes from [sum of keys]; None: keys are the packed row's, in its order."""

    @property
    def count(self) -> int:
        """How many sequences there are."""
        return len(self.ends_q) - 1


@dataclass(frozen=True)
class Layout:
    """A packed row's prefixes and blocks, in their order."""

    prefixes: tuple[Piece, ...]
    """One for each group; of length 0 where its rows share nothing."""
    blocks: tuple[Block, ...]
    sequences: Sequences

    @property
    def pieces(self) -> list[Piece]:
        """All pieces in the order in which they stand."""
        return [piece for piece, _ in _sequences(self.prefixes, self.blocks)]

    @cached_property
    def parts(self) -> list[Piece | Block]:
        """Prefixes and blocks in the order in which they stand; those without a token are left out."""
        parts: list[Piece | Block] = [*(prefix for prefix in self.prefixes if prefix.length), *self.blocks]
        return sorted(parts, key=lambda part: part.start)

    def places(self, row: int) -> Callable[[int], int]:
        """Where in the packed row each token of a row stands."""
        block, suffix = self._rows[row]
        prefix = block.prefix

        def place(token: int) -> int:
            piece = prefix if token < prefix.length else suffix
            return piece.start + token - piece.first

        return place

    @cached_property
    def _rows(self) -> dict[int, tuple[Block, Piece]]:
        return {piece.row: (block, piece) for block in self.blocks for piece in block.suffixes}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Layout:
        """Return the same layout with its indices on ``device``."""
        return self._each(lambda index: index.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Layout:
        """Return the same layout with its indices in pinned memory, from which copies to a card do not block."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Layout:
        def changed(index: Tensor | None) -> Tensor | None:
            return None if index is None else change(index)

        blocks = tuple(replace(block, pick=changed(block.pick), valid=changed(block.valid)) for block in self.blocks)
        sequences = replace(
            self.sequences,
            ends_q=change(self.sequences.ends_q),
            ends_k=change(self.sequences.ends_k),
            key_places=changed(self.sequences.key_places),
        )
        return replace(self, blocks=blocks, sequences=sequences)


def lay_out(groups: Sequence[tuple[int, Sequence[tuple[int, int]]]]) -> Layout:
    """Lay out groups: each a prefix's length and its rows as (place in the batch, tokens of the suffix)."""
    prefixes: list[Piece] = []
    blocks: list[Block] = []
    start = 0
    for length, rows in groups:
        prefix = Piece(rows[0][0], 0, length, start)
        prefixes.append(prefix)
        start += length
        for like in _alike(rows):
            suffixes = []
            for row, tokens in like:
                suffixes.append(Piece(row, length, tokens, start))
                start += tokens
            blocks.append(Block(prefix, tuple(suffixes), *_padding([tokens for _, tokens in like])))
    return Layout(tuple(prefixes), tuple(blocks), _ragged(_sequences(prefixes, blocks)))


def _sequences(prefixes: Iterable[Piece], blocks: Iterable[Block]) -> list[tuple[Piece, Piece | None]]:
    """Return every piece in the packed row's order, with the prefix that it sees before itself."""
    pairs: list[tuple[Piece, Piece | None]] = [(prefix, None) for prefix in prefixes if prefix.length]
    for block in blocks:
        before = block.prefix if block.prefix.length else None
        pairs += [(suffix, before) for suffix in block.suffixes]
    return sorted(pairs, key=lambda pair: pair[0].start)


def _ragged(pairs: Sequence[tuple[Piece, Piece | None]]) -> Sequences:
    queries = [piece.length for piece, _ in pairs]
    keys = [piece.length + (before.length if before else 0) for piece, before in pairs]
    places = None
    if any(before for _, before in pairs):
        seen = [each for piece, before in pairs for each in ((before, piece) if before else (piece,))]
        places = torch.cat([torch.arange(each.start, each.start + each.length) for each in seen])
    ends_q, ends_k = (torch.tensor([0, *accumulate(lengths)], dtype=torch.int32) for lengths in (queries, keys))
    return Sequences(ends_q, ends_k, max(queries), max(keys), places)


def _alike(rows: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Rows of like length together, the longest first."""
    blocks: list[list[tuple[int, int]]] = []
    for row, tokens in sorted(rows, key=lambda each: -each[1]):
        if blocks and tokens >= blocks[-1][0][1] * (1 - _MOST_PADDING):
            blocks[-1].append((row, tokens))
        else:
            blocks.append([(row, tokens)])
    return blocks


def _padding(lengths: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
    longest = max(lengths)
    if min(lengths) == longest:
        return None, None
    column = torch.arange(longest)
    length = torch.tensor(lengths)[:, None]
    begins = torch.tensor([0, *lengths[:-1]]).cumsum(0)[:, None]
    inside = column < length
    pick = begins + torch.where(inside, column, 0)
    return pick.flatten(), inside.flatten().nonzero().flatten()
