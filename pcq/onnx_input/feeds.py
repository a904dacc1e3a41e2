"""Many samples for a model of any number of inputs, fed in batches."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pcq.errors import PcqError

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Feeds:
    """Samples of a model: batches of ``batch`` samples each, an array for every input."""

    batches: tuple[Mapping[str, Array], ...]
    batch: int

    @property
    def n(self) -> int:
        """Samples."""
        return len(self.batches) * self.batch

    def split(self, first: int) -> tuple["Feeds", "Feeds"]:
        """The first samples, in whole batches, and the others."""
        count = max(1, min(first // self.batch, len(self.batches) - 1))
        return Feeds(self.batches[:count], self.batch), Feeds(self.batches[count:], self.batch)


def named(arrays: Mapping[str, Array], batch: int | None, most: int, seed: int, where: str) -> Feeds:
    """Samples from arrays by input name: those as long as the longest are samples, drawn by ``seed``; others, such as a
    sample rate or a recurrent state, are given to every batch as they are.

    Args:
        arrays: one for each input.
        batch: samples that the model wants at once; None: any number.
        most: samples to take; of a model that wants more at once, two batches.
        seed: of the order.
        where: for messages.

    Raises:
        PcqError: there are no samples.
    """
    lengths = {name: len(array) for name, array in arrays.items() if array.ndim}
    count = max(lengths.values(), default=0)
    if not count:
        raise PcqError("there are no samples", where=where)
    size = batch or min(32, max(1, min(count, most) // 5))
    order = np.random.default_rng(seed).permutation(count)[: max(most, 2 * size)]
    moving = {name for name in arrays if lengths.get(name) == count}
    batches = tuple(
        {name: array[order[start : start + size]] if name in moving else array for name, array in arrays.items()}
        for start in range(0, len(order) - size + 1, size)
    )
    return Feeds(batches, size)


def invented(feed: Mapping[str, Array], count: int, seed: int) -> Feeds:
    """``count`` times the same shapes with new numbers: normal ones, and integers drawn from the feed's own."""
    generator = np.random.default_rng(seed)

    def fresh(array: Array) -> Array:
        if np.issubdtype(array.dtype, np.floating):
            return np.asarray(generator.normal(size=array.shape)).astype(array.dtype)
        return np.asarray(generator.choice(array.reshape(-1), size=array.shape)).astype(array.dtype)

    return Feeds(tuple({name: fresh(array) for name, array in feed.items()} for _ in range(count)), 1)
