"""Least squares on sorted rows: after one sort, any set of levels is judged in O(levels * log n) a row, exactly.

The middles between levels cut a sorted row into runs; the count and the sum of each run, two differences of prefix
sums, are all that the squared error and every refit need.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT_EVENTS = 1280
"""``best_scale`` is the global minimum where a row's length times the table's positive middles is at most this."""

DIRECT = 32
"""Weights of a row for each level up to which rounding them all is quicker than cutting the sorted row."""

PIECE = 2**19
"""Weights of a row that are cast to float64 at a time."""

COARSE, FINE, REFITS = 0.9, 8, 32
"""The scan of scales steps by the factor COARSE, then by its FINE-th root around the best; then REFITS at most."""

FEW = 4
"""Levels up to which every zero point is tried with a scan of its own."""

ROUNDS, FACTORS = 3, (1.0, 0.93, 1.07)
"""The search for zero points: rounds from coarse to fine moves, and the scales tried at each, times the best so far."""

MOST = 2**21
"""Weights that are worked on at a time where each row is tried at every zero point."""


Fit = tuple[Tensor, Tensor, Tensor]
"""Squared error, scale and zero point of each row: float64 ``[g]`` each."""


def zero_steps(count: int) -> int:
    """Steps of the zero point to a level: 2 up to 16 levels, where a close fit is worth more than a level on zero."""
    return 2 if count <= 16 else 1


@dataclass(frozen=True)
class SortedRows:
    """Rows whose weights are in ascending order, with what makes runs of them cheap to sum.

    Attributes:
        values: float32 ``[g, n]``, ascending along n.
        sums: float64 ``[g, n + 1]``, the sums of each row's first 0 .. n weights.
        square: float64 ``[g]``, the sums of squares.
    """

    values: Tensor
    sums: Tensor
    square: Tensor

    def cuts(self, middles: Tensor) -> Tensor:
        """Where ``middles [g, k - 1]`` cut each row into runs: int64 ``[g, k + 1]``, from 0 to n.

        A weight that equals a middle belongs to the lower run.
        """
        cuts = torch.searchsorted(self.values, middles.to(torch.float32).contiguous(), right=True)
        return F.pad(F.pad(cuts, (1, 0)), (0, 1), value=self.values.shape[1])

    def only(self, which: Tensor) -> "SortedRows":
        """These rows, int64 ``[h]`` in ascending order."""
        if len(which) == len(self.square):
            return self
        return SortedRows(self.values[which], self.sums[which], self.square[which])

    def runs(self, cuts: Tensor) -> tuple[Tensor, Tensor]:
        """Counts and sums of the runs between ``cuts [g, k + 1]``: float64 ``[g, k]`` each."""
        return cuts.diff(dim=1).double(), self.sums.gather(1, cuts).diff(dim=1)


def sort_rows(rows: Tensor) -> SortedRows:
    """Sort ``rows [g, n]`` float32, **in place** on a CPU, and sum them."""
    if rows.device.type == "cpu":
        rows.numpy().sort(axis=1)  # vectorised and without indices: six times faster than torch.sort
    else:
        rows = rows.sort(dim=1).values
    sums = rows.new_zeros(rows.shape[0], rows.shape[1] + 1, dtype=torch.float64)
    for start in range(0, rows.shape[1], PIECE):
        some = rows[:, start : start + PIECE]
        part = sums[:, start + 1 : start + 1 + some.shape[1]]
        torch.cumsum(some, 1, dtype=torch.float64, out=part)
        part += sums[:, start : start + 1]
    return SortedRows(rows, sums, power_sum(rows, 2))


def power_sum(rows: Tensor, power: int) -> Tensor:
    """``sum |w|**power`` of each row: float64 ``[g]``."""
    total = rows.new_zeros(rows.shape[0], dtype=torch.float64)
    scratch = rows.new_empty(rows.shape[0], min(PIECE, rows.shape[1]), dtype=torch.float64)
    for part in torch.split(rows, PIECE, 1):
        total += scratch[:, : part.shape[1]].copy_(part).abs_().pow_(power).sum(1)
    return total


def best_scale(rows: SortedRows, table: Tensor, rule: Tensor | None = None) -> Tensor:
    """The scale s >= 0 that minimises ``sum (w - s * nearest(w / s))**2`` for levels ``s * table``.

    Short rows (``EXACT_EVENTS``): the global minimum. Longer ones: the best of a scan of scales, each refitted to its
    own codes, from the largest down to where clipping alone costs more than the best so far; then of a finer scan
    around it, then of alternating refits. Never worse than the scale that puts the table's largest magnitude on the
    row's, nor than ``rule``.

    Args:
        rows: g rows.
        table: float64 ``[k]`` ascending.
        rule: float64 ``[g]``, a scale to try as well.

    Returns:
        float64 ``[g]``.
    """
    middles = (table[1:] + table[:-1]) / 2
    events = max(1, int((middles > 0).sum()), int((middles < 0).sum()))
    if rows.values.shape[1] * events <= EXACT_EVENTS:
        return _swept_scale(rows.values, table)
    return _scanned_scale(rows, table.expand(rows.values.shape[0], -1), rule=rule)[1]


def best_affine(rows: SortedRows, count: int, rules: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the levels ``scale * (code - zero_point)``, code 0 .. count - 1, for least squares.

    Zero points are multiples of 1/2 or integers (:func:`zero_steps`), in 0 .. count - 1. ``FEW`` levels, or no more
    weights than levels: a scan of scales at every zero point. Else a scan at that of the row's range; from the best so
    far a pattern search goes on, over zero points and over scales a little smaller and larger, each refitted. Never
    worse than that range itself, nor than one of ``rules``.

    Args:
        rows: g rows.
        count: number of levels.
        rules: scales and zero points to try as well, float64 ``[g]`` each.

    Returns:
        float64 ``[g]`` each.
    """
    unit = zero_steps(count)
    codes = torch.arange(count, dtype=torch.float64, device=rows.values.device)
    low, high = rows.values[:, 0].double().clamp(max=0), rows.values[:, -1].double().clamp(min=0)
    span = (high - low) / (count - 1)
    of_range = (-low / span.clamp_min(1e-300) * unit).round() / unit
    best: Fit = (*_error(rows, codes - of_range[:, None], span), of_range)
    for at, other in rules:
        best = _better(best, (*_error(rows, codes - other[:, None], at), other))
    if not bool(best[0].any()):
        return best[1:]
    if unit == 2 and (count <= FEW or rows.values.shape[1] <= count):
        return _better(best, _at_every_zero(rows, codes, best[0]))[1:]
    error, scale, zero = _better(best, (*_scanned_scale(rows, codes - of_range[:, None], best[0]), of_range))
    moves = [count / 2**k for k in range(3, 9) if count / 2**k * unit >= 1]
    moving = torch.ones_like(error, dtype=torch.bool)
    for _ in range(ROUNDS):
        if not bool(moving.any()):
            break
        at = moving.nonzero()[:, 0]
        before = error[at]
        error[at], scale[at], zero[at] = _one_round(rows.only(at), codes, moves, (before, scale[at], zero[at]))
        moving[at] = error[at] < before  # where nothing was better, nothing will be
    return scale, zero


def _one_round(rows: SortedRows, codes: Tensor, moves: Sequence[float], best: Fit) -> Fit:
    """``best`` after trying each move of the zero point once."""
    for move, way, factor in itertools.product(moves, (-1, 1), FACTORS):
        _, scale, zero = best
        other = (zero + way * move).clamp(0, len(codes) - 1)
        best = _better(best, (*_error(rows, codes - other[:, None], scale * factor), other))
    return best


def _better(one: Fit, other: Fit) -> Fit:
    """Row by row that of the smaller error, ``one`` where they are equal."""
    better = other[0] < one[0]
    error, scale, zero = (b.where(better, a) for a, b in zip(one, other, strict=True))
    return error, scale, zero


def _at_every_zero(rows: SortedRows, codes: Tensor, limit: Tensor) -> Fit:
    """The best of a scan at each multiple of 1/2.

    Nothing better than the errors ``limit`` need be found.
    """
    g, every = len(limit), torch.arange(2 * len(codes) - 1, dtype=torch.float64, device=limit.device) / 2
    if rows.values.numel() * len(every) > MOST and g > 1:
        cut = zip(*(t.chunk(2) for t in (rows.values, rows.sums, rows.square, limit)), strict=True)
        parts = [_at_every_zero(SortedRows(*some), codes, most) for *some, most in cut]
        error, scale, zero = (torch.cat(column) for column in zip(*parts, strict=True))
        return error, scale, zero
    many = SortedRows(*(t.repeat_interleave(len(every), 0) for t in (rows.values, rows.sums, rows.square)))
    tables = codes - every.repeat(g)[:, None]
    found, scales = _scanned_scale(many, tables, limit.repeat_interleave(len(every)))
    error, which = found.view(g, -1).min(1)
    return error, scales.view(g, -1).gather(1, which[:, None])[:, 0], every[which]


def _error(rows: SortedRows, table: Tensor, scale: Tensor, which: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Squared error and scale after refitting the scale to the codes that ``scale`` gives: float64 ``[g]`` each.

    Only rows in ``which``, bool ``[g]``, need be looked at; the error of one that is not may be infinite.
    """
    if table.shape[1] * DIRECT >= rows.values.shape[1] and _is_even(table):
        if which is None or int(which.sum()) * 4 > 3 * len(which):
            return _error_of_each(rows.values, rows.square, table, scale)
        error, refit = torch.full_like(scale, torch.inf), scale.clone()
        some = rows.values[which], rows.square[which], table[which], scale[which]
        error[which], refit[which] = _error_of_each(*some)
        return error, refit
    middles = (table[:, 1:] + table[:, :-1]) / 2
    counts, sums = rows.runs(rows.cuts(scale[:, None] * middles))
    cross, norm = (table * sums).sum(1), (table.square() * counts).sum(1)
    refit = torch.where(cross > 0, cross / norm, 0.0)
    return rows.square - refit * cross, refit


def _is_even(table: Tensor) -> bool:
    """Whether the levels of each row are one apart; rows differ by a shift at most."""
    return table.shape[1] > 1 and bool((table[0].diff() == 1).all())


def _error_of_each(rows: Tensor, square: Tensor, table: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`_error` by rounding every weight, for levels one apart: quicker where they are many and the rows short.

    From the residuals r of the codes q: the refit adds ``<r, q> / <q, q>`` to the scale and takes
    ``<r, q>**2 / <q, q>`` off the error, so that float32 sums do, however small the error is.
    """
    before = scale.clamp_min(1e-30).float()[:, None]
    low = table[:, :1].float()
    q = (rows / before).sub_(low).round_().clamp_(0, table.shape[1] - 1).add_(low)
    r = torch.addcmul(rows, q, before, value=-1)
    qq, qr, rr = (torch.linalg.vecdot(a, b).double() for a, b in ((q, q), (q, r), (r, r)))
    gain = torch.where(qq > 0, qr / qq, 0.0)
    refit = before[:, 0].double() + gain
    used = (refit > 0) & (qq > 0)
    return torch.where(used, (rr - gain * qr).clamp_min(0), square), torch.where(used, refit, 0.0)


def _scanned_scale(
    rows: SortedRows, table: Tensor, limit: Tensor | None = None, rule: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Squared error and scale, float64 ``[g]`` each, as :func:`best_scale` says for long rows; ``table [g, k]``.

    Nothing better than the errors ``limit`` need be found.
    """
    low, high = table[:, :1], table[:, -1:]
    smallest, largest = rows.values[:, 0].double(), rows.values[:, -1].double()
    most = torch.maximum(-smallest, largest) / torch.maximum(-low, high)[:, 0]
    start = most
    for reach, extreme in ((largest, high[:, 0]), (-smallest, -low[:, 0])):
        start = torch.maximum(start, torch.where((extreme > 0) & (reach > 0), reach / extreme, 0.0))

    error, scale, probe = rows.square, torch.zeros_like(start), start

    def consider(at: Tensor, which: Tensor | None = None) -> None:
        nonlocal error, scale, probe
        found, refit = _error(rows, table, at, which)
        better = found < error if which is None else (found < error) & which
        error, scale, probe = found.where(better, error), refit.where(better, scale), at.where(better, probe)

    for at in (most,) if rule is None else (most, rule):
        consider(at)
    open_ = torch.ones_like(start, dtype=torch.bool)  # no row is searched for longer because another one is
    for step in range(64):
        at = start * COARSE**step
        consider(at, open_)
        counts, sums = rows.runs(rows.cuts(at[:, None] * torch.cat([low, high], 1)))
        below, above = at * low[:, 0] * counts[:, 0] - sums[:, 0], sums[:, 2] - at * high[:, 0] * counts[:, 2]
        clipped = below.square() / counts[:, 0].clamp_min(1) + above.square() / counts[:, 2].clamp_min(1)
        # clipping alone costs at least this, here and at every smaller scale
        open_ &= clipped < (error if limit is None else error.minimum(limit))
        if not bool(open_.any()):
            break
    around = probe
    for step in range(1 - FINE, FINE):
        if step:
            consider(around * COARSE ** (step / FINE))
    moving = torch.ones_like(open_)
    for _ in range(REFITS):
        before = error
        consider(scale, moving)
        moving = error < before
        if not bool(moving.any()):
            break
    return error, scale


def _swept_scale(values: Tensor, table: Tensor) -> Tensor:
    """The best of all choices of codes that any scale can produce, found in one sweep: the global minimum.

    With t = 1/s growing from 0, a weight w moves on to its next level when t*w passes a middle between levels. In the
    order of these events every choice of codes q comes up, and with it the best scale for it, <w, q>/<q, q>, which
    lowers the squared error by <w, q>**2/<q, q>. For the table {-1, 0, 1} this is the exact ternary fit.
    """
    if values.numel() * table.numel() > 2**20 and values.shape[0] > 1:
        return torch.cat([_swept_scale(half, table) for half in values.chunk(2)])
    weights = values.double()
    times, crosses, norms = [], [], []
    cross, norm = weights.new_zeros(values.shape[0], 1), weights.new_zeros(values.shape[0], 1)
    for own, levels, sign in ((values >= 0, table, 1.0), (values < 0, -table.flip(0), -1.0)):
        size = torch.where(own, weights * sign, 0.0)[:, :, None]
        middles = (levels[1:] + levels[:-1]) / 2
        ahead = middles > 0
        first, before, after = levels[int((~ahead).sum())], levels[:-1][ahead], levels[1:][ahead]
        cross = cross + first * size.sum(1)
        norm = norm + first.square() * own.sum(1, keepdim=True)
        times.append((middles[ahead] / size).flatten(1))
        crosses.append((size * (after - before)).flatten(1))
        norms.append(((size > 0) * (after.square() - before.square())).flatten(1))
    order = _order(torch.cat(times, 1))
    cross = torch.cat([cross, torch.cat(crosses, 1).gather(1, order)], 1).cumsum(1)
    norm = torch.cat([norm, torch.cat(norms, 1).gather(1, order)], 1).cumsum(1)
    refit = torch.where(cross > 0, cross / norm, 0.0)
    return refit.gather(1, (refit * cross).argmax(1, keepdim=True))[:, 0]


def _order(keys: Tensor) -> Tensor:
    """What sorts ``keys [g, n]`` along n, not stable."""
    if keys.device.type == "cpu":
        return torch.from_numpy(keys.numpy().argsort(axis=1))  # vectorised: three times faster than torch.argsort
    return keys.argsort(dim=1)
