"""Packing with shared prefixes: rows of a batch as one packed row in which a shared prompt is computed once.

Rows of a domain start alike, with the same instruction and often the same context::

    row 0   S S S S S a a a|A A            S  the shared prefix     a, b, c  the rest of each prompt
    row 1   S S S S S b b|B B B            A, B, C  the answers, which alone are trained
    row 2   S S S S S c c c c|C

They are computed as one row without padding, in which the prefix appears once::

    packed     S S S S S | a a a A A | b b B B B | c c c c C
    position   0 1 2 3 4   5 6 7 8 9   5 6 7 8 9   5 6 7 8 9

Each suffix attends to the prefix and to itself, and its positions continue the prefix's. So every
token has the same activations as in its own row, and by the chain rule the gradients of all
suffixes add up in the prefix: loss and gradients are the same as for separate rows
(tests/training/test_packing.py). Everything but attention works token by token and needs no change.

`plan` decides which rows share which prefix, `pack` lays them out, and `attention` attends by that layout.
"""

from tunewright.training.packing.pack import Group, PackedBatch, pack, plan_groups

__all__ = ["Group", "PackedBatch", "pack", "plan_groups"]
