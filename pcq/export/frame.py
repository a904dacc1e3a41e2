"""How codes meet what belongs to their rows (scale, zero point, place in the tables): by broadcasting.

plain     stored in a shape that broadcasts against the weight: per tensor, per channel
grouped   codes are viewed so that it broadcasts ``[channels, groups, width]``, and the result is reshaped
ragged    it is spread over the weight first: groups whose last is shorter, groups of transposed convolutions
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pcq.rows import Rows

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Frame:
    """How codes and what belongs to their rows meet.

    Attributes:
        rows: how the weight is cut into rows.
        transposed: the weight, a matrix, is stored as ``[in, out]``.
    """

    rows: Rows
    transposed: bool

    def __post_init__(self) -> None:
        assert not self.transposed or can_transpose(self.rows), self

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the stored weight."""
        return self.rows.shape[::-1] if self.transposed else self.rows.shape

    @cached_property
    def way(self) -> Literal["plain", "grouped", "ragged"]:
        rows = self.rows
        if rows.groups == 1:
            return "plain" if rows.blocks == 1 else "grouped"
        return "ragged" if rows.axis == 1 or rows.tail != rows.width else "grouped"

    @cached_property
    def view(self) -> tuple[int, ...]:
        """The shape codes are computed in."""
        rows, channels, length = self.rows, self.rows.channels, self.rows.length
        if self.way == "plain":
            return self.shape
        if rows.axis == 1:
            c_in, c_out = rows.shape[0] // rows.blocks, rows.shape[1]
            return (rows.blocks, c_in, c_out, length // c_in)
        inner = (length,) if self.way == "ragged" else (rows.groups, rows.width)
        return (*inner, channels) if self.transposed else (channels, *inner)

    @cached_property
    def place(self) -> tuple[int, ...]:
        """The shape in which one number per row is stored."""
        rows, channels = self.rows, self.rows.channels
        if self.way == "ragged":
            return (channels, rows.groups)
        if self.way == "grouped":
            if rows.axis == 1:
                return (rows.blocks, 1, rows.shape[1], 1)
            return (rows.groups, 1, channels) if self.transposed else (channels, rows.groups, 1)
        if rows.axis is None:
            return ()
        axis = rows.axis if not self.transposed else 1 - rows.axis
        return tuple(channels if i == axis else 1 for i in range(len(rows.shape)))

    @cached_property
    def spread(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """For ragged rows: the shape that one number per weight has channel by channel, and how it is transposed."""
        rows, channels, length = self.rows, self.rows.channels, self.rows.length
        if rows.axis == 1:
            c_in, c_out = rows.shape[0] // rows.blocks, rows.shape[1]
            return (rows.blocks, c_out, c_in, length // c_in), (0, 2, 1, 3)
        return (channels, length), (1, 0) if self.transposed else (0, 1)

    def arrange(self, per_row: Tensor) -> Array:
        """``[g, ...] -> [*place, ...]``."""
        rest = per_row.shape[1:]
        if self.way == "grouped" and self.transposed:
            per_row = per_row.reshape(self.rows.channels, self.rows.groups, *rest).transpose(0, 1)
        return per_row.reshape((*self.place, *rest)).contiguous().numpy()


def can_transpose(rows: Rows) -> bool:
    """Whether a weight may be stored transposed: a matrix whose rows do not run across its columns."""
    return len(rows.shape) == 2 and (rows.axis == 0 or (rows.axis is None and rows.groups == 1))
