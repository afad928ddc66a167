"""The order of the training rows: batches of rows of like length, a function of seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch.utils.data import Sampler

from tunewright.training.shared_prefix.plan import common_prefix

DEEP = 64
"""Rows that share so many tokens beyond what all rows share (a document that several ask about) go together."""

_MEGABATCH = 50
"""Batches whose rows are dealt by length together; transformers' own length-grouped order takes as many."""


class LikeLengths(Sampler[int]):
    """Random batches of rows of like length, in random order.

    Rows with a deep prefix in common come to a batch a few at a time, so that it is computed once, and yet no batch
    is made of one document alone.

    transformers' own length-grouped sampler draws from the global generator, so that a run that goes on in a later
    epoch would see another order: some rows twice, others not at all.

    Args:
        rows: token ids.
        batch_size: rows of one optimizer step.
        seed: decides the order, with the epoch.
    """

    def __init__(self, rows: Sequence[Sequence[int]], batch_size: int, seed: int) -> None:
        self.lengths = [len(row) for row in rows]
        self.families = deep_families(rows)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)

        def shuffled(count: int) -> list[int]:
            order: list[int] = torch.randperm(count, generator=generator).tolist()
            return order

        together = max(1, self.batch_size // 4)
        units = []
        for family in self.families:
            order = [family[place] for place in shuffled(len(family))]
            units += [order[start : start + together] for start in range(0, len(order), together)]
        places = [row for unit in shuffled(len(units)) for row in units[unit]]
        whole = len(places) - len(places) % self.batch_size
        # At least four megabatches, so that a small set is not simply sorted.
        size = self.batch_size * max(1, min(_MEGABATCH, len(places) // (4 * self.batch_size)))
        unit_length = {row: max(self.lengths[r] for r in unit) for unit in units for row in unit}
        unit_number = {row: number for number, unit in enumerate(units) for row in unit}
        batches: list[list[int]] = []
        for start in range(0, whole, size):
            dealt = sorted(
                places[start : start + size][: whole - start], key=lambda r: (-unit_length[r], unit_number[r])
            )
            batches += [dealt[first : first + self.batch_size] for first in range(0, len(dealt), self.batch_size)]
        for batch in shuffled(len(batches)):
            yield from batches[batch]
        yield from places[whole:]


class StepBatches:
    """The micro-batches of one process: each step's rows are shared out evenly, and every row is trained on once.

    accelerate's own way of dealing batches repeats rows so that all processes have as many. Here one that has fewer
    rows of an epoch's last step gets empty batches, since all of them have to make as many passes.

    Args:
        sampler: the order of the rows, a step's rows together.
        micro_batch: rows of one forward pass.
        process, processes: which of how many this is.
    """

    def __init__(self, sampler: LikeLengths | Spread, micro_batch: int, process: int = 0, processes: int = 1) -> None:
        self.sampler = sampler
        self.micro_batch = micro_batch
        self.process = process
        self.processes = processes

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader before each epoch."""
        self.sampler.set_epoch(epoch)

    def _share(self, rows: int) -> int:
        return -(-rows // self.processes)

    def __len__(self) -> int:
        steps, rest = divmod(len(self.sampler), self.sampler.batch_size)
        return sum(
            -(-self._share(rows) // self.micro_batch) * times
            for rows, times in ((self.sampler.batch_size, steps), (rest, 1))
        )

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        for start in range(0, len(order), self.sampler.batch_size):
            step = order[start : start + self.sampler.batch_size]
            share = self._share(len(step))
            mine = step[self.process * share : (self.process + 1) * share]
            for first in range(0, share, self.micro_batch):
                yield mine[first : first + self.micro_batch]


class Spread(Sampler[int]):
    """An order with further rows dealt evenly among its own, so that each batch has its share of them.

    Sorted by length with the others, what a base writes would fill batches of its own: steps that pull the adapter to
    the base alone, between many that only pull it away.

    Args:
        order: the order of rows 0 to n - 1.
        further: how many rows follow them, in an order that the seed and the epoch decide.
    """

    def __init__(self, order: LikeLengths, further: int) -> None:
        self.order = order
        self.further = further
        self.batch_size = order.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader before each epoch."""
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.order) + self.further

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.order.seed + self.order.epoch)
        dealt = iter((len(self.order) + torch.randperm(self.further, generator=generator)).tolist())
        own = iter(self.order)
        for place in range(len(self)):
            # As many as this share of the places is due, rounded.
            due = (2 * (place + 1) * self.further + len(self)) // (2 * len(self))
            before = (2 * place * self.further + len(self)) // (2 * len(self))
            yield next(dealt) if due > before else next(own)


def deep_families(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows with a deep prefix in common, as places in ``rows``; every other row is a family of its own."""
    order = sorted(range(len(rows)), key=lambda place: list(rows[place]))
    shared_by_all = common_prefix(rows[order[0]], rows[order[-1]])
    families = [[order[0]]]
    for before, row in pairwise(order):
        if common_prefix(rows[before], rows[row]) >= shared_by_all + DEEP:
            families[-1].append(row)
        else:
            families.append([row])
    return sorted(map(sorted, families))
