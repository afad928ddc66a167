"""The choice of a replica for each request, without engines or clocks: `Replicas` and a simulation both use it.

*Affinity.* An adapter's replicas are the first ones in its rendezvous order (Thaler and Ravishankar 1998,
"Using name-based mappings to increase hit rates", IEEE/ACM Transactions on Networking 6:1). Each replica is scored by a
hash of the adapter's digest and its own name. So a replica that joins takes over 1/N of the adapters, and one that
leaves gives up only its own.

*Load.* One replica answers an adapter's requests until it is busy, then the next one in the order helps. A replica is
busy above half of its rows if it also has 1.25 times the mean load, as in consistent hashing with bounded loads
(Mirrokni et al. 2018, SODA, arXiv 1608.01350). Helpers join at once and leave one by one.

*Warm-up.* A replica that has the adapter in memory is preferred to one that has not, which loads it meanwhile. Only if
no replica has it does a request wait for the load.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, zip_longest
from math import inf
from operator import attrgetter

FREE = 0.5
"""A replica with at most this share of its rows in use is never busy."""
BALANCE = 1.25
"""Above that, a replica with this many times the mean load is busy."""
SHRINK_SECONDS = 60.0
"""An adapter gives one replica up after this many seconds in which fewer would have done."""


@dataclass(frozen=True)
class Candidate:
    """A replica that answers requests now.

    Args:
        name: its stable name, which the rendezvous order depends on.
        load: requests that run or wait there, for each of its rows.
        warm: whether it has the adapter in memory.
        room: whether it could load the adapter now, without waiting for another one's requests.
    """

    name: str
    load: float
    warm: bool = False
    room: bool = True


_load = attrgetter("load")
"""Order of replicas; of equal ones the first is the least."""


@dataclass(frozen=True)
class Choice:
    """The replica that answers a request, and those that load its adapter for later ones."""

    name: str
    warm_up: tuple[str, ...] = ()


@lru_cache(maxsize=1 << 16)
def rendezvous_order(digest: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the replicas in an adapter's order of preference."""
    return tuple(sorted(names, key=lambda name: _weight(digest, name), reverse=True))


def _weight(digest: str, name: str) -> bytes:
    return hashlib.blake2b(f"{digest}\0{name}".encode(), digest_size=16).digest()


class Placement:
    """Chooses a replica for each request, and remembers how many of them each adapter uses."""

    def __init__(self) -> None:
        self._widths: dict[str, tuple[int, float]] = {}
        """Of the adapters with several replicas: their number, and the time since when fewer would do."""

    def choose(self, digest: str | None, candidates: Sequence[Candidate], now: float) -> Choice:
        """Return the replica for a request.

        Args:
            digest: the adapter; None: the base, which every replica has.
            candidates: at least one.
            now: seconds that never go back.
        """
        if digest is None:
            return Choice(min(candidates, key=_load).name)
        by_name = {candidate.name: candidate for candidate in candidates}
        order = [by_name[name] for name in rendezvous_order(digest, tuple(sorted(by_name)))]
        chosen = order[: self._width(digest, order, now)]
        warm = [each for each in chosen if each.warm] or [each for each in order if each.warm]
        if not warm:
            return Choice(min(chosen, key=_load).name)
        return Choice(min(warm, key=_load).name, tuple(each.name for each in chosen if not each.warm and each.room))

    def forget(self, digest: str) -> None:
        """Drop what is remembered of an adapter that is not served any more."""
        self._widths.pop(digest, None)

    def _width(self, digest: str, order: Sequence[Candidate], now: float) -> int:
        """Return the number of replicas that the adapter uses from now on."""
        busy_above = max(FREE, BALANCE * sum(each.load for each in order) / len(order))
        # The least loaded one is below the mean, and so never busy.
        needed = next(place for place, each in enumerate(order, 1) if each.load <= busy_above)
        width, since = self._widths.get(digest, (1, now))
        if needed >= width:
            width, since = needed, now
        elif now - since >= SHRINK_SECONDS:
            width, since = width - 1, now
        if width > 1:
            self._widths[digest] = (width, since)
        else:
            self._widths.pop(digest, None)
        return min(width, len(order))


class Residents:
    """The adapters in one replica's memory: which are in use, and which is unloaded next.

    Each user is a request. It is noted before its adapter is loaded, so that the adapter is not unloaded again before
    the request has begun.

    Args:
        room: maximum number of adapters; None: no limit.
    """

    def __init__(self, room: int | None) -> None:
        assert room is None or room >= 1
        self._room = room
        self._users: dict[str, set[Hashable]] = {}
        """Users of each loaded adapter, the least recently used adapter first."""
        self._waiting: dict[str, set[Hashable]] = {}
        self._leaving: str | None = None

    def __len__(self) -> int:
        return len(self._users)

    @property
    def loaded(self) -> tuple[str, ...]:
        """The loaded adapters, the least recently used one first."""
        return tuple(self._users)

    @property
    def waiting(self) -> int:
        """The number of users whose adapter is not loaded yet."""
        return sum(map(len, self._waiting.values()))

    @property
    def has_room(self) -> bool:
        """True if an adapter could be loaded now: there is room, or an adapter without users to unload."""
        return self.free > 0 or any(not users for users in self._users.values())

    @property
    def free(self) -> float:
        """The number of adapters that could be loaded without unloading one."""
        return inf if self._room is None else self._room - len(self._users)

    def warm(self, digest: str) -> bool:
        """Return whether an adapter is loaded and stays so."""
        return digest in self._users and digest != self._leaving

    def take(self, digest: str, user: Hashable) -> bool:
        """Note a user; return whether the adapter is loaded, so that the user need not wait."""
        if not self.warm(digest):
            self._waiting.setdefault(digest, set()).add(user)
            return False
        self._users[digest] = self._users.pop(digest) | {user}
        return True

    def give_back(self, digest: str, user: Hashable) -> bool:
        """Undo :meth:`take`; return whether this makes room for an adapter that waits for it."""
        for users in (self._waiting, self._users):
            users.get(digest, set()).discard(user)
        if not self._waiting.get(digest, True):
            del self._waiting[digest]
        return digest == self._leaving and not self._users[digest]

    def to_unload(self) -> str | None:
        """Return the adapter to unload before another one can be loaded; None: there is room.

        It is the least recently used one without users. If all have users, it is the least recently used one: it takes
        no further users, and is to be unloaded once :meth:`idle`.
        """
        if self.free > 0:
            self._leaving = None
        else:
            idle = next((digest for digest, users in self._users.items() if not users), None)
            self._leaving = idle or self._leaving or next(iter(self._users))
        return self._leaving

    def idle(self, digest: str) -> bool:
        """Return whether an adapter has no users."""
        return not self._users.get(digest)

    def add(self, digest: str) -> None:
        """Note that an adapter is loaded; those that waited for it are its users now."""
        self._users[digest] = self._users.pop(digest, set()) | self._waiting.pop(digest, set())

    def remove(self, digest: str) -> None:
        """Note that an adapter is not loaded any more."""
        self._users.pop(digest, None)
        if digest == self._leaving:
            self._leaving = None


def adapters_taken_over(name: str, others: Mapping[str, Residents], room: int | None) -> list[str]:
    """Return the adapters in memory whose first replica will be one that joins, the most recently used one last.

    Args:
        name: the replica that joins.
        others: the adapters of the others, by their names.
        room: maximum number of adapters.
    """
    names = tuple(sorted({name, *others}))
    recent = chain.from_iterable(zip_longest(*(reversed(residents.loaded) for residents in others.values())))
    own = dict.fromkeys(digest for digest in recent if digest and rendezvous_order(digest, names)[0] == name)
    return list(own)[:room][::-1]


def adapters_handed_over(leaving: Residents, others: Mapping[str, Residents]) -> list[tuple[str, str]]:
    """Return the replica that has to load each adapter of one that leaves: its next one, if that has room without loss.

    Args:
        others: the adapters of the others, by their names.
    """
    if not others:
        return []
    names = tuple(sorted(others))
    moves: list[tuple[str, str]] = []
    planned: Counter[str] = Counter()
    for digest in reversed(leaving.loaded):
        name = rendezvous_order(digest, names)[0]
        if not others[name].warm(digest) and planned[name] < others[name].free:
            planned[name] += 1
            moves.append((name, digest))
    return moves
