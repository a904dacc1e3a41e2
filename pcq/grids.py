"""A grid is the finite set Q of levels that each row's weights may take: ``Grid = Affine | Codebook``.

Both are frozen records of tensors with ``levels() [g, k]`` ascending, ``encode(rows [g, n]) -> codes`` (uint8, the
index of the nearest level) and ``decode(codes) -> rows`` (float32). They are the only two forms that are stored.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pcq.threads import each


@dataclass(frozen=True)
class Affine:
    """Evenly spaced levels ``scale * (code - zero_point)``, ``code = 0 .. count - 1``.

    Binary is ``count=2, zero_point=0.5``; ternary is ``count=3, zero_point=1``.

    Attributes:
        scale: float32 ``[g]``, >= 0; a row of scale 0 has all its levels at 0.
        zero_point: one number for all rows (a multiple of 1/2), or one for each row ``[g]``: integers as uint8,
            multiples of 1/2 as float16.
        count: number of levels, 2 to 256.
    """

    scale: Tensor
    zero_point: float | Tensor
    count: int

    def __post_init__(self) -> None:
        assert 2 <= self.count <= 256, self.count
        assert self.scale.ndim == 1, self.scale.shape
        assert self.scale.dtype == torch.float32, self.scale.dtype
        if isinstance(self.zero_point, Tensor):
            assert self.zero_point.dtype in (torch.uint8, torch.float16), self.zero_point.dtype
            assert self.zero_point.shape == self.scale.shape, (self.zero_point.shape, self.scale.shape)

    @property
    def g(self) -> int:
        return self.scale.numel()

    @cached_property
    def positive(self) -> bool:
        """Whether no row has all its levels at 0."""
        return bool((self.scale > 0).all())

    @property
    def halves(self) -> int:
        """2 where zero may lie between two codes, else 1: ``halves * (code - zero_point)`` are integers."""
        if isinstance(self.zero_point, Tensor):
            return 2 if self.zero_point.is_floating_point() else 1
        return 1 if self.zero_point == int(self.zero_point) else 2

    def zeros(self) -> Tensor:
        """Each row's zero point: float32 ``[g, 1]``."""
        if isinstance(self.zero_point, Tensor):
            return self.zero_point.float()[:, None]
        return self.scale.new_full((1, 1), self.zero_point).expand(self.g, 1)

    def levels(self) -> Tensor:
        """float32 ``[g, count]``, ascending."""
        codes = torch.arange(self.count, dtype=torch.uint8, device=self.scale.device)
        return self.decode(codes.expand(self.g, -1))

    def encode(self, rows: Tensor) -> Tensor:
        """Nearest level of each weight: ``[g, n] -> uint8 [g, n]``. Ties go to the even code."""
        step, zero = torch.where(self.scale > 0, self.scale, 1.0)[:, None], self.zeros()
        codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)

        def work(tile: tuple[slice, slice]) -> None:
            some, _ = tile
            codes[tile] = (rows[tile] / step[some]).add_(zero[some]).round_().clamp_(0, self.count - 1)

        each(work, _tiles(rows.shape), rows.device)
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """uint8 ``[g, n] -> float32 [g, n]``."""
        return codes.to(torch.float32).sub_(self.zeros()).mul_(self.scale[:, None])

    def map(self, change: Callable[[Tensor], Tensor]) -> "Affine":
        """The grid with ``change`` applied to every per-row tensor (select, reorder or repeat rows)."""
        zero = change(self.zero_point) if isinstance(self.zero_point, Tensor) else self.zero_point
        return replace(self, scale=change(self.scale), zero_point=zero)


@dataclass(frozen=True)
class Codebook:
    """Listed levels.

    Attributes:
        table: float32 ``[g, k]``, or ``[1, k]`` shared by all rows; ascending along k.
        scale: float32 ``[g]``, >= 0: the row's levels are ``scale * table``; None: they are ``table``.
    """

    table: Tensor
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.table.ndim == 2, self.table.shape
        assert self.table.dtype == torch.float32, self.table.dtype
        assert 2 <= self.count <= 256, self.count
        if self.scale is not None:
            assert self.scale.ndim == 1, self.scale.shape
            assert self.scale.dtype == torch.float32, self.scale.dtype
            assert self.table.shape[0] in (1, self.scale.numel()), self

    @property
    def count(self) -> int:
        return self.table.shape[1]

    @property
    def g(self) -> int:
        """Number of rows the grid is for; 1 also when one unscaled table serves any number of rows."""
        return self.table.shape[0] if self.scale is None else self.scale.numel()

    def levels(self) -> Tensor:
        """float32 ``[g, k]``, ascending."""
        return self.table if self.scale is None else self.scale[:, None] * self.table

    def encode(self, rows: Tensor) -> Tensor:
        """Nearest level of each weight: ``[g, n] -> uint8 [g, n]``. Ties go to the lower level."""
        levels = self.levels()
        lower, upper = levels[:, :-1], levels[:, 1:]
        middles = ((lower.double() + upper.double()) / 2).float()
        middles = torch.where(middles < upper, middles, lower).contiguous()  # neighbouring floats have no middle
        codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)

        def work(tile: tuple[slice, slice]) -> None:
            some, _ = tile
            if middles.shape[0] == 1:
                codes[tile] = torch.bucketize(rows[tile].contiguous(), middles[0], out_int32=True)
            else:
                codes[tile] = torch.searchsorted(middles[some], rows[tile].contiguous(), out_int32=True)

        each(work, _tiles(rows.shape), rows.device)
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """uint8 ``[g, n] -> float32 [g, n]``."""
        levels = self.levels()
        rows = levels.new_empty(codes.shape)

        def work(tile: tuple[slice, slice]) -> None:
            some, _ = tile
            at = codes[tile].long()
            rows[tile] = levels[0][at] if levels.shape[0] == 1 else levels[some].gather(1, at)

        each(work, _tiles(codes.shape), codes.device)
        return rows

    def map(self, change: Callable[[Tensor], Tensor]) -> "Codebook":
        """The grid with ``change`` applied to every per-row tensor (select, reorder or repeat rows).

        A table of one row serves any number of rows and stays as it is.
        """
        table = self.table if self.table.shape[0] == 1 else change(self.table)
        return Codebook(table, None if self.scale is None else change(self.scale))


Grid = Affine | Codebook


def _tiles(shape: tuple[int, ...]) -> list[tuple[slice, slice]]:
    """Cut ``[g, n]`` into pieces whose temporaries stay small."""
    some, part = max(1, _TILE // max(1, shape[1])), min(_TILE, max(1, shape[1]))
    return [
        (slice(row, row + some), slice(column, column + part))
        for row in range(0, shape[0], some)
        for column in range(0, shape[1], part)
    ]


_TILE = 2**18


def interleave(main: Grid, tail: Grid, channels: int) -> Grid:
    """Join the grids of each channel's full groups (``main``, channel by channel) and of its shorter last group.

    ``main`` has ``channels * m`` rows, ``tail`` has ``channels``; the result has ``channels * (m + 1)``. Both come from
    one quantizer, and not from one whose grid is a single unscaled table for all rows.
    """

    def join(a: Tensor, b: Tensor) -> Tensor:
        rest = a.shape[1:]
        return torch.cat([a.reshape(channels, -1, *rest), b.reshape(channels, 1, *rest)], 1).reshape(-1, *rest)

    if isinstance(main, Affine) and isinstance(tail, Affine):
        assert main.count == tail.count, (main, tail)
        if isinstance(main.zero_point, Tensor) and isinstance(tail.zero_point, Tensor):
            return Affine(join(main.scale, tail.scale), join(main.zero_point, tail.zero_point), main.count)
        assert main.zero_point == tail.zero_point, (main, tail)
        return Affine(join(main.scale, tail.scale), main.zero_point, main.count)
    assert isinstance(main, Codebook), main
    assert isinstance(tail, Codebook), tail
    assert (main.scale is None) == (tail.scale is None), (main, tail)
    if main.scale is None or tail.scale is None:
        return Codebook(join(main.table, tail.table))
    shared = main.table.shape[0] == tail.table.shape[0] == 1
    assert not shared or torch.equal(main.table, tail.table), (main, tail)
    return Codebook(main.table if shared else join(main.table, tail.table), join(main.scale, tail.scale))
