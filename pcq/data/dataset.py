"""A data set opened: any sample by its number, as the network takes it; labels where there are any."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from pcq.data.inputs import named_mask
from pcq.errors import PcqError
from pcq.words import dimensions

Batch = tuple[Tensor, Tensor | None]

Inputs = tuple[Tensor, ...]
"""Samples as a network takes them: [b, ...] for each of its inputs."""

RESIDENT = 4 << 30
"""Bytes of images that are kept on a device at most."""


@dataclass(frozen=True)
class Data:
    """``n`` samples in a fixed order.

    Attributes:
        name: what it is, such as ``digits``.
        split: ``test``, ``val`` or ``train``.
        n: number of samples.
        shape: one sample's shape, such as (3, 224, 224).
        take: sample numbers [b] -> samples [b, *shape], decoded and normalised: float32, or int64 tokens.
        labels: int64 [n], or None: unlabelled.
        classes: the names of the classes in the order of the labels; empty where the set does not say.
        notes: what was found and done, one sentence each.
        sample: one sample in words, where its shape does not say it.
        arrays: of a network of several inputs [n, ...] for each by its name; samples are numbers of their rows then.
    """

    name: str
    split: str
    n: int
    shape: tuple[int, ...]
    take: Callable[[Sequence[int]], Tensor]
    labels: Tensor | None
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sample: str = ""
    arrays: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.n > 0, self.name
        assert self.labels is None or (self.labels.shape == (self.n,) and self.labels.dtype == torch.int64), self.name

    @cached_property
    def highest(self) -> int | None:
        """The highest label; None: there are none."""
        return None if self.labels is None else int(self.labels.max())

    def inputs(self, x: Tensor) -> Inputs:
        """What the network is given for the samples ``x`` [b, ...]."""
        return tuple(array[x] for array in self.arrays.values()) or (x,)

    def given(self, chosen: Sequence[int]) -> Inputs:
        """What the network is given for the samples of these numbers."""
        return self.inputs(self.take(chosen))

    @property
    def mask(self) -> int | None:
        """Which of the inputs is a mask of tokens; None: none is."""
        return named_mask(list(self.arrays), list(self.arrays.values()))

    def on(self, device: torch.device) -> "Data":
        """The same samples, bit by bit, kept on ``device`` if they are images in memory that fit there; labels stay."""
        if device.type == "cpu" or not isinstance(self.take, Pixels) or self.take.images.numel() > RESIDENT:
            return self
        return replace(self, take=self.take.on(device))

    def order(self, limit: int | None = None) -> Tensor:
        """Sample numbers int64 in the set's order: all of them, or ``limit`` evenly spaced ones.

        Spaced, because image folders are sorted by class: their first thousand can be one class.

        Raises:
            PcqError: ``limit`` is not positive.
        """
        if limit is not None and limit < 1:
            raise PcqError(f"{limit} samples cannot be taken", where="limit", allowed=f"1 to {self.n}")
        count = self.n if limit is None else min(limit, self.n)
        return torch.arange(count) * self.n // count

    def batches(
        self,
        batch_size: int,
        limit: int | None = None,
        *,
        order: Tensor | None = None,
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[Batch]:
        """``(x [b, *shape], y int64 [b] or None)``; the last batch may be shorter.

        Args:
            batch_size: samples per batch.
            limit: only so many samples, evenly spaced.
            order: sample numbers to take instead, as a training loop shuffles them.
            augment: applied to every x.

        Raises:
            PcqError: the batch size or the limit is not positive, or a sample cannot be read.
        """
        if batch_size < 1:
            raise PcqError(f"a batch of {batch_size} cannot be made", where="batch size", allowed="1 or more")
        for chosen in (self.order(limit) if order is None else order).split(batch_size):
            x = self.take(chosen.tolist())
            yield (x if augment is None else augment(x)), (None if self.labels is None else self.labels[chosen])

    def describe(self) -> str:
        """One line: name, split, number, shape, classes, and the notes."""
        count = self.highest + 1 if self.highest is not None else 0
        labelled = f"{len(self.classes)} classes" if self.classes else f"labels up to {count - 1}"
        sample = self.sample or dimensions(self.shape)
        line = f"{self.name}, {self.split}: {self.n:,} samples of {sample}, "
        return ". ".join(
            [line + ("no labels" if self.labels is None else labelled), *(n.rstrip(".") for n in self.notes)]
        )


@dataclass(frozen=True)
class Pixels:
    """``take`` for images uint8 [n, c, h, w] in memory: ``(image / 255 - mean) / std`` by channel, float32.

    The numbers are divided by a tensor: by a Python number some devices multiply with its reciprocal, which rounds
    differently. So the samples are the same on all of them, bit by bit.
    """

    images: Tensor
    mean: Tensor
    std: Tensor
    white: Tensor

    def __call__(self, chosen: Sequence[int]) -> Tensor:
        index = torch.as_tensor(chosen).to(self.images.device, non_blocking=True)
        return (self.images[index].float() / self.white - self.mean) / self.std

    def on(self, device: torch.device) -> "Pixels":
        return Pixels(*(t.to(device) for t in (self.images, self.mean, self.std, self.white)))


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Pixels:
    """``take`` for images uint8 [n, c, h, w]; mean and std by channel, of values from 0 to 1."""
    shift, scale = (torch.tensor(value)[None, :, None, None] for value in (tuple(mean), tuple(std)))
    return Pixels(images, shift, scale, torch.tensor(255.0))
