"""Where the search for a layer's levels and codes begins: at several scales and zero points, the best one kept.

Levels that are nearest to the weights are seldom those that serve the layer's quadratic best, and from them codes and
levels that are improved in turn end in a minimum near by. So GPTQ (arXiv 2210.17323) is run from levels stretched by
several factors, then from the best of those at moved scales and zero points. All starts of a layer are one problem with
as many times the channels, since their columns can be gone through together.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pcq.calibrate.quadratic import Codes, Quadratic, descend, gptq, parameters_of, refit, with_parameters
from pcq.grids import Affine, Codebook, Grid

STRETCHED = (1.0, 1.14, 1.32, 0.9, 1.06, 1.22, 0.96, 1.45)
"""Factors of the scales (or tables) at first; the more useful come earlier."""

MOVED = sorted(
    itertools.product((0.92, 0.96, 1.0, 1.04, 1.08), (-2, -1, 0, 1, 2)),
    key=lambda move: (round(abs(move[0] - 1) / 0.04) + abs(move[1]), move),
)
"""Then: factors of the best scales, and steps that zero points are moved by; the smaller moves come earlier."""

LEVELS = 16
"""Grids of more levels have one start: what another would win is less than anything else loses."""

_NUMBERS, _PRODUCTS = 2**22, 2**32  # weights of all starts of one layer, and products of one pass over them, at most

Start = tuple[float, int]


def search(quadratic: Quadratic, grid: Grid, row: Tensor) -> Codes:
    """Codes and levels of every channel: the best of GPTQ's from several starts, each improved once.

    ``grid`` with ``row [G, r, n]`` is the first start. Layers with many weights have fewer of them, or this one. Where
    channels share levels, one start is taken for all of them.
    """
    numbers = row.numel()
    most = min(_NUMBERS // numbers, _PRODUCTS // (numbers * row.shape[2])) if grid.count <= LEVELS else 1
    found = best_of(quadratic, grid, row, [(factor, 0) for factor in STRETCHED[: max(1, most)]])
    if most <= 1:
        return found
    shifted = isinstance(grid, Affine) and isinstance(grid.zero_point, Tensor)
    moves = [move for move in MOVED if shifted or move[1] == 0]
    return better(quadratic, found, best_of(quadratic, found.grid, row, moves[:most]))


def best_of(quadratic: Quadratic, grid: Grid, row: Tensor, starts: Sequence[Start]) -> Codes:
    """GPTQ from every one of ``starts``, improved once; the best for each channel."""
    if len(starts) > 1 and not _apart(grid, row):
        found = best_of(quadratic, grid, row, starts[:1])
        for start in starts[1:]:
            found = better(quadratic, found, best_of(quadratic, grid, row, [start]))
        return found
    (groups, r, n), count, g = row.shape, len(starts), parameters_of(grid).shape[0]
    wide = Quadratic(quadratic.target.repeat(1, count, 1), quadratic.h)
    rows = row if count == 1 else torch.cat([row + i * g for i in range(count)], 1)
    codes = improved(wide, gptq(wide, _stacked(grid, starts), rows))
    which = wide.loss(codes.decode()).view(groups, count, r).argmin(1)
    taken = codes.codes.view(groups, count, r, n).gather(1, which[:, None, :, None].expand(groups, 1, r, n))[:, 0]
    if count > 1:
        kept = _of_rows(which, row, g) * g + torch.arange(g)
        codes = replace(codes, grid=codes.grid.map(lambda tensor: tensor[kept]))
    return Codes(taken.contiguous(), codes.grid, row)


def _apart(grid: Grid, row: Tensor) -> bool:
    """Whether every channel has levels of its own."""
    return parameters_of(grid).shape[0] > 1 and Codes(row, grid, row).own


def improved(quadratic: Quadratic, codes: Codes) -> Codes:
    """Levels refitted to the codes, then codes by coordinate descent, two sweeps."""
    return descend(quadratic, refit(quadratic, codes), 2)[0]


def better(quadratic: Quadratic, one: Codes, other: Codes) -> Codes:
    """Of each channel the one with the lower loss (``one`` of equal ones); of all together where they share levels.

    The grids differ in scales, tables and zero points only.
    """
    mine, theirs = (quadratic.loss(codes.decode()) for codes in (one, other))
    parameters = parameters_of(one.grid)
    if _apart(one.grid, one.row):
        won = theirs < mine
        rows = _of_rows(won, one.row, len(parameters))
    else:
        won = (theirs.sum() < mine.sum()).expand_as(mine)
        rows = won.flatten()[:1].expand(len(parameters))
    grid = with_parameters(one.grid, torch.where(rows[:, None], parameters_of(other.grid), parameters))
    if isinstance(grid, Affine) and isinstance(grid.zero_point, Tensor):
        assert isinstance(other.grid, Affine)
        assert isinstance(other.grid.zero_point, Tensor)
        grid = replace(grid, zero_point=torch.where(rows, other.grid.zero_point, grid.zero_point))
    return Codes(torch.where(won[..., None], other.codes, one.codes), grid, one.row)


def _of_rows(of_channels: Tensor, row: Tensor, g: int) -> Tensor:
    """What is said ``[G, r]`` of channels, of the ``g`` rows of the grid."""
    wide = of_channels[..., None].expand_as(row).flatten()
    return wide.new_zeros(g).scatter_(0, row.flatten(), wide)


def _stacked(grid: Grid, starts: Sequence[Start]) -> Grid:
    """``grid`` once for each start, one below the other."""
    g = parameters_of(grid).shape[0]
    factors, shifts = (torch.tensor(each).repeat_interleave(g) for each in zip(*starts, strict=True))

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.repeat(len(starts), *[1] * (tensor.ndim - 1))

    wide = grid.map(repeated)
    if isinstance(grid, Codebook) and grid.scale is None:  # a table of one row is left alone by ``map``
        wide = Codebook(repeated(grid.table))
    wide = with_parameters(wide, parameters_of(wide) * factors[:, None])
    if isinstance(wide, Affine) and isinstance(wide.zero_point, Tensor):
        zero = (wide.zero_point.float() + shifts / wide.halves).clamp(0, wide.count - 1)
        wide = replace(wide, zero_point=zero.to(wide.zero_point.dtype))
    return wide
