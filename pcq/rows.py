"""Every weight becomes ``rows [g, n]``: one row for each set of weights that share their levels.

Per tensor, per channel, per group, conv or linear, transposed or not: from here on one code path.
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """How a weight of ``shape`` is cut into rows.

    Attributes:
        shape: the weight's shape.
        axis: the output-channel axis: 0 (Conv, Linear, Embedding), 1 (transposed convolution), or None: the whole
            tensor is one channel.
        blocks: groups of a grouped transposed convolution, whose weight ``[c_in, c_out / blocks, ...]`` holds
            ``blocks`` independent blocks of output channels along axis 0.
        group: cut each channel's weights into groups of this many consecutive ones; the last group of a channel is
            shorter where the length does not divide. None: a channel is one row.
    """

    shape: tuple[int, ...]
    axis: int | None = 0
    blocks: int = 1
    group: int | None = None

    def __post_init__(self) -> None:
        assert self.axis in (None, 0, 1), self
        assert self.axis is None or len(self.shape) > self.axis, self
        assert self.group is None or self.group > 0, self
        assert self.blocks == 1 or (self.axis == 1 and self.shape[0] % self.blocks == 0), self

    @property
    def channels(self) -> int:
        """Number of output channels (1 per tensor)."""
        return 1 if self.axis is None else self.shape[self.axis] * self.blocks

    @property
    def length(self) -> int:
        """Weights per channel."""
        return math.prod(self.shape) // max(1, self.channels)

    @property
    def groups(self) -> int:
        """Rows per channel."""
        return 1 if self.group is None else max(1, math.ceil(self.length / self.group))

    @property
    def tail(self) -> int:
        """Weights in the last row of each channel that are real; the rest of that row is padding."""
        return self.length - (self.groups - 1) * self.width

    @property
    def g(self) -> int:
        """Number of rows."""
        return self.channels * self.groups

    @property
    def width(self) -> int:
        """``n``: weights per row, padding included."""
        return self.length if self.group is None else min(self.group, self.length)

    def split(self, weight: Tensor) -> Tensor:
        """``weight [*shape] -> rows [g, n]``, zero-padded behind each channel's last group. A view where it can be."""
        assert tuple(weight.shape) == self.shape, (weight.shape, self.shape)
        if self.axis == 1:
            c_in, c_out = self.shape[0] // self.blocks, self.shape[1]
            weight = weight.reshape(self.blocks, c_in, c_out, -1).transpose(1, 2)
        channels = weight.reshape(self.channels, self.length)
        if self.group is None:
            return channels
        return F.pad(channels, (0, self.groups * self.width - self.length)).reshape(self.g, self.width)

    def merge(self, rows: Tensor) -> Tensor:
        """``rows [g, n] -> weight [*shape]``, the inverse of :meth:`split`; padding is dropped."""
        assert tuple(rows.shape) == (self.g, self.width), (rows.shape, self)
        channels = rows.reshape(self.channels, self.groups * self.width)[:, : self.length]
        if self.axis != 1:
            return channels.reshape(self.shape)
        c_in, c_out = self.shape[0] // self.blocks, self.shape[1]
        return channels.reshape(self.blocks, c_out, c_in, -1).transpose(1, 2).reshape(self.shape)
