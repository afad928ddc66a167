"""The random sample of a version, and how a version with edited answers continues it.

An edited version keeps the order of draw: an edited row takes the place of the row that it replaces. Rows that had been
drawn before the edit keep what was found then, so an edited one stays wrong: sampled rows are mended more often than
the others, and would otherwise make the version look better than it is. The reasons, and why the promise of the plan
still holds, are in docs/decisions/0082-edits-continue-the-sample.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tunewright.core.clock import now
from tunewright.data.review.acceptance import Finding, Outcome, judge, sample_order
from tunewright.data.review.reviews import ContinuedSample, DrawEvent, ReviewLog


@dataclass(frozen=True)
class Sample:
    """All rows of a version in the order in which they are checked."""

    drawn: DrawEvent
    slots: tuple[str, ...]
    """Pair keys in the version of the draw."""
    order: tuple[str, ...]
    """Pair keys in the version; one key twice if an edit made two rows one."""

    @property
    def asked(self) -> list[str]:
        """Pair keys that people judge, in order: each once, without those that stay wrong."""
        wrong = set(self.drawn.continues.wrong) if self.drawn.continues else ()
        return list(dict.fromkeys(key for slot, key in zip(self.slots, self.order, strict=True) if slot not in wrong))

    def findings(self, reviews: ReviewLog) -> Iterator[Finding]:
        """Yield the findings in order, up to the first row without one."""
        wrong = set(self.drawn.continues.wrong) if self.drawn.continues else ()
        for slot, key in zip(self.slots, self.order, strict=True):
            found = "wrong" if slot in wrong else reviews.finding(key)
            if found is None:
                return
            yield found

    def outcome(self, reviews: ReviewLog) -> Outcome:
        """Return the state of the acceptance test."""
        return judge(self.drawn.plan, self.findings(reviews), len(self.order))


def sample_of(drawn: DrawEvent, keys: Sequence[str]) -> Sample:
    """Return the sample of a version with these pair keys."""
    before = drawn.continues
    if before is None:
        order = tuple(sample_order(keys, drawn.version, drawn.draw))
        return Sample(drawn, order, order)
    edited = dict(before.edited)
    new = set(edited.values())
    slots = tuple(sample_order([*edited, *(key for key in keys if key not in new)], before.version, before.draw))
    return Sample(drawn, slots, tuple(edited.get(slot, slot) for slot in slots))


def outcome(reviews: ReviewLog, version: str, keys: Sequence[str]) -> Outcome | None:
    """Return the state of a version's acceptance test; None if no sample was drawn."""
    drawn = reviews.latest_draw(version)
    return None if drawn is None else sample_of(drawn, keys).outcome(reviews)


def continued_draw(
    reviews: ReviewLog, parent: tuple[str, Sequence[str]], version: tuple[str, Sequence[str]], edits: Mapping[str, str]
) -> DrawEvent | None:
    """Return the draw with which an edited version continues its parent's sample.

    Args:
        reviews: the log.
        parent: digest and pair keys of the version before.
        version: digest and pair keys of the edited version.
        edits: pair key before to pair key now.

    Returns:
        None if there is nothing to continue: no row of the sample was checked, it rejected the parent, the version has
        a draw of its own, or rows were added or left out.
    """
    drawn = reviews.latest_draw(parent[0])
    if drawn is None or reviews.latest_draw(version[0]) is not None:
        return None
    sample = sample_of(drawn, parent[1])
    found = sample.outcome(reviews)
    if not found.checked or found.decision == "rejected":
        return None
    before = drawn.continues or ContinuedSample(version=drawn.version, draw=drawn.draw, checked=0)
    places = {slot: edits.get(key, key) for slot, key in zip(sample.slots, sample.order, strict=True)}
    moved = {key for slot, key in places.items() if key != slot}
    checked = list(zip(sample.slots, sample.order, strict=True))[: found.checked]
    event = DrawEvent(
        draw=0,
        plan=drawn.plan,
        continues=ContinuedSample(
            version=before.version,
            draw=before.draw,
            checked=found.checked,
            edited=tuple(sorted((slot, key) for slot, key in places.items() if key in moved)),
            wrong=tuple(sorted({*before.wrong, *(slot for slot, key in checked if key in edits)})),
        ),
        version=version[0],
        reviewer=drawn.reviewer,
        when=now(),
    )
    there = sample_of(event, version[1])
    same_rows = set(there.slots) == set(sample.slots) and set(there.order) == set(version[1])
    return event if same_rows else None
