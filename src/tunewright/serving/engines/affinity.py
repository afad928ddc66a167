"""The choice of an engine for a request: one that has its adapter, the same one each time.

*Affinity.* An adapter's engines are tried in its rendezvous order (Thaler and Ravishankar 1998, "Using name-based
mappings to increase hit rates", IEEE/ACM Transactions on Networking 6:1): each address is scored by a hash of it and
the adapter's digest. So the prefixes of a tenant's prompts are cached on one engine and not on all, and a new engine
takes over 1/N of the adapters.

*Load.* An engine is passed over while over half of its rows are in use and it has 1.25 times the mean load, as in
consistent hashing with bounded loads (Mirrokni et al. 2018, SODA, arXiv 1608.01350).
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from tunewright.serving.engines.remote import RemoteEngine

FREE = 0.5
"""An engine with at most this share of its rows in use is never passed over."""
BALANCE = 1.25
"""Above that, an engine with this many times the mean load is passed over."""


def choose(adapter: str | None, engines: Sequence[RemoteEngine]) -> RemoteEngine:
    """Return the engine for a request: the adapter's first one that is not busy, or for the base the least loaded.

    Args:
        engines: at least one, each with the adapter.
    """
    loads = {engine.url: engine.running / max(1, engine.rows) for engine in engines}
    if adapter is None:
        return min(engines, key=lambda engine: loads[engine.url])
    busy_above = max(FREE, BALANCE * sum(loads.values()) / len(loads))
    order = sorted(engines, key=lambda engine: _weight(adapter, engine.url), reverse=True)
    # The least loaded engine is at most at the mean, so one is found.
    return next(engine for engine in order if loads[engine.url] <= busy_above)


def _weight(digest: str, url: str) -> bytes:
    return hashlib.blake2b(f"{digest}\0{url}".encode(), digest_size=16).digest()


def resolved(url: str) -> list[str]:
    """Return an address for each IP address of the name in ``url``, none if it cannot be resolved.

    With TLS the name stays, for its certificate. A name with addresses of both families is one engine for each of the
    first family's.
    """
    parts = urlsplit(url)
    if parts.scheme == "https":
        return [url]
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except OSError:
        return []
    family = min(entry[0] for entry in found)
    found = [entry for entry in found if entry[0] == family]
    hosts = dict.fromkeys(f"[{entry[4][0]}]" if entry[0] == socket.AF_INET6 else str(entry[4][0]) for entry in found)
    return [f"http://{host}:{parts.port or 80}" for host in hosts]
