"""A shared prompt is computed once: rows of a batch as one packed row of prefixes and suffixes.

Rows of a domain begin alike, with the same instruction and often the same context::

    row 0   S S S S S a a a|A A            S  the shared prefix     a, b, c  the rest of each prompt
    row 1   S S S S S b b|B B B            A, B, C  the answers, which alone are trained
    row 2   S S S S S c c c c|C

are computed as one row without padding, in which the prefix stands once::

    packed     S S S S S | a a a A A | b b B B B | c c c c C
    position   0 1 2 3 4   5 6 7 8 9   5 6 7 8 9   5 6 7 8 9

Each suffix attends to the prefix and to itself, and its positions go on from the prefix, so every token has the
numbers that it has in a row of its own: loss and gradients are those of the rows one by one (see
tests/training/test_packing.py), since the gradients of all suffixes add up in the prefix by the chain rule.
Everything but attention works token by token and does not notice.

`plan` decides which rows share which prefix, `pack` lays them out, `attention` attends by that layout.
"""

from tunewright.training.packing.pack import PackedBatch, pack
from tunewright.training.packing.plan import Group, plan_groups

__all__ = ["Group", "PackedBatch", "pack", "plan_groups"]
