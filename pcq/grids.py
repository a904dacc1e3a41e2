"""A grid is the finite set Q of levels that each row's weights may take: ``Grid = Affine | Codebook``.

Both are frozen records of tensors with ``levels() [g, k]`` ascending, ``encode(rows [g, n]) -> codes`` (uint8, the
index of the nearest level) and ``decode(codes) -> rows`` (float32). They are the only two forms that are stored.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Affine:
    """Evenly spaced levels ``scale * (code - zero_point)``, ``code = 0 .. count - 1``.

    Binary is ``count=2, zero_point=0.5``; ternary is ``count=3, zero_point=1``.

    Attributes:
        scale: float32 ``[g]``, >= 0; a row of scale 0 has all its levels at 0.
        zero_point: one number for all rows (a multiple of 1/2), or uint8 ``[g]``.
        count: number of levels, 2 to 256.
    """

    scale: Tensor
    zero_point: float | Tensor
    count: int

    def __post_init__(self) -> None:
        assert 2 <= self.count <= 256 and self.scale.ndim == 1 and self.scale.dtype == torch.float32, self
        if isinstance(self.zero_point, Tensor):
            assert self.zero_point.dtype == torch.uint8 and self.zero_point.shape == self.scale.shape, self

    @property
    def g(self) -> int:
        return self.scale.numel()

    def _zero(self) -> float | Tensor:
        return self.zero_point.float()[:, None] if isinstance(self.zero_point, Tensor) else self.zero_point

    def levels(self) -> Tensor:
        """float32 ``[g, count]``, ascending."""
        return self.decode(torch.arange(self.count, device=self.scale.device).expand(self.g, -1))

    def encode(self, rows: Tensor) -> Tensor:
        """Nearest level of each weight: ``[g, n] -> uint8 [g, n]``. Ties go to the even code."""
        step = torch.where(self.scale > 0, self.scale, 1.0)[:, None]
        return (rows / step).add_(self._zero()).round_().clamp_(0, self.count - 1).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """uint8 ``[g, n] -> float32 [g, n]``."""
        return codes.to(torch.float32).sub_(self._zero()).mul_(self.scale[:, None])

    def map(self, change: Callable[[Tensor], Tensor]) -> "Affine":
        """The grid with ``change`` applied to every per-row tensor (select, reorder or move rows)."""
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
        assert self.table.ndim == 2 and self.table.dtype == torch.float32 and 2 <= self.count <= 256, self
        if self.scale is not None:
            assert self.scale.dtype == torch.float32 and self.scale.ndim == 1, self
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
        middles = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
        if middles.shape[0] == 1:
            return torch.bucketize(rows.contiguous(), middles[0], out_int32=True).to(torch.uint8)
        return torch.searchsorted(middles, rows.contiguous(), out_int32=True).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """uint8 ``[g, n] -> float32 [g, n]``."""
        levels = self.levels()
        if levels.shape[0] == 1:
            return levels[0][codes.long()]
        return torch.gather(levels, 1, codes.long())

    def map(self, change: Callable[[Tensor], Tensor]) -> "Codebook":
        """The grid with ``change`` applied to every per-row tensor (select, reorder or move rows)."""
        table = self.table if self.table.shape[0] == 1 and self.g != 1 else change(self.table)
        return Codebook(table, None if self.scale is None else change(self.scale))


Grid = Affine | Codebook


def interleave(main: Grid, tail: Grid, channels: int) -> Grid:
    """Join the grids of each channel's full groups (``main``, channel by channel) and of its shorter last group.

    ``main`` has ``channels * m`` rows, ``tail`` has ``channels``; the result has ``channels * (m + 1)``.
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
    assert isinstance(main, Codebook) and isinstance(tail, Codebook), (main, tail)
    shared = main.table.shape[0] == tail.table.shape[0] == 1 and torch.equal(main.table, tail.table)
    table = main.table if shared and (main.scale is not None or main.g == 1) else join(main.table, tail.table)
    if main.scale is None or tail.scale is None:
        return Codebook(table)
    return Codebook(table, join(main.scale, tail.scale))
