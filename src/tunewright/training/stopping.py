"""Ctrl-C and SIGTERM that let the step under way finish and be saved, and pauses after a step that was named."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether someone has asked the run to stop, and the step after which it is to pause anyway."""

    def __init__(self, pause_after: int | None = None) -> None:
        self.asked = False
        self.pause_after = pause_after

    def after(self, step: int) -> bool:
        """Whether this step is the last one for now."""
        return self.asked or step == self.pause_after


@contextmanager
def stop_on_signal(pause_after: int | None = None) -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; a second one interrupts at once.

    Outside the main thread signals belong to someone else, and the request is never made.
    """
    request = StopRequest(pause_after)

    def ask(_number: int, _frame: FrameType | None) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.asked = True

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
