"""Pieces of work on a few threads, each of which computes alone.

Many small operations gain nothing from being cut up further by torch's own threads, and lose much by waiting for one
another where other programs use the cores. So large tensors are worked on in pieces, one piece to a thread.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


_threads: ContextVar[int | None] = ContextVar("_threads", default=None)


@contextlib.contextmanager
def pieces_only() -> Iterator[None]:
    """Within it torch works on one thread and only :func:`each` on several: for many operations of middling size.

    Where other programs use the cores, torch's threads wait for one another at the end of every single operation;
    packing a ResNet-50 was seen to take ten times as long.
    """
    threads = torch.get_num_threads()
    token = _threads.set(_threads.get() or threads)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _threads.reset(token)


def each(work: Callable[[Piece], Result], pieces: Sequence[Piece], device: torch.device) -> list[Result]:
    """``[work(piece) for piece in pieces]``, on a CPU with as many threads as torch has; without gradients.

    The results do not depend on the number of threads, as no piece's arithmetic is divided.
    """

    @torch.no_grad()  # a setting of each thread
    def alone(piece: Piece) -> Result:
        return work(piece)

    before = torch.get_num_threads()
    threads = _threads.get() or before
    if device.type != "cpu" or threads == 1:
        return [alone(piece) for piece in pieces]
    try:
        if len(pieces) <= 1:
            torch.set_num_threads(1)
            return [alone(piece) for piece in pieces]
        with ThreadPoolExecutor(min(threads, len(pieces)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(alone, pieces))
    finally:
        torch.set_num_threads(before)
