"""Stopping in good order: a signal is noted, the run saves itself, and says how to go on."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The run was stopped by signal ``number`` (0: whichever it was); the message says what was saved."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number


@dataclass
class Stop:
    """``wanted`` is the signal's name once there was one."""

    wanted: str = ""


@contextmanager
def listening(patient: bool = False) -> Iterator[Stop]:
    """Within it the first SIGINT or SIGTERM is only noted; the second interrupts at once, unless ``patient``.

    Only in a program's main thread, where signals arrive; elsewhere nothing is changed.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, _frame: FrameType | None) -> None:
        if stop.wanted and not patient:
            raise KeyboardInterrupt
        stop.wanted = signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
