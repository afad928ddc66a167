"""Which prompts share a prefix that is worth computing once.

Rows of one task begin alike: zero-shot prompts share the instruction, static few-shot prompts the demonstrations too.
Sorted prompts and the lengths of their common beginnings form a tree; each node is a beginning and the prompts that
have it. For every node there is a choice: its own beginning for all of them, or longer ones for parts of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

PASS_TOKENS = 64
"""One more pass over the weights costs about as much as this many more tokens in a pass that is made anyway."""

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Shared:
    """Prompts with a common beginning."""

    places: tuple[int, ...]
    """Where they stand among all prompts."""
    length: int
    """Tokens that they have in common; each prompt is longer than that."""


@dataclass
class _Node:
    """A beginning of ``depth`` tokens that the sorted prompts ``first`` to ``last`` have in common."""

    depth: int
    first: int
    last: int
    saved: int = 0
    """Tokens that the choices below save."""
    chosen: list[tuple[int, int, int]] = field(default_factory=list)
    """First, last and depth of each beginning that was chosen below."""

    def take(self, child: _Node) -> None:
        self.last = child.last
        self.saved += child.saved
        self.chosen += child.chosen

    def decided(self, pass_tokens: int) -> _Node:
        own = self.depth * (self.last - self.first) - pass_tokens
        if own > self.saved:
            self.saved, self.chosen = own, [(self.first, self.last, self.depth)]
        return self


def shared_prefixes(prompts: Sequence[Prompt], pass_tokens: int = PASS_TOKENS) -> list[Shared]:
    """Return the beginnings that save the most tokens when each is computed once for all prompts that go on from it.

    A beginning of n tokens saves n for every prompt but one, and costs a pass. Prompts that are in no
    group are computed whole.

    Args:
        prompts: token ids; equal ones share all but their last token.
        pass_tokens: what a pass costs, in tokens.
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
    return [Shared(tuple(order[first : last + 1]), depth) for first, last, depth in node.chosen]


def _common(one: Prompt, other: Prompt) -> int:
    """Tokens at the beginning of both, less the last token of either: every row has something of its own to run."""
    longest = min(len(one), len(other)) - 1
    return next((place for place in range(longest) if one[place] != other[place]), longest)
