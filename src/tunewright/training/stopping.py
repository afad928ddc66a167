"""Ctrl-C and SIGTERM that let the step under way finish and be saved, and pauses after a step that was named."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tunewright.training.processes import any_of


class StopRequest:
    """Whether someone has asked the run to stop, and the step after which it is to pause anyway."""

    def __init__(self, pause_after: int | None = None) -> None:
        self.asked = False
        self.pause_after = pause_after

    def after(self, step: int) -> bool:
        """Whether this step is the last one for now; all processes of the run ask after the same steps."""
        return self.agreed() or step == self.pause_after

    def agreed(self) -> bool:
        """Whether any process of the run has been asked; all of them have to call this at the same places."""
        self.asked = any_of(self.asked)
        return self.asked


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
