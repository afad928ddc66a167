"""Ctrl-C and SIGTERM that leave a checkpoint behind within seconds, and pauses after a step that was named."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

from tunewright.core.interrupts import finishing
from tunewright.training import distributed

GRACE_S = 3.0
"""For the step in progress to finish; a longer one is abandoned, and the step before it is saved."""


class StopRequest:
    """Whether someone has asked the run to stop, and the step after which it is to pause anyway."""

    def __init__(self, pause_after: int | None = None) -> None:
        self.asked = False
        self.pause_after = pause_after
        self.phase: Literal["free", "step", "closed"] = "free"
        """What a request does: it interrupts now; after `GRACE_S`, in a step's passes; or not before the step's end,
        as weights or files are being changed."""

    def after(self, step: int) -> bool:
        """Return whether this step is the last one for now; all processes of the run ask after the same steps."""
        return self.agreed() or step == self.pause_after

    def agreed(self) -> bool:
        """Return whether any process of the run has been asked; all of them have to call this at the same places."""
        self.asked = distributed.any_of(self.asked)
        return self.asked

    def in_step(self) -> None:
        """Begin the passes of a step.

        Raises:
            KeyboardInterrupt: a request came since the step before was looked after.
        """
        self.phase = "step"
        self._raise_if_asked()

    @contextmanager
    def free(self, what: str) -> Iterator[None]:
        """Let a request interrupt this block at once; ``what`` says what becomes of the run then.

        Several processes have to agree on a stop, which they do after steps alone: there the block is finished.

        Raises:
            KeyboardInterrupt: now or in the block, on request.
        """
        before, self.phase = self.phase, "free"
        try:
            with finishing(what):
                self._raise_if_asked()
                yield
        finally:
            self.phase = before

    def _raise_if_asked(self) -> None:
        if self.asked and distributed.count() == 1:
            raise KeyboardInterrupt


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
        if distributed.count() > 1:
            return
        if request.phase == "free":
            raise KeyboardInterrupt
        if request.phase == "step":
            signal.setitimer(signal.ITIMER_REAL, GRACE_S)

    def abandon(_number: int, _frame: FrameType | None) -> None:
        if request.phase == "step":
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, abandon)
    try:
        yield request
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
