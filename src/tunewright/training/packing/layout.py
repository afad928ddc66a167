"""Layout of a packed row: the position of each token, and the tokens that it attends to.

A packed row is a sequence of groups. A group is its prefix and then its rows' suffixes, grouped by
similar length in *blocks*::

    |prefix|  a a a a  b b b b  |  c c c c c c c c  d d d d d d d .  |prefix|  e e e  ...
               block               block (padded in attention only)

Attention computes a block as rows of equal length, so similar lengths keep its padding small.
Everything that works token by token has no padding at all.
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
    """Consecutive tokens of one row that are adjacent in the packed row."""

    row: int
    """The row's index in the batch; for a prefix, any of the rows that share it."""
    first: int
    """Index of the first token in its row."""
    length: int
    start: int
    """Index of the first token in the packed row."""

    @property
    def tokens(self) -> int:
        """The number of tokens, named as in `Block`."""
        return self.length


@dataclass(frozen=True)
class Block:
    """Suffixes of similar length that follow the same prefix (of length 0 if they share none)."""

    prefix: Piece
    suffixes: tuple[Piece, ...]
    pad_index: Tensor | None
    """For a padded block: the block's token for each place of [rows, longest], flat; padding repeats a token."""
    valid_index: Tensor | None
    """For a padded block: the place in [rows, longest], flat, of each token of the block [tokens]."""

    @property
    def start(self) -> int:
        """The block's first index in the packed row."""
        return self.suffixes[0].start

    @cached_property
    def tokens(self) -> int:
        """The number of tokens of all suffixes."""
        return sum(piece.length for piece in self.suffixes)

    @cached_property
    def longest(self) -> int:
        """The tokens of the longest suffix."""
        return max(piece.length for piece in self.suffixes)


@dataclass(frozen=True)
class Sequences:
    """The same attention for variable-length kernels: query sequence i attends to key sequence i.

    Query sequences are in the packed row's order, one for each prefix and each suffix. The last query of a
    sequence sees all keys, the query before it sees all but the last, and so on: causal, aligned at the ends.
    """

    cu_seqlens_q: Tensor
    """Cumulative query lengths, starting with 0: int32 [N + 1], as FlashAttention takes them."""
    cu_seqlens_k: Tensor
    """Cumulative key lengths."""
    max_seqlen_q: int
    max_seqlen_k: int
    key_indices: Tensor | None
    """Index in the packed row of each key [sum of keys]; None: the keys are the packed row's, in its order."""

    @property
    def count(self) -> int:
        """The number of sequences."""
        return len(self.cu_seqlens_q) - 1


@dataclass(frozen=True)
class Layout:
    """A packed row's prefixes and blocks, in their order."""

    prefixes: tuple[Piece, ...]
    """One prefix per group; its length is 0 if the group's rows share nothing."""
    blocks: tuple[Block, ...]
    sequences: Sequences

    @property
    def pieces(self) -> list[Piece]:
        """All pieces in the packed row's order."""
        return [piece for piece, _ in _sequences(self.prefixes, self.blocks)]

    @cached_property
    def parts(self) -> list[Piece | Block]:
        """Prefixes and blocks in the packed row's order, without empty ones."""
        parts: list[Piece | Block] = [*(prefix for prefix in self.prefixes if prefix.length), *self.blocks]
        return sorted(parts, key=lambda part: part.start)

    def places(self, row: int) -> Callable[[int], int]:
        """Return a function from a token's index in this row to its index in the packed row."""
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
        """Return the same layout with its indices in pinned memory, from which copies to a GPU do not block."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Layout:
        def changed(index: Tensor | None) -> Tensor | None:
            return None if index is None else change(index)

        blocks = tuple(
            replace(block, pad_index=changed(block.pad_index), valid_index=changed(block.valid_index))
            for block in self.blocks
        )
        sequences = replace(
            self.sequences,
            cu_seqlens_q=change(self.sequences.cu_seqlens_q),
            cu_seqlens_k=change(self.sequences.cu_seqlens_k),
            key_indices=changed(self.sequences.key_indices),
        )
        return replace(self, blocks=blocks, sequences=sequences)


def lay_out(groups: Sequence[tuple[int, Sequence[tuple[int, int]]]]) -> Layout:
    """Lay out groups, each a prefix's length and its rows as (index in the batch, tokens of the suffix)."""
    prefixes: list[Piece] = []
    blocks: list[Block] = []
    start = 0
    for length, rows in groups:
        prefix = Piece(rows[0][0], 0, length, start)
        prefixes.append(prefix)
        start += length
        # Suffixes of one block are adjacent, so a block is a slice of the packed row and needs no gather.
        for like in _alike(rows):
            suffixes = []
            for row, tokens in like:
                suffixes.append(Piece(row, length, tokens, start))
                start += tokens
            blocks.append(Block(prefix, tuple(suffixes), *_padding([tokens for _, tokens in like])))
    return Layout(tuple(prefixes), tuple(blocks), _ragged(_sequences(prefixes, blocks)))


def _sequences(prefixes: Iterable[Piece], blocks: Iterable[Block]) -> list[tuple[Piece, Piece | None]]:
    """Return every piece in the packed row's order, with the prefix that it attends to."""
    pairs: list[tuple[Piece, Piece | None]] = [(prefix, None) for prefix in prefixes if prefix.length]
    for block in blocks:
        before = block.prefix if block.prefix.length else None
        pairs += [(suffix, before) for suffix in block.suffixes]
    return sorted(pairs, key=lambda pair: pair[0].start)


def _ragged(pairs: Sequence[tuple[Piece, Piece | None]]) -> Sequences:
    queries = [piece.length for piece, _ in pairs]
    keys = [piece.length + (before.length if before else 0) for piece, before in pairs]
    # Without a prefix, keys are the packed row itself: no copy of keys and values.
    places = None
    if any(before for _, before in pairs):
        seen = [each for piece, before in pairs for each in ((before, piece) if before else (piece,))]
        places = torch.cat([torch.arange(each.start, each.start + each.length) for each in seen])
    cu_seqlens_q, cu_seqlens_k = (
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32) for lengths in (queries, keys)
    )
    return Sequences(cu_seqlens_q, cu_seqlens_k, max(queries), max(keys), places)


def _alike(rows: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Group rows of similar length, the longest first."""
    blocks: list[list[tuple[int, int]]] = []
    for row, tokens in sorted(rows, key=lambda each: -each[1]):
        # Sorted by length: the first row of a block is its longest, so one comparison bounds the padding of all.
        if blocks and tokens >= blocks[-1][0][1] * (1 - _MOST_PADDING):
            blocks[-1].append((row, tokens))
        else:
            blocks.append([(row, tokens)])
    return blocks


def _padding(lengths: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
    longest = max(lengths)
    if min(lengths) == longest:
        return None, None
    column = torch.arange(longest)  # [longest]
    length = torch.tensor(lengths)[:, None]  # [rows, 1]
    # Flat index of each row's first token within the block.
    begins = torch.tensor([0, *lengths[:-1]]).cumsum(0)[:, None]  # [rows, 1]
    inside = column < length  # [rows, longest]
    pad_index = begins + torch.where(inside, column, 0)  # padding repeats its row's first token
    return pad_index.flatten(), inside.flatten().nonzero().flatten()
