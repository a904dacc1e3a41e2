"""Proximal quantizers: monotone maps that pull weights towards the levels, from the identity to the nearest level.

A map R -> R is the proximal map of some function iff it is monotone, compact-valued and has a closed graph
(arXiv 2503.15748, section 2.2). All maps here are members of the two-parameter family L of arXiv 2110.13220, eq. (13).
On a gap between neighbouring levels with middle p and half width h, let ``y = (w - p) / h`` in [-1, 1], and let
``r = min(1, rho / h)`` and ``v = min(1, varrho / h)`` be the horizontal and the vertical shift in half gaps. Then::

    L(w) = p + h * clamp(slope * y + v * sign(y), -1, 1),    slope = (1 - v) / (1 - r)

``r = v = 0`` is the identity, ``r = 1`` or ``v = 1`` the nearest level. Outside of the levels L is constant, or goes on
as around the last level: at a distance d of it the value is at ``slope * max(0, d - rho)``.
A prox is a frozen dataclass that turns a strength in [0, 1] into :class:`Shifts`; :func:`proximal` is the one map.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pcq.errors import PcqError
from pcq.gpu import prox as prox_gpu
from pcq.grids import Affine, Grid

CHUNK = 1 << 18
"""Weights worked on at a time on a CPU, so that the temporaries stay in its cache."""

FEW = 8
"""Codebooks of up to this many levels are mapped gap by gap, larger ones by searching each weight's gap."""

UNITS = ("gap", "row", "weight")
"""Of shifts, in the kernel's order."""


@dataclass(frozen=True)
class Shifts:
    """One member of the family L.

    Attributes:
        rho: horizontal shift, >= 0: how far from a level weights snap onto it.
        varrho: vertical shift, >= 0: how far values keep from the middle of a gap, half of the jump there.
        unit: what the shifts are measured in: each gap's own half width (all gaps harden together), the row's widest
            half gap (a shift common to the row: narrow gaps harden first), or weight units.
        outside: slope of the map outside of the levels, where it is further than rho from the last one; 0 clips.
    """

    rho: float
    varrho: float
    unit: Literal["gap", "row", "weight"] = "gap"
    outside: float = 0.0

    def __post_init__(self) -> None:
        assert min(self.rho, self.varrho, self.outside) >= 0, self

    @property
    def identity(self) -> bool:
        """Whether it moves no weight within the levels."""
        return self.rho == self.varrho == 0

    @property
    def hard(self) -> bool:
        """Whether it is known, without looking at any level, to take those within to the nearest level."""
        return self.unit != "weight" and max(self.rho, self.varrho) >= 1

    @property
    def half_gaps(self) -> tuple[float, float, float]:
        """r, v and the slope where all gaps are alike; the slope of the nearest level is 0."""
        r, v = min(1.0, self.rho), min(1.0, self.varrho)
        return r, v, 0.0 if max(r, v) == 1 else (1 - v) / (1 - r)

    @property
    def slope(self) -> float:
        """That of evenly spaced levels, in float32: none by which half a step, shrunk by r, passes its middle."""
        r, _, slope = self.half_gaps
        rest = np.float32(0.5) - np.float32(r / 2)
        if slope <= 1 or not rest:
            return slope
        rounded = np.float32(min(slope, 0.5 / float(rest)))
        return float(rounded if float(rounded) * float(rest) <= 0.5 else np.nextafter(rounded, np.float32(0)))

    @property
    def goes_on(self) -> bool:
        """Whether the map of the outermost half gap, not clipped, is that outside of the levels too."""
        return self.outside == self.half_gaps[2] and self.rho <= self.varrho

    @property
    def numbers(self) -> tuple[float | int, ...]:
        """What the kernel takes: ``Map`` of ``prox.cu``, in its order."""
        r, v, _ = self.half_gaps
        hard = max(r, v) == 1
        flags = (hard, v == 0 and not hard, self.goes_on, self.identity, UNITS.index(self.unit))
        return self.slope, r / 2, self.rho, self.varrho, self.outside, *flags


def _unit(relative: bool) -> Literal["gap", "row"]:
    return "gap" if relative else "row"


@dataclass(frozen=True)
class Hard:
    """The nearest level at every strength: BinaryConnect's projector."""

    def shifts(self, strength: float) -> Shifts:
        return Shifts(1.0, 1.0)


@dataclass(frozen=True)
class ProxQuant:
    """Soft threshold towards the levels (rho = varrho), the prox of the L1 distance to them (arXiv 1810.00861).

    As published it does not clip weights outside of the levels, but below strength 1 only draws them nearer.
    """

    relative: bool = True

    def shifts(self, strength: float) -> Shifts:
        return L(clip=False, relative=self.relative).shifts(strength)


@dataclass(frozen=True)
class BinaryRelax:
    """``(e * nearest(w) + w) / (1 + e)`` with ``strength = e / (1 + e)`` (arXiv 1801.06313): rho = 0.

    As published it does not clip weights outside of the levels; ``clip`` does.
    """

    clip: bool = False
    relative: bool = True

    def shifts(self, strength: float) -> Shifts:
        return L(0.0, 1.0, self.relative, self.clip).shifts(strength)


@dataclass(frozen=True)
class Parq:
    """Ramps of inverse slope ``1 - strength`` between flat levels, without a jump (arXiv 2503.15748): varrho = 0."""

    relative: bool = True

    def shifts(self, strength: float) -> Shifts:
        return Shifts(strength, 0.0, _unit(self.relative))


@dataclass(frozen=True)
class L:
    """The family itself: both shifts grow with the strength, in the proportion ``rho : varrho``, the larger being 1.

    ``clip`` takes weights outside of the levels onto the last one; without, the map goes on there.
    """

    rho: float = 1.0
    varrho: float = 1.0
    relative: bool = True
    clip: bool = True

    def __post_init__(self) -> None:
        if not (min(self.rho, self.varrho) >= 0 and max(self.rho, self.varrho) == 1):
            raise PcqError(
                f"the shifts of L are rho={self.rho}, varrho={self.varrho}",
                allowed="two numbers from 0 to 1, the larger of them 1",
                todo="Divide both by the larger one: the strength does the rest.",
            )
        if not self.clip and self.rho > self.varrho:
            raise PcqError(
                f"L with the shifts rho={self.rho}, varrho={self.varrho} would push weights away outside of the levels",
                allowed="clip=True, or rho <= varrho",
            )

    def shifts(self, strength: float) -> Shifts:
        shifts = Shifts(strength * self.rho, strength * self.varrho, _unit(self.relative))
        return shifts if self.clip else replace(shifts, outside=shifts.half_gaps[2])


Prox = Hard | ProxQuant | BinaryRelax | Parq | L


@torch.no_grad()
def proximal(rows: Tensor, levels: Tensor | Grid, shifts: Shifts, *, out: Tensor | None = None) -> Tensor:
    """Map every weight: ``rows [g, n]`` -> ``[g, n]``, written to ``out`` where given (it may be ``rows``).

    ``levels`` is a grid of g rows or an ascending tensor ``[g, k]`` or ``[1, k]``; repeated levels and rows of equal
    levels are fine. In the exact middle of a gap the value is one of the two ends of the jump there. At strength 1
    the result is ``grid.decode(grid.encode(rows))``; at strength 0 it is the clipped input.
    On a CPU evenly spaced levels cost three to four copies of ``rows``, a few listed levels one to two a gap; on a GPU
    all is one kernel (:mod:`pcq.gpu.prox`).
    """
    assert rows.ndim == 2, rows.shape
    out = torch.empty_like(rows) if out is None else out
    overhang = shifts.outside > 0
    if shifts.identity and shifts.outside == 1:
        return out.copy_(rows)
    if prox_gpu.fits(rows, out):
        prox_gpu.Batch([(rows, levels, out)], shifts.unit == "weight")(*shifts.numbers)
        return out
    if isinstance(levels, Affine) and shifts.unit != "weight" and not shifts.identity:
        assert levels.g in (1, rows.shape[0]), (rows.shape, levels.g)
        # Without clipping, the map of the outermost half gap goes on by itself, if each row has a gap.
        goes_on = shifts.goes_on and levels.positive
        overhang = overhang and not goes_on
        kernel = _even(levels, shifts, clipped=not goes_on)
        table = levels.levels() if overhang else None
    else:
        table = levels if isinstance(levels, Tensor) else levels.levels()
        assert table.shape[0] in (1, rows.shape[0]), (rows.shape, table.shape)
        if shifts.identity:
            kernel = _clip(table)
        elif shifts.hard:
            kernel = _nearest(table)
        else:
            kernel = _soft(table, shifts)
    in_place = out.data_ptr() == rows.data_ptr()
    buffered = in_place and (overhang or not isinstance(levels, Affine))
    beyond = _beyond(table, shifts) if overhang and table is not None else None
    size = min(CHUNK, rows.numel()) if rows.device.type == "cpu" else rows.numel()
    scratch = rows.new_empty(3, size)
    for block in blocks(rows, size):
        weights = rows[block]
        one, two, three = (buffer[: weights.numel()].view_as(weights) for buffer in scratch)
        mapped = kernel(weights, block[0], one if buffered else out[block], two)
        if beyond is not None:
            mapped.add_(beyond(weights, block[0], three, two), alpha=shifts.outside)
        if buffered:
            weights.copy_(mapped)
    return out


Kernel = Callable[[Tensor, slice, Tensor, Tensor], Tensor]
"""A block of weights, the rows it is from, two buffers of its shape -> the first buffer, holding the mapped values."""


def blocks(rows: Tensor, size: int) -> Iterator[tuple[slice, slice]]:
    """Row and column slices of at most ``size`` weights."""
    g, n = rows.shape
    height, width = max(1, size // max(1, n)), max(1, min(n, size))
    for top in range(0, g, height):
        for left in range(0, n, width):
            yield slice(top, top + height), slice(left, left + width)


def _of(table: Tensor, which: slice) -> Tensor:
    """The rows ``which`` of a table that may be shared by all rows."""
    return table if table.shape[0] == 1 else table[which]


def _clip(table: Tensor) -> Kernel:
    low, high = table[:, :1], table[:, -1:]

    def kernel(weights: Tensor, which: slice, result: Tensor, scratch: Tensor) -> Tensor:
        torch.maximum(weights, _of(low, which), out=result)
        return torch.minimum(result, _of(high, which), out=result)

    return kernel


def _beyond(table: Tensor, shifts: Shifts) -> Kernel:
    """How much further than rho from the last level the weights outside of the levels are; 0 for the others."""
    clip, half = _clip(table), (table[:, 1:] - table[:, :-1]) / 2
    unit = half.amax(1, keepdim=True) if shifts.unit == "row" else torch.ones_like(half[:, :1])
    low, high = (shifts.rho * (half[:, end] if shifts.unit == "gap" else unit) for end in (slice(1), slice(-1, None)))

    def kernel(weights: Tensor, which: slice, result: Tensor, scratch: Tensor) -> Tensor:
        rest = torch.sub(weights, clip(weights, which, result, scratch), out=result)
        if shifts.rho == 0:
            return rest
        inside = torch.maximum(rest, -_of(low, which), out=scratch)
        return rest.sub_(torch.minimum(inside, _of(high, which), out=scratch))

    return kernel


def _even(grid: Affine, shifts: Shifts, clipped: bool) -> Kernel:
    """In units of the step, L is the nearest code plus the shrunk rest: one scalar function for all rows and gaps.

    Codes are counted from the zero point where it is a multiple of 1/2, which saves moving there and back. Where it is
    no whole number, a map without jumps is rather taken as the nearest middle of a gap plus a ramp, which needs no
    shrinking.
    Monotone to the last bit: every operation is, and the rest never passes 1/2.
    """
    (r, v, _), slope = shifts.half_gaps, shifts.slope
    hard, zero = max(r, v) == 1, grid.zero_point
    step = torch.where(grid.scale > 0, grid.scale, 1.0)[:, None]
    scale = grid.scale[:, None]
    ramps = v == 0 and not hard and (isinstance(zero, Tensor) or zero % 1 != 0)
    aside = 0.5 if ramps else 0.0
    moved, low = True, -aside
    origin = zero.float()[:, None] - aside if isinstance(zero, Tensor) else zero - aside
    halves = False
    if not (hard or isinstance(zero, Tensor) or (zero - aside) % 0.5):
        moved, low, halves = False, -zero, (zero - aside) % 1 != 0
    high = low + grid.count - 1
    slopes_1 = not (hard or ramps) and np.float32(slope) == 1  # then quicker

    def shift(x: Tensor, which: slice, sign: int) -> Tensor:
        return x.add_(_of(origin, which) if isinstance(origin, Tensor) else origin, alpha=sign) if moved else x

    def kernel(weights: Tensor, which: slice, result: Tensor, scratch: Tensor) -> Tensor:
        rest = shift(torch.div(weights, _of(step, which), out=result if hard else scratch), which, 1)
        if clipped:
            rest.clamp_(low, high)
        if halves:
            code = torch.floor(rest, out=result).add_(0.5)
        else:
            code = rest.round_() if hard else torch.round(rest, out=result)
        if not clipped:
            code.clamp_(low, high)
        if ramps:
            code.add_(rest.sub_(code).mul_(slope).clamp_(-0.5, 0.5))
        elif slopes_1:
            torch.sub(rest, code, out=code).clamp_(-r / 2, r / 2)
            torch.sub(rest, code, out=code)
        elif not hard:
            rest.sub_(code)
            if r > 0:
                torch.ops.aten.softshrink.out(rest, r / 2, out=rest)
            code.add_(rest, alpha=slope)
        return shift(code, which, -1).mul_(_of(scale, which))

    return kernel


def _gaps(table: Tensor, shifts: Shifts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each gap's middle, half width, steepness (slope / half width) and relative jump v, all ``[g, k - 1]``."""
    middle, half = (table[:, 1:] + table[:, :-1]) / 2, (table[:, 1:] - table[:, :-1]) / 2
    unit = half if shifts.unit == "gap" else half.amax(1, keepdim=True) if shifts.unit == "row" else half.new_ones(1, 1)
    wide = half > torch.finfo(half.dtype).tiny
    safe = torch.where(wide, half, 1.0)
    r = torch.where(wide, shifts.rho * unit / safe, 1.0).clamp(max=1)
    v = torch.where(wide, shifts.varrho * unit / safe, 1.0).clamp(max=1)
    hard = (r >= 1) | (v >= 1)
    slope = torch.where(hard, 0.0, (1 - v) / torch.where(hard, 1.0, 1 - r))
    return middle, half, slope / safe, torch.where(hard, 1.0, v)


def _soft(table: Tensor, shifts: Shifts) -> Kernel:
    """What is quickest for as many levels and such a map."""
    if table.shape[1] > FEW:
        return _search(table, shifts)
    if shifts.unit == "gap" and shifts.varrho == 0:
        return _lines(table, shifts.half_gaps[2])
    return _ramps(table, shifts)


def _ramps(table: Tensor, shifts: Shifts) -> Kernel:
    """The sum over the gaps of L's rise in each, starting from the middle of all levels."""
    middle, half, steep, jump = _gaps(table, shifts)
    centre = (table[:, :1] + table[:, -1:]) / 2

    def kernel(weights: Tensor, which: slice, result: Tensor, scratch: Tensor) -> Tensor:
        above = torch.empty_like(scratch)
        for gap in range(half.shape[1]):
            p, h, s, v = (_of(column[:, gap : gap + 1], which) for column in (middle, half, steep, jump))
            y = torch.sub(weights, p, out=scratch if gap else result).mul_(s)
            y.sub_(v).addcmul_(torch.gt(weights, p, out=above), 2 * v).clamp_(-1, 1)
            if gap:
                result.addcmul_(y, h)
            else:
                y.mul_(h).add_(_of(centre, which))
        return result

    return kernel


def _lines(table: Tensor, slope: float) -> Kernel:
    """As :func:`_ramps` for L without jumps, in units of the gap: all rises have one slope in weights too.

    The rise in a gap is a line through its middle, cut at the level above; of all lines so cut, the highest counts, for
    those of higher gaps run lower. Every operation is monotone.
    """
    lowest, above = table[:, :1], table[:, 1:]
    start = (above + table[:, :-1]) / 2 * (1 - slope)

    def kernel(weights: Tensor, which: slice, result: Tensor, scratch: Tensor) -> Tensor:
        for gap in range(above.shape[1]):
            begin, top = (_of(column[:, gap : gap + 1], which) for column in (start, above))
            line = torch.add(begin, weights, alpha=slope, out=scratch if gap else result)
            torch.minimum(line, top, out=line)
            torch.maximum(result, line if gap else _of(lowest, which), out=result)
        return result

    return kernel


def _search(table: Tensor, shifts: Shifts) -> Kernel:
    """As :func:`_ramps`, with the gap of each weight looked up."""
    gaps = _gaps(table, shifts)

    def kernel(weights: Tensor, which: slice, result: Tensor, scratch: Tensor) -> Tensor:
        inner = _of(table, which)[:, 1:-1].expand(weights.shape[0], -1).contiguous()
        gap = torch.searchsorted(inner, weights.contiguous())
        p, h, s, v = (_of(column, which).expand(weights.shape[0], -1).gather(1, gap) for column in gaps)
        y = torch.sub(weights, p, out=scratch).mul_(s).add_(torch.where(weights > p, v, -v))
        return torch.add(p, y.clamp_(-1, 1).mul_(h), out=result)

    return kernel


def _nearest(table: Tensor) -> Kernel:
    """The nearest level, the lower one of two; bit for bit a level, and the one :meth:`Codebook.encode` takes."""
    lower, upper = table[:, :-1], table[:, 1:]
    middle = ((lower.double() + upper.double()) / 2).to(table.dtype)
    middle = torch.where(middle < upper, middle, lower)
    far = torch.finfo(table.dtype).max / 2

    def few(weights: Tensor, which: slice, result: Tensor, scratch: Tensor) -> Tensor:
        levels, middles = _of(table, which), _of(middle, which)
        for gap in range(middle.shape[1]):
            # The level above the gap for weights above its middle, for others far below all levels.
            torch.le(weights, middles[:, gap : gap + 1], out=scratch)
            torch.add(levels[:, gap + 1 : gap + 2], scratch, alpha=-far, out=scratch)
            torch.maximum(result if gap else levels[:, :1], scratch, out=result)
        return result

    def many(weights: Tensor, which: slice, result: Tensor, scratch: Tensor) -> Tensor:
        middles = _of(middle, which).expand(weights.shape[0], -1).contiguous()
        index = torch.searchsorted(middles, weights.contiguous())
        return torch.gather(_of(table, which).expand(weights.shape[0], -1), 1, index, out=result)

    return few if table.shape[1] <= FEW else many
