"""Weights that have few different values already: packed as they are, without any loss."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pcq.grids import Affine, Codebook, Grid
from pcq.qtensor import QuantizedTensor, encode, stored_bytes
from pcq.rows import Rows

MOST = 256


@dataclass(frozen=True)
class Exact:
    """Levels that a weight already has."""

    grid: Grid

    @property
    def text(self) -> str:
        return f"{self.grid.count} exact levels"

    def fit(self, rows: Tensor) -> Grid:
        """The levels, whatever the rows."""
        return self.grid


def detect(weight: Tensor, transposed_conv_groups: int | None = None) -> tuple[Exact, Rows] | None:
    """The levels of a weight all of whose numbers are on few of them, per tensor or per channel; None: it has more.

    Of the forms that give back every bit the one that takes the fewest bytes is chosen: evenly spaced levels, per
    tensor or per channel, or listed ones. A weight that would take more bytes than in float32 is not taken, nor is one
    that holds NaN or infinity.

    Args:
        weight: float32, in torch's orientation.
        transposed_conv_groups: its groups, for the weight of a transposed convolution.
    """
    if not weight.isfinite().all():
        return None
    shape = tuple(weight.shape)
    by_channel = Rows(shape, 0) if transposed_conv_groups is None else Rows(shape, 1, transposed_conv_groups)
    best: tuple[int, Exact, Rows] | None = None
    for rows in (Rows(shape, None), by_channel):
        for grid in _grids(rows.split(weight)):
            size = stored_bytes(grid, weight.numel())
            if size < 4 * weight.numel() and (best is None or size < best[0]) and _lossless(weight, grid, rows):
                best = size, Exact(grid), rows
    return None if best is None else best[1:]


def _lossless(weight: Tensor, grid: Grid, rows: Rows) -> bool:
    """Whether every number comes back; zeros may lose their sign."""
    coded: QuantizedTensor = encode(weight, grid, rows)
    return torch.equal(coded.dequantize(), weight)


def _grids(rows: Tensor) -> list[Grid]:
    """Candidates: listed levels, and evenly spaced ones through them."""
    values = [row.unique() for row in rows[: 1 << 16]]
    most = max(len(row) for row in values)
    if most > MOST or len(rows) > 1 << 16:
        return []
    count = max(2, most)
    table = torch.stack([torch.cat([row, row[-1:].expand(count - len(row))]) for row in values])
    found: list[Grid] = [Codebook(table)]
    return [*_even(values), *found]


def _even(values: list[Tensor]) -> list[Grid]:
    """Evenly spaced levels: symmetric ones around 0 that all rows share the zero point of."""
    steps, reach = [], 0.0
    for row in values:
        points = torch.cat([row, row.new_zeros(1)]).double().unique()
        gaps = points.diff()
        step = float(gaps.min()) if len(gaps) else 0.0
        if step and float((points / step - (points / step).round()).abs().max()) > 1e-3:
            halves = row.double()  # levels around 0 that do not hold it, such as binary ones
            step = float(2 * halves.abs().min()) if len(halves) else 0.0
            if not step:
                return []
        steps.append(step)
        reach = max(reach, float(row.abs().max()) / step if step else 0.0)
    scale = torch.tensor(steps, dtype=torch.float64)
    found: list[Grid] = []
    for half in (False, True):
        zero = round(reach - 0.5) + 0.5 if half else float(round(reach))
        count = int(2 * zero) + 1
        if 2 <= count <= MOST:
            found.append(Affine(scale.float(), zero, count))
    return found
