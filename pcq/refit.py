"""Levels that follow moving weights: one cheap step from the last levels instead of an exact fit.

An exact least-squares fit sorts every row, some 160 copies of the weights. While weights train they move little, so it
is enough to alternate: take the nearest codes once, then the levels of least squared error for these codes. Neither
half raises the error, so a refit is never worse than the levels it starts from.

For all of these rules, how many weights of a row are nearest to each level, and their sum, are all that is needed of
the weights. On a GPU they are summed for many weights at once, and :func:`refit_together` is as many launches for a
network as for one weight.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pcq import qtensor
from pcq.gpu import refit as refit_gpu
from pcq.grids import Affine, Codebook, Grid, interleave
from pcq.prox import CHUNK, FEW, blocks
from pcq.quantizers import AdditivePowersOfTwo, Fixed, KMeans, LeastSquaresBinary, Ternary, Uniform
from pcq.rows import Rows


def following(quantizer: qtensor.Quantizer) -> qtensor.Quantizer:
    """The rule by which levels follow weights that train, where the recipe leaves it open."""
    return Ternary("mean") if quantizer == Ternary("auto") else quantizer


def settles(quantizer: qtensor.Quantizer) -> bool:
    """Whether levels stay where they are when they are refitted to weights that lie on them. By a mean magnitude they
    would be others each time, and end at 0 or without bounds."""
    return getattr(quantizer, "scale", None) != "mean"


@torch.no_grad()
def refit(quantizer: qtensor.Quantizer, rows: Tensor, grid: Grid) -> Grid:
    """``rows [g, n]`` float32 and the grid last used for them -> a grid of the same form, at least as good.

    What chooses its levels by another rule than least squares (absmax, fixed levels), or quickly, or is not known
    here, is fitted anew; zero points are kept. Rows whose weights all have one code are fitted anew too, so that none
    stays stuck at zero.
    """
    factor = _per_magnitude(quantizer)
    if factor is not None and isinstance(grid, Affine):
        return _of_mean(grid, _magnitudes(rows) / rows.shape[1], factor)
    if not follows(quantizer, grid):
        return quantizer.fit(rows)
    if isinstance(grid, Affine):
        scale, stuck = _ratio(*_affine_sums(rows, grid), grid.scale)
        moved: Grid = Affine(scale, grid.zero_point, grid.count)
    else:
        cells = _mirrored_cells if isinstance(quantizer, LeastSquaresBinary) else _cells
        moved, stuck = _moved(quantizer, grid, *cells(rows, grid.levels().expand(rows.shape[0], -1)))
    return _with_rows(moved, stuck, quantizer.fit(rows[stuck])) if bool(stuck.any()) else moved


def follows(quantizer: qtensor.Quantizer, grid: Grid) -> bool:
    """Whether the levels are those of least squares for the codes of the last ones."""
    match quantizer, grid:
        case ((Ternary(scale="auto" | "mse") | Uniform(scale="mse")), Affine()):
            return True
        case ((AdditivePowersOfTwo() | Fixed(scale="mse")), Codebook()):
            return grid.scale is not None
        case ((KMeans() | LeastSquaresBinary()), Codebook()):
            return True
    return False


def _moved(quantizer: qtensor.Quantizer, grid: Grid, counts: Tensor, sums: Tensor) -> tuple[Grid, Tensor]:
    """The levels of least squares where ``counts`` weights of a row have each code, with these ``sums``: float64
    ``[g, k]`` each; and the rows for which these say nothing."""
    if isinstance(grid, Affine):
        units = torch.arange(grid.count, dtype=torch.float64, device=counts.device) - grid.zeros()
        scale, stuck = _ratio((units * sums).sum(1), (units.square() * counts).sum(1), grid.scale)
        return Affine(scale, grid.zero_point, grid.count), stuck
    table = grid.table.double()
    if grid.scale is not None:
        scale, stuck = _ratio((table * sums).sum(1), (table.square() * counts).sum(1), grid.scale)
        return Codebook(grid.table, scale), stuck
    if isinstance(quantizer, KMeans):
        means = torch.where(counts > 0, sums / counts.clamp(min=1), table)
        return Codebook(means.float()), ((counts > 0).sum(1) < 2) | (grid.table[:, 0] == grid.table[:, -1])
    levels, stuck = _binary_levels(table, counts, sums)
    return Codebook(levels.float()), stuck


def refit_weight(quantizer: qtensor.Quantizer, weight: Tensor, grid: Grid, rows: Rows) -> Grid:
    """:func:`refit` for a weight cut into ``rows``, as :func:`pcq.qtensor.fit` is ``quantizer.fit`` for one."""
    split = rows.split(weight.detach())
    if rows.tail == rows.width:
        return refit(quantizer, split, grid)
    if isinstance(grid, Codebook) and grid.scale is None and grid.table.shape[0] == 1:
        return qtensor.fit(quantizer, weight, rows)
    by_channel = split.reshape(rows.channels, rows.groups, rows.width)
    index = torch.arange(rows.g, device=split.device).reshape(rows.channels, rows.groups)
    main = refit(quantizer, by_channel[:, :-1].reshape(-1, rows.width), grid.map(lambda t: t[index[:, :-1].flatten()]))
    tail = refit(quantizer, by_channel[:, -1, : rows.tail].contiguous(), grid.map(lambda t: t[index[:, -1]]))
    return interleave(main, tail, rows.channels)


@dataclass(frozen=True)
class Refitted:
    """One weight whose levels are to be refitted: its rows ``[g, n]``, their quantizer and the levels last used."""

    quantizer: qtensor.Quantizer
    rows: Tensor
    grid: Grid

    @property
    def at_once(self) -> bool:
        """Whether :func:`refit_together` takes it."""
        by_sums = _per_magnitude(self.quantizer) is not None or follows(self.quantizer, self.grid)
        return by_sums and self.grid.g == len(self.rows) and refit_gpu.fits(self.rows, self.grid.count)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Weights of one kind have levels of one form."""
        zero = getattr(self.grid, "zero_point", None)
        return self.quantizer, type(self.grid), self.grid.count, zero.dtype if isinstance(zero, Tensor) else zero


@torch.no_grad()
def refit_together(weights: Sequence[Refitted]) -> list[Grid]:
    """:func:`refit` of weights that are ``at_once``, all on one GPU."""
    kinds = defaultdict[tuple[Any, ...], list[int]](list)
    for i, weight in enumerate(weights):
        kinds[weight.kind].append(i)
    ordered = [i for some in kinds.values() for i in some]
    joined = [_joined([weights[i].grid for i in some]) for some in kinds.values()]
    levels = []
    for some, grid in zip(kinds.values(), joined, strict=True):
        if _per_magnitude(weights[some[0]].quantizer) is None:
            levels += grid.levels().split([len(weights[i].rows) for i in some])
        else:
            levels += [weights[some[0]].rows.new_tensor([[-1.0, 1.0]])] * len(some)  # sums on both sides of zero
    counts, sums = refit_gpu.cells([(weights[i].rows, own) for i, own in zip(ordered, levels, strict=True)])
    found: dict[int, Grid] = {}
    begin = 0
    for some, grid in zip(kinds.values(), joined, strict=True):
        here = slice(begin, begin := begin + grid.g)
        moved, stuck = _by_sums(weights[some[0]].quantizer, grid, counts[here], sums[here])
        rows = [len(weights[i].rows) for i in some]
        for i, own in zip(some, _parted(moved, rows), strict=True):
            found[i] = own
        if stuck is not None and bool(stuck.any()):
            for i, which in zip(some, stuck.split(rows), strict=True):
                if bool(which.any()):
                    found[i] = _with_rows(found[i], which, weights[i].quantizer.fit(weights[i].rows[which]))
    return [found[i] for i in range(len(weights))]


def _by_sums(quantizer: qtensor.Quantizer, grid: Grid, counts: Tensor, sums: Tensor) -> tuple[Grid, Tensor | None]:
    factor = _per_magnitude(quantizer)
    if factor is None:
        return _moved(quantizer, grid, counts[:, : grid.count], sums[:, : grid.count])
    assert isinstance(grid, Affine), grid
    return _of_mean(grid, (sums[:, 1] - sums[:, 0]) / counts.sum(1), factor), None


def _of_mean(grid: Affine, mean: Tensor, factor: float) -> Affine:
    """The scale is ``factor`` mean magnitudes: float64 ``[g]``."""
    return Affine((mean * factor).clamp(max=torch.finfo(torch.float32).max).float(), grid.zero_point, grid.count)


def _per_magnitude(quantizer: qtensor.Quantizer) -> float | None:
    """Mean magnitudes of the weights to a scale, where that is all the levels go by."""
    return getattr(quantizer, "per_magnitude", None)


def _joined(grids: Sequence[Grid]) -> Grid:
    """The grid of the rows of all."""
    first = grids[0]
    if isinstance(first, Affine):
        zeros = [grid.zero_point for grid in grids if isinstance(grid, Affine)]
        zero = torch.cat(zeros) if isinstance(zeros[0], Tensor) else zeros[0]  # type: ignore[arg-type]
        return Affine(torch.cat([grid.scale for grid in grids if grid.scale is not None]), zero, first.count)
    if first.scale is not None and first.table.shape[0] == 1:  # the same for all that the quantizer fits
        return Codebook(first.table, torch.cat([grid.scale for grid in grids if grid.scale is not None]))
    tables = torch.cat([grid.table for grid in grids if isinstance(grid, Codebook)])
    return Codebook(tables, None if first.scale is None else torch.cat([g.scale for g in grids if g.scale is not None]))


def _parted(grid: Grid, rows: Sequence[int]) -> list[Grid]:
    """The grids of so many rows each."""
    ends = list(itertools.accumulate(rows))
    if len(rows) == 1:
        return [grid]
    return [grid.map(lambda t, a=end - n, b=end: t[a:b]) for n, end in zip(rows, ends, strict=True)]  # type: ignore[misc]


def _ratio(above: Tensor, below: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares scale, and which rows have none."""
    stuck = ~((above > 0) & (below > 0) & (before > 0))
    return torch.where(stuck, before.double(), above / torch.where(below > 0, below, 1.0)).float(), stuck


def _magnitudes(rows: Tensor) -> Tensor:
    """The sum of the magnitudes of each row's weights: float64 ``[g]``."""
    total = rows.new_zeros(rows.shape[0], dtype=torch.float64)
    for which, part, scratch in _pieces(rows):
        total[which] += torch.abs(rows[which, part], out=scratch).sum(1, dtype=torch.float64)
    return total


def _pieces(rows: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Slices of ``rows`` that are worked on at a time, and a buffer of the shape of each."""
    size = min(CHUNK, rows.numel()) if rows.device.type == "cpu" else rows.numel()
    scratch = rows.new_empty(size)
    for which, part in blocks(rows, size):
        shape = rows[which, part].shape
        yield which, part, scratch[: shape.numel()].view(shape)


def _affine_sums(rows: Tensor, grid: Affine) -> tuple[Tensor, Tensor]:
    """``<weights, codes>`` and ``<codes, codes>`` of each row, codes counted from the zero point: float64 ``[g]``."""
    step = torch.where(grid.scale > 0, grid.scale, 1.0)[:, None]
    zero = grid.zeros()
    above, below = rows.new_zeros(2, rows.shape[0], dtype=torch.float64)
    for which, part, scratch in _pieces(rows):
        weights = rows[which, part]
        code = torch.div(weights, step[which], out=scratch).add_(zero[which])
        code.round_().clamp_(0, grid.count - 1).sub_(zero[which])
        above[which] += torch.linalg.vecdot(weights, code)
        below[which] += torch.linalg.vecdot(code, code)
    return above, below


def _mirrored_cells(rows: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`_cells`, for levels ``±v1 ± .. ± vb``: a weight and the level nearest to it may both change their sign,
    which leaves half of the levels to look at."""
    counts, sums = _cells(rows, levels[:, levels.shape[1] // 2 :], magnitudes=True)
    return F.pad(counts, (counts.shape[1], 0)), F.pad(sums, (sums.shape[1], 0))


def _cells(rows: Tensor, levels: Tensor, magnitudes: bool = False) -> tuple[Tensor, Tensor]:
    """How many weights of each row, or their magnitudes, are nearest to each of its ``levels [g, k]``, and their sum:
    float64 ``[g, k]`` each."""
    counts, sums = levels.new_zeros(2, *levels.shape, dtype=torch.float64)
    middles, k = (levels[:, 1:] + levels[:, :-1]) / 2, levels.shape[1]
    for which, part, scratch in _pieces(rows):
        weights = rows[which, part].abs() if magnitudes else rows[which, part]
        if k > FEW:
            offset = torch.arange(weights.shape[0], device=rows.device)[:, None] * k
            index = (torch.searchsorted(middles[which].contiguous(), weights.contiguous()) + offset).flatten()
            length = weights.shape[0] * k
            counts[which] += torch.bincount(index, minlength=length).view(-1, k)
            sums[which] += torch.bincount(index, weights.double().flatten(), length).view(-1, k)
            continue
        counts[which, 0] += weights.shape[1]
        sums[which, 0] += weights.sum(1)
        for level in range(1, k):
            above = torch.gt(weights, middles[which, level - 1 : level], out=scratch)
            count, total = above.sum(1), above.mul_(weights).sum(1)
            counts[which, level] += count
            counts[which, level - 1] -= count
            sums[which, level] += total
            sums[which, level - 1] -= total
    return counts, sums


def _binary_levels(table: Tensor, counts: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares for the values v of the levels ``±v1 ± .. ± vb``; and the rows whose values are not determined.

    The values are read off the ascending levels: the distances from the lowest, halved, are the subset sums of the v.
    """
    bits = table.shape[1].bit_length() - 1
    sums_of_some = (table - table[:, :1]) / 2
    values = [sums_of_some[:, 1]] if bits > 1 else []
    if bits > 2:
        values.append(sums_of_some[:, 2])
    if bits > 3:
        third, pair = sums_of_some[:, 3], values[0] + values[1]
        values.append(torch.where((third - pair).abs() <= 1e-6 * table[:, -1], sums_of_some[:, 4], third))
    values.append(-table[:, 0] - sum(values, torch.zeros_like(table[:, 0])))
    signs = table.new_tensor(list(itertools.product((-1.0, 1.0), repeat=bits)))
    order = (torch.stack(values, 1) @ signs.T).sort(dim=1, stable=True).indices
    patterns = signs[order]
    normal = torch.einsum("gk,gki,gkj->gij", counts, patterns, patterns)
    right = torch.einsum("gk,gki->gi", sums, patterns)
    solved, failed = torch.linalg.solve_ex(normal, right)
    spread = torch.linalg.eigvalsh(normal)
    stuck = (failed != 0) | (spread[:, 0] <= 1e-9 * spread[:, -1]) | ~torch.isfinite(solved).all(1)
    levels = (torch.where(stuck[:, None], torch.stack(values, 1), solved) @ signs.T).sort(1).values
    return (levels - levels.flip(1)) / 2, stuck


def _with_rows(grid: Grid, which: Tensor, rows: Grid) -> Grid:
    """``grid`` with the rows ``which`` replaced."""

    def put(into: Tensor, values: Tensor) -> Tensor:
        into = into.clone()
        into[which] = values
        return into

    if isinstance(grid, Affine) and isinstance(rows, Affine):
        zero = grid.zero_point
        if isinstance(zero, Tensor) and isinstance(rows.zero_point, Tensor):
            zero = put(zero, rows.zero_point)
        return Affine(put(grid.scale, rows.scale), zero, grid.count)
    assert isinstance(grid, Codebook), grid
    assert isinstance(rows, Codebook), rows
    if grid.scale is not None and rows.scale is not None:
        return Codebook(grid.table, put(grid.scale, rows.scale))
    return Codebook(put(grid.table, rows.table))
