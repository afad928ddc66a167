"""Stop requests: Ctrl-C and SIGTERM leave a checkpoint within seconds, and runs can pause after a given step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Literal

from tunewright.core.interrupts import finishing
from tunewright.training import distributed

GRACE_S = 3.0
"""Time for the step in progress to finish; a longer step is abandoned, and the step before it is saved."""


class StopRequest:
    """A request to stop the run, and the step after which it pauses in any case."""

    def __init__(self, pause_after: int | None = None, elsewhere: Callable[[], bool] = lambda: False) -> None:
        self.asked = False
        self._elsewhere = elsewhere
        self.pause_after = pause_after
        self.phase: Literal["free", "step", "closed"] = "free"
        """Effect of a request: "free" interrupts now; "step" after `GRACE_S`; "closed" at the step's end, because
        weights or files are being changed."""

    def after(self, step: int) -> bool:
        """Return whether this step is the last one for now; all processes of the run ask after the same steps."""
        return self.agreed() or step == self.pause_after

    def agreed(self) -> bool:
        """Return whether any process of the run was asked to stop; all of them must call this at the same places."""
        self.asked = distributed.any_process(self.asked or self._elsewhere())
        return self.asked

    def in_step(self) -> None:
        """Enter the passes of a step.

        Raises:
            KeyboardInterrupt: a request came since the previous step.
        """
        self.phase = "step"
        self._raise_if_requested()

    @contextmanager
    def free(self, what: str) -> Iterator[None]:
        """Let a request interrupt this block at once; ``what`` says what then happens to the run.

        Several processes must agree on a stop, which they do only after steps: there the block is finished.

        Raises:
            KeyboardInterrupt: now or in the block, on request.
        """
        before, self.phase = self.phase, "free"
        try:
            with finishing(what):
                self._raise_if_requested()
                yield
        finally:
            self.phase = before

    def _raise_if_requested(self) -> None:
        if self.asked and distributed.world_size() == 1:
            raise KeyboardInterrupt


_asked_elsewhere: ContextVar[Callable[[], bool]] = ContextVar("asked_elsewhere", default=lambda: False)


@contextmanager
def stopped_from(asked: Callable[[], bool]) -> Iterator[None]:
    """Stop the block's runs after the step at which ``asked`` returns True, for a process that gets no signals."""
    before = _asked_elsewhere.set(asked)
    try:
        yield
    finally:
        _asked_elsewhere.reset(before)


@contextmanager
def stop_on_signal(pause_after: int | None = None) -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; a second one interrupts at once.

    Outside the main thread no signal handlers are set: only `stopped_from` makes a request.
    """
    request = StopRequest(pause_after, _asked_elsewhere.get())

    def ask(_number: int, _frame: FrameType | None) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.asked = True
        if distributed.world_size() > 1:
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
