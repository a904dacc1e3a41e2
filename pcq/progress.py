"""How long work says how far it is. The engine calls, the shell draws; no own bars."""

from typing import Protocol


class Progress(Protocol):
    """Called with what is being done, how much is done, and how much there is (same unit; 0 when unknown)."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def silent(stage: str, done: int, total: int) -> None:
    """The progress nobody watches."""
