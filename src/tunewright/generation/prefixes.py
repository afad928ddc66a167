"""The choice of prompt prefixes that are worth computing once.

Prompts of one task begin alike: zero-shot prompts share the instruction, static few-shot prompts the demonstrations
too. Sorted prompts and the lengths of their common prefixes form a tree. Each node is a prefix and the prompts that
have it. Every node is a choice: its own prefix for all of them, or longer prefixes for some of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

PASS_TOKENS = 64
"""Cost of one more pass over the weights, in tokens of a pass that is made anyway."""

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class SharedPrefix:
    """Prompts with a common prefix."""

    indices: tuple[int, ...]
    """Into all prompts."""
    length: int
    """Tokens of the prefix; each prompt is longer."""


@dataclass
class _Node:
    """A prefix of ``depth`` tokens that the sorted prompts ``first`` to ``last`` share."""

    depth: int
    first: int
    last: int
    saved: int = 0
    """Tokens that the choices below save."""
    chosen: list[tuple[int, int, int]] = field(default_factory=list)
    """First, last and depth of each prefix that was chosen below."""

    def take(self, child: _Node) -> None:
        self.last = child.last
        self.saved += child.saved
        self.chosen += child.chosen

    def decided(self, pass_tokens: int) -> _Node:
        own = self.depth * (self.last - self.first) - pass_tokens
        if own > self.saved:
            self.saved, self.chosen = own, [(self.first, self.last, self.depth)]
        return self


def shared_prefixes(prompts: Sequence[Prompt], pass_tokens: int = PASS_TOKENS) -> list[SharedPrefix]:
    """Return the prefixes that save the most tokens when each is computed once for all prompts that continue it.

    A prefix of n tokens saves n for every prompt but one, and costs a pass. Prompts in no group are computed whole.

    Args:
        prompts: token ids; equal prompts share all but their last token.
        pass_tokens: cost of a pass in tokens.
    """
    order = sorted(range(len(prompts)), key=lambda place: prompts[place])
    if not order:
        return []
    open_nodes: list[_Node] = []
    node = _Node(0, 0, 0)  # the first prompt alone
    for place in range(1, len(order)):
        depth = _common(prompts[order[place - 1]], prompts[order[place]])
        while open_nodes and open_nodes[-1].depth > depth:
            open_nodes[-1].take(node)
            node = open_nodes.pop().decided(pass_tokens)
        if not open_nodes or open_nodes[-1].depth < depth:
            open_nodes.append(_Node(depth, node.first, node.last))
        open_nodes[-1].take(node)
        node = _Node(0, place, place)
    while open_nodes:
        open_nodes[-1].take(node)
        node = open_nodes.pop().decided(pass_tokens)
    return [SharedPrefix(tuple(order[first : last + 1]), depth) for first, last, depth in node.chosen]


def _common(one: Prompt, other: Prompt) -> int:
    """Return the length of the common prefix, less the last token of either: every row computes at least one token."""
    longest = min(len(one), len(other)) - 1
    return next((place for place in range(longest) if one[place] != other[place]), longest)
