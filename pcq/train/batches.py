"""The training batches: each is a pure function of the seed and its number, so a run can go on from any step.

Nothing about the order has to be saved: epoch e is the permutation of generator (seed, e), batch t the next samples of
it, changed by generator (seed, t). A run on n ranks takes every n-th sample of the same batches.
"""

import random
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pcq.data import Data, Inputs
from pcq.train.augment import Augment

AHEAD = 4
"""Batches that are decoded in advance."""


@dataclass(frozen=True)
class Batches:
    """``n // size`` batches an epoch; what is left over changes with the epoch.

    Attributes:
        data: the samples.
        size: samples of a batch, over all ranks.
        seed: of the order and the augmentation.
        augment: changes each batch; None: leaves them.
        threads: how many batches are made at once in the background; 0: in the caller's thread, for data whose own
            code may draw random numbers.
        rank, world: of ``world`` processes, which one this is.
        pin: hold the samples where a GPU can fetch them from while it computes.
    """

    data: Data
    size: int
    seed: int
    augment: Augment | None = None
    threads: int = 0
    rank: int = 0
    world: int = 1
    pin: bool = False

    @property
    def an_epoch(self) -> int:
        return self.data.n // self.size

    def numbers(self, step: int) -> Tensor:
        """Of the samples of batch ``step``, all ranks together."""
        epoch, place = divmod(step, self.an_epoch)
        return _order(self.data.n, self.seed, epoch)[place * self.size : (place + 1) * self.size]

    def make(self, step: int) -> tuple[Inputs, Tensor | None]:
        """This rank's part of batch ``step``, and its labels.

        All of the batch's random numbers are drawn, so that the parts are those of one process's batch.
        """
        numbers = self.numbers(step)
        mine = slice(self.rank, None, self.world)
        if self.augment is None:
            x = self.data.take(numbers[mine].tolist())
        elif self.world == 1:
            x = self.augment(self.data.take(numbers.tolist()), generator(self.seed, step))
        else:
            some = self.data.take(numbers[mine].tolist())
            whole = some.new_zeros(len(numbers), *some.shape[1:])
            whole[mine] = some
            x = self.augment(whole, generator(self.seed, step))[mine]
        inputs = tuple(each.pin_memory() if self.pin else each for each in self.data.inputs(x))
        return inputs, None if self.data.labels is None else self.data.labels[numbers[mine]]

    def run(self, start: int, stop: int) -> Iterator[tuple[Inputs, Tensor | None]]:
        """Batches ``start`` to ``stop - 1``; before each the global generators are set by (seed, step)."""
        if not self.threads:
            for step in range(start, stop):
                seed_all(self.seed, step, self.rank)
                yield self.make(step)
            return
        pool = ThreadPoolExecutor(self.threads)
        try:
            waiting: list[Future[tuple[Inputs, Tensor | None]]] = []
            asked = start
            for step in range(start, stop):
                while asked < min(stop, step + AHEAD):
                    waiting.append(pool.submit(self.make, asked))
                    asked += 1
                made = waiting.pop(0).result()
                seed_all(self.seed, step, self.rank)
                yield made
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, epoch, 1))


def generator(*numbers: int) -> torch.Generator:
    """A generator that depends on all of ``numbers``."""
    return torch.Generator().manual_seed(mixed(*numbers))


def mixed(*numbers: int) -> int:
    """One seed from several numbers; NumPy's SeedSequence keeps neighbours apart."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def seed_all(*numbers: int) -> None:
    """Set every global generator."""
    seed = mixed(*numbers, 2)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def own_randomness() -> Iterator[None]:
    """What happens inside does not change the caller's random numbers."""
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)
