"""The head of a Ray cluster: whether it still answers.

Without a head, Ray ends the process: at once and without a message if it then touches objects of a lost machine,
otherwise after a minute.
"""

from __future__ import annotations

import socket
import time

import ray

from tunewright.core.errors import UserError

_WHERE = "compute.cluster"
AGAIN = "Start the cluster again, and run the same command again."
_REACH_S = 10.0

_TRIES = 3


def is_client() -> bool:
    """Return whether this process is connected by Ray's client, whose connection ends with the head."""
    connected: bool = ray.util.client.ray.is_connected()
    return connected


def require_head() -> None:
    """Check that the head answers, before Ray is asked for anything.

    Raises:
        UserError: nobody answers at its address.
    """
    for attempt in range(_TRIES):
        if has_head():
            return
        if attempt < _TRIES - 1:
            time.sleep(1)
    head = ray.get_runtime_context().gcs_address
    raise UserError(f"The head of the cluster is lost: {head} does not answer", where=_WHERE, fix=AGAIN)


def has_head() -> bool:
    """Return whether the head answers; for Ray's client, whose connection reports it, always true."""
    if is_client():
        return True
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _REACH_S).close()
    except OSError:
        return False
    return True
