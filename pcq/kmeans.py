"""Optimal one-dimensional k-means: the k levels that minimise ``sum (w - nearest level)**2``.

In one dimension the clusters are runs of the sorted row, so dynamic programming over where the runs end finds the
global optimum: with ``best[q][j]`` the most that q runs can explain of the first j points,
``best[q][j] = max over i < j of best[q - 1][i] + (S_j - S_i)**2 / (C_j - C_i)``, S and C the prefix sums and counts
(the squared error is the sum of squares less this). Every step over i and j is one vectorised operation for many rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pcq.leastsquares import SortedRows

EXACT_POINTS = 256
"""Rows of at most this many weights, or distinct weights, get the global optimum (the latter for k up to 64)."""

_SPAN = 32  # bins that one of more than 64 levels may take on a longer row; the average is 4
_CELLS = 2**18  # float64 numbers in the largest temporary
_POLISH = 100  # Lloyd steps at most


def kmeans(rows: SortedRows, k: int) -> Tensor:
    """The k levels of each row, ascending; where a row has fewer distinct weights, the last levels repeat.

    Rows of at most ``EXACT_POINTS`` weights: the global optimum. On longer rows the runs may first end only at the
    edges of 256 bins (4k for k > 64), for which the dynamic programme is again exact; half of the bins' edges follow
    the weights' ranks, half the cube root of their density, as optimal levels do; a row with no more distinct weights
    than bins gets one bin for each. Lloyd's steps on the weights themselves then move the ends to where they belong, so
    that a longer row's result is a local optimum reached from the histogram's global one.

    Returns:
        float64 ``[g, k]``.
    """
    g, n = rows.values.shape
    if n <= k:
        return F.pad(rows.values[:, None].double(), (0, k - n), mode="replicate")[:, 0]
    if n <= EXACT_POINTS:
        edges = torch.arange(n + 1, device=rows.values.device).repeat(g, 1)
        return _means(rows, _split(edges, rows.sums, k, n - k + 1))
    bins = EXACT_POINTS if k <= 64 else min(4 * k, n)
    edges = _bins(rows.values, bins)
    cuts = _split(edges, rows.sums.gather(1, edges), k, bins - k + 1 if k <= 64 else _SPAN)
    return _lloyd(rows, _means(rows, edges.gather(1, cuts)).cummax(1).values)


def _bins(values: Tensor, bins: int) -> Tensor:
    """Edges of the bins as positions in the sorted row: int64 ``[g, bins + 1]``, the last bins may be empty."""
    n = values.shape[1]
    spread = values.diff(dim=1)
    new = spread > 0
    few = new.sum(1, keepdim=True) < bins
    spread.pow_(2 / 3)
    spread.div_(spread.sum(1, keepdim=True)).add_(1 / n)
    spread[few[:, 0]] = new[few[:, 0]].float()
    measure = spread.cumsum_(1)
    marks = torch.arange(1, bins, dtype=torch.float32, device=values.device)
    marks = torch.where(few, marks, marks * measure[:, -1:] / bins)
    return F.pad(F.pad(torch.searchsorted(measure, marks) + 1, (1, 0)), (0, 1), value=n)


def _split(edges: Tensor, sums: Tensor, k: int, span: int) -> Tensor:
    """Where the k best runs of points end: int64 ``[g, k + 1]``, indices into ``edges`` from 0 to the last that counts.

    Args:
        edges: ``[g, m + 1]``, weights in the first 0 .. m points; the last points may be empty.
        sums: ``[g, m + 1]``, their sums.
        k: runs, at most m.
        span: points that one run may take at most.
    """
    few = max(1, _CELLS // (edges.shape[1] * span))
    if edges.shape[0] > few:
        return torch.cat(
            [_split(e, s, k, span) for e, s in zip(torch.split(edges, few), torch.split(sums, few), strict=True)]
        )
    m = edges.shape[1] - 1

    def starts(prefix: Tensor, value: float) -> Tensor:
        """``[g, m, span]``: the prefix at each of the span starts of a run that ends at point 1 .. m."""
        return F.pad(prefix, (span - 1, 0), value=value).unfold(1, span, 1)[:, :m]

    counts = edges.double()
    gain = (sums[:, 1:, None] - starts(sums, 0.0)).square_()
    gain /= (counts[:, 1:, None] - starts(counts, 0.0)).clamp_min_(1)
    best = [counts.new_full(counts.shape, -torch.inf)]
    best[0][:, 0] = 0
    for q in range(1, k + 1):
        ends = slice(q - 1, q + m - k)  # run q ends at point q .. q + m - k, so that every run has a point
        best.append(torch.full_like(counts, -torch.inf))
        best[q][:, q : q + m - k + 1] = (starts(best[q - 1], -torch.inf)[:, ends] + gain[:, ends]).amax(2)
    cuts = [(edges < edges[:, -1:]).sum(1, keepdim=True).clamp_min(k)]
    pick = torch.arange(edges.shape[0], device=edges.device)
    for q in range(k, 0, -1):
        end = cuts[-1][:, 0] - 1
        start = (starts(best[q - 1], -torch.inf)[pick, end] + gain[pick, end]).argmax(1)
        cuts.append((end + 1 - span + start)[:, None])
    return torch.cat(cuts[::-1], 1)


def _means(rows: SortedRows, cuts: Tensor) -> Tensor:
    """The mean of each run between ``cuts [g, k + 1]``; -inf for an empty run.

    No mean lies outside its run by a rounding error of the sums, so that runs of equal weights are met exactly.
    """
    counts, sums = rows.runs(cuts)
    first = rows.values.gather(1, cuts[:, :-1].clamp_max(rows.values.shape[1] - 1))
    last = rows.values.gather(1, (cuts[:, 1:] - 1).clamp_min(0))
    return torch.where(counts > 0, (sums / counts).clamp(first, last), -torch.inf)


def _lloyd(rows: SortedRows, levels: Tensor) -> Tensor:
    """Alternate nearest levels and means until nothing moves: never a larger error than before."""
    moving = torch.arange(levels.shape[0], device=levels.device)
    part, result = rows, levels.clone()
    for _ in range(_POLISH):
        means = _means(part, part.cuts((levels[:, 1:] + levels[:, :-1]) / 2))
        means = torch.where(means.isfinite(), means, levels)
        moved = (means != levels).any(1)
        result[moving] = means
        if not moved.any():
            break
        moving, levels = moving[moved], means[moved]
        if not moved.all():
            part = SortedRows(part.values[moved], part.sums[moved], part.square[moved])
    return result
