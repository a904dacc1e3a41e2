"""A quantized tensor is a record of codes, grid and rows; it is not a Tensor subclass and never runs."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pcq.grids import Affine, Grid, interleave
from pcq.packing import packed_size
from pcq.rows import Rows


class Quantizer(Protocol):
    """What chooses the levels: ``fit`` is called with float32 rows and returns the grid for them."""

    def fit(self, rows: Tensor) -> Grid:
        """``rows [g, n]`` float32 without padding -> a grid of g rows."""
        ...


@dataclass(frozen=True)
class QuantizedTensor:
    """``codes`` uint8 in the weight's own shape, the ``grid`` they index, and the ``rows`` the grid belongs to."""

    codes: Tensor
    grid: Grid
    rows: Rows

    def __post_init__(self) -> None:
        assert self.codes.dtype == torch.uint8, self.codes.dtype
        assert tuple(self.codes.shape) == self.rows.shape, (self.codes.shape, self.rows)

    def dequantize(self) -> Tensor:
        """float32, the weight's shape."""
        return self.rows.merge(self.grid.decode(self.rows.split(self.codes)))

    @property
    def numel(self) -> int:
        return self.codes.numel()

    @property
    def nbytes(self) -> int:
        """Bytes it takes when stored: packed codes, scales, zero points and tables."""
        return stored_bytes(self.grid, self.numel)


def stored_bytes(grid: Grid, numel: int) -> int:
    """Bytes of packed codes, scales, zero points and tables of ``numel`` weights on ``grid``."""
    size = packed_size(grid.count, numel)
    if isinstance(grid, Affine):
        zero = grid.zero_point.nbytes if isinstance(grid.zero_point, Tensor) else 0
        return size + 4 * grid.scale.numel() + zero
    return size + 4 * grid.table.numel() + (0 if grid.scale is None else 4 * grid.scale.numel())


def blank(quantizer: Quantizer, rows: Rows) -> Grid:
    """The grid of all-zero weights: what ``quantizer`` will choose has this form and size, whatever the weights."""
    return _form(quantizer).map(lambda rows_of_two: rows_of_two.new_zeros(rows.g, *rows_of_two.shape[1:]))


def _form(quantizer: Quantizer) -> Grid:
    """A grid for two rows: enough to tell what each row has of its own from what all share."""
    return quantizer.fit(torch.zeros(2, 8))


def fit(quantizer: Quantizer, weight: Tensor, rows: Rows) -> Grid:
    """The grid that ``quantizer`` chooses for ``weight``; shorter last groups are fitted on their real weights only."""
    assert weight.numel(), "an empty weight has no levels"
    split = rows.split(weight.detach().to(torch.float32))
    if rows.tail == rows.width:
        return quantizer.fit(split)
    by_channel = split.reshape(rows.channels, rows.groups, rows.width)
    main = quantizer.fit(by_channel[:, :-1].reshape(-1, rows.width))
    if _form(quantizer).g == 1:  # one unscaled table serves all rows
        return main
    tail = quantizer.fit(by_channel[:, -1, : rows.tail].contiguous())
    return interleave(main, tail, rows.channels)


def encode(weight: Tensor, grid: Grid, rows: Rows) -> QuantizedTensor:
    """Nearest level for every weight."""
    codes = grid.encode(rows.split(weight.detach().to(torch.float32)))
    return QuantizedTensor(rows.merge(codes).contiguous(), grid, rows)


def quantize(quantizer: Quantizer, weight: Tensor, rows: Rows) -> QuantizedTensor:
    """Fit the levels, then take the nearest: one-shot quantization of one weight."""
    return encode(weight, fit(quantizer, weight, rows), rows)
