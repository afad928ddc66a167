"""Properties of the choice of replicas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunewright.serving.engines.placement import (
    SHRINK_SECONDS,
    Candidate,
    Choice,
    Placement,
    Residents,
    adapters_handed_over,
    adapters_taken_over,
    rendezvous_order,
)

NAMES = st.lists(st.integers(1, 999).map("replica-{}".format), min_size=2, max_size=8, unique=True)
DIGESTS = [f"{number:064x}" for number in range(2000)]


@given(NAMES)
@settings(max_examples=20, deadline=None)
def test_rendezvous_order_depends_on_the_set_of_names_only(names: list[str]) -> None:
    for digest in DIGESTS[:20]:
        order = rendezvous_order(digest, tuple(names))
        assert sorted(order) == sorted(names)
        assert rendezvous_order(digest, tuple(reversed(names))) == order


@given(NAMES)
@settings(max_examples=20, deadline=None)
def test_removed_replica_gives_up_only_its_own_adapters(names: list[str]) -> None:
    gone, *left = names
    for digest in DIGESTS[:200]:
        before, after = rendezvous_order(digest, tuple(names)), rendezvous_order(digest, tuple(left))
        # Its adapters go to the next one in their order; the others stay where they are.
        assert after == tuple(name for name in before if name != gone)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_added_replica_takes_an_equal_share_of_the_adapters(count: int) -> None:
    names = tuple(f"replica-{number}" for number in range(1, count + 1))
    more = (*names, f"replica-{count + 1}")
    homes = [(rendezvous_order(digest, names)[0], rendezvous_order(digest, more)[0]) for digest in DIGESTS]
    moved = [after for before, after in homes if before != after]
    assert set(moved) == {more[-1]}
    assert len(moved) == pytest.approx(len(DIGESTS) / (count + 1), rel=0.15)


def candidates(loads: Mapping[str, float], warm: Sequence[str] = (), full: Sequence[str] = ()) -> list[Candidate]:
    return [Candidate(name, load, name in warm, name not in full) for name, load in loads.items()]


ORDER = rendezvous_order(DIGESTS[0], ("a", "b", "c"))


def test_idle_replicas_leave_an_adapter_on_its_first_replica() -> None:
    placement = Placement()
    for load in (0.0, 0.3, 0.5):
        loads = dict.fromkeys(ORDER, 0.0) | {ORDER[0]: load}
        assert placement.choose(DIGESTS[0], candidates(loads, warm=ORDER[:1]), 0.0) == Choice(ORDER[0])


def test_busy_replica_is_helped_by_the_next_one_which_loads_the_adapter_first() -> None:
    placement = Placement()
    loads = dict(zip(ORDER, (0.9, 0.1, 0.1), strict=True))
    assert placement.choose(DIGESTS[0], candidates(loads, warm=ORDER[:1]), 0.0) == Choice(ORDER[0], (ORDER[1],))
    assert placement.choose(DIGESTS[0], candidates(loads, warm=ORDER[:2]), 0.0) == Choice(ORDER[1])
    # All of its adapters are in use: it is not made to wait for one of them.
    assert placement.choose(DIGESTS[0], candidates(loads, ORDER[:1], full=ORDER[1:]), 0.0) == Choice(ORDER[0])


def test_helpers_join_at_once_and_leave_one_by_one() -> None:
    placement = Placement()

    def used(loads: Sequence[float], now: float) -> set[str]:
        choice = placement.choose(DIGESTS[0], candidates(dict(zip(ORDER, loads, strict=True)), warm=ORDER[:1]), now)
        return {choice.name, *choice.warm_up}

    assert used((0.9, 0.9, 0.1), 0) == set(ORDER)
    assert used((0, 0, 0), SHRINK_SECONDS - 1) == set(ORDER)
    assert used((0, 0, 0), SHRINK_SECONDS) == set(ORDER[:2])
    assert used((0, 0, 0), 2 * SHRINK_SECONDS - 1) == set(ORDER[:2])
    assert used((0, 0, 0), 2 * SHRINK_SECONDS) == set(ORDER[:1])


def test_replica_that_has_the_adapter_answers_while_the_first_one_loads_it() -> None:
    loads = dict.fromkeys(ORDER, 0.0)
    choice = Placement().choose(DIGESTS[0], candidates(loads, warm=ORDER[2:]), 0.0)
    assert choice == Choice(ORDER[2], (ORDER[0],))


def test_request_for_the_base_goes_to_the_least_loaded_replica() -> None:
    assert Placement().choose(None, candidates({"a": 0.5, "b": 0.25, "c": 0.75}), 0.0) == Choice("b")


@given(st.lists(st.floats(0, 4), min_size=1, max_size=6), st.data())
@settings(max_examples=200, deadline=None)
def test_choice_is_always_a_candidate_and_warm_if_any_is(loads: list[float], data: st.DataObject) -> None:
    names = [f"replica-{number}" for number in range(len(loads))]
    warm = data.draw(st.sets(st.sampled_from(names)))
    seen = candidates(dict(zip(names, loads, strict=True)), sorted(warm))
    placement = Placement()
    for now in (0.0, 1.0, 100.0):
        choice = placement.choose(DIGESTS[1], seen, now)
        assert choice.name in (warm or names)
        assert not set(choice.warm_up) & {*warm, choice.name}


def test_residents_unload_the_least_recently_used_adapter() -> None:
    residents = Residents(2)
    for digest in "ab":
        residents.add(digest)
    assert residents.take("a", 1)
    residents.give_back("a", 1)
    assert residents.to_unload() == "b"
    residents.remove("b")
    assert residents.to_unload() is None


def test_adapter_in_use_leaves_only_after_its_users_and_takes_no_further_ones() -> None:
    residents = Residents(1)
    residents.add("a")
    assert residents.take("a", 1)
    assert not residents.has_room
    assert residents.to_unload() == "a"
    assert not residents.idle("a")
    assert not residents.take("a", 2), "or an adapter with requests at all times would never make room"
    assert residents.give_back("a", 1)
    assert residents.idle("a")
    residents.remove("a")
    residents.add("b")
    assert residents.waiting == 1


def test_adapter_that_was_to_leave_stays_if_another_one_leaves_instead() -> None:
    residents = Residents(2)
    for digest in "ab":
        residents.add(digest)
        residents.take(digest, digest)
    assert residents.to_unload() == "a"
    assert residents.to_unload() == "a"
    residents.give_back("b", "b")
    assert residents.to_unload() == "b"
    assert residents.warm("a")
    residents.remove("b")
    assert residents.to_unload() is None
    assert residents.take("a", 2)


def test_adapter_that_was_waited_for_is_in_use_as_soon_as_it_is_loaded() -> None:
    residents = Residents(1)
    assert not residents.take("a", 1)
    assert residents.waiting == 1
    residents.add("a")
    assert (residents.waiting, residents.idle("a"), residents.has_room) == (0, False, False)


def test_every_replica_gets_adapters() -> None:
    names = tuple(f"replica-{number}" for number in range(1, 5))
    homes = Counter(rendezvous_order(digest, names)[0] for digest in DIGESTS)
    assert min(homes.values()) > 0.85 * len(DIGESTS) / 4


def resident(digests: Sequence[str], room: int | None = None) -> Residents:
    residents = Residents(room)
    for digest in digests:
        residents.add(digest)
    return residents


def test_joining_replica_takes_over_its_own_adapters_of_those_in_memory() -> None:
    others = {"a": resident(DIGESTS[:200]), "b": resident(DIGESTS[100:300])}
    own = {digest for digest in DIGESTS[:300] if rendezvous_order(digest, ("a", "b", "c"))[0] == "c"}
    assert set(adapters_taken_over("c", others, None)) == own
    few = adapters_taken_over("c", others, 10)
    # Those that were used most recently on one of the others, and the last of all at the end.
    latest = [digest for pair in zip(DIGESTS[199::-1], DIGESTS[299:99:-1], strict=True) for digest in pair]
    assert few == list(dict.fromkeys(digest for digest in latest if digest in own))[:10][::-1]


def test_leaving_replica_hands_its_adapters_over_where_there_is_room_without_loss() -> None:
    leaving = resident(DIGESTS[:100])
    others = {"a": resident(DIGESTS[:20], room=30), "b": resident(DIGESTS[200:], room=None)}
    moves = adapters_handed_over(leaving, others)
    assert all(rendezvous_order(digest, ("a", "b"))[0] == name for name, digest in moves)
    by_name = {name: [digest for to, digest in moves if to == name] for name in others}
    at_a = [digest for digest in DIGESTS[99:19:-1] if rendezvous_order(digest, ("a", "b"))[0] == "a"]
    assert by_name["a"] == at_a[:10]
    assert len(by_name["b"]) == sum(rendezvous_order(digest, ("a", "b"))[0] == "b" for digest in DIGESTS[:100])
    assert adapters_handed_over(leaving, {}) == []
