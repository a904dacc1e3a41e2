"""The quadratic a layer's weights are judged by, and what minimises it over codes and levels.

``loss = sum over groups of tr((W_q - T) H (W_q - T)^T)`` with the target ``T [G, r, n]`` (G groups of r output channels
of n weights) and ``H [G, n, n]`` symmetric positive definite. Every channel has its own problem; H and the order of the
columns are shared by a group, so all channels are worked on at once, column by column.

All functions are pure and deterministic. A :class:`Codes` says which levels each weight may take: ``row [G, r, n]`` is
the row of the grid that the weight belongs to, so that levels per tensor, channel and group are one case.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pcq.grids import Affine, Codebook, Grid


@dataclass(frozen=True)
class Quadratic:
    """``target [G, r, n]`` and ``h [G, n, n]``, float32."""

    target: Tensor
    h: Tensor

    def loss(self, weight: Tensor) -> Tensor:
        """``[G, r]``: each channel's part of the loss."""
        error = weight - self.target
        return (error @ self.h).mul_(error).sum(2)

    def gradient(self, weight: Tensor) -> Tensor:
        """Half the gradient, ``(weight - T) H``: ``[G, r, n]``."""
        return (weight - self.target) @ self.h


@dataclass(frozen=True)
class Codes:
    """``codes`` uint8 ``[G, r, n]`` into the levels of row ``row [G, r, n]`` (int64) of ``grid``."""

    codes: Tensor
    grid: Grid
    row: Tensor

    def decode(self) -> Tensor:
        """float32 ``[G, r, n]``."""
        return _decode(self.grid, self.row, self.codes)

    @property
    def own(self) -> bool:
        """Whether no two channels share a row of the grid."""
        flat = self.row.flatten(0, 1)
        low, order = flat.amin(1).sort()
        return bool((low[1:] > flat.amax(1)[order][:-1]).all())


def _decode(grid: Grid, row: Tensor, codes: Tensor) -> Tensor:
    if isinstance(grid, Affine):
        zero = grid.zero_point
        return (codes.float() - (zero[row].float() if isinstance(zero, Tensor) else zero)) * grid.scale[row]
    if grid.table.shape[0] == 1:
        values = grid.table[0][codes.long()]
    else:
        values = grid.table.flatten()[row * grid.count + codes.long()]
    return values if grid.scale is None else values * grid.scale[row]


@dataclass(frozen=True)
class _Nearest:
    """Nearest levels for weights ``values [..]`` whose rows of the grid are ``row [..]``.

    What depends on the grid alone is looked up once: ``at`` gives the part for some of the rows. Ties are broken as in
    :meth:`Grid.encode`. Codes come as float32 of evenly spaced levels, int64 of others.
    """

    grid: Grid
    row: Tensor
    scale: Tensor | None = None
    divisor: Tensor | None = None
    zero: Tensor | float = 0.0

    @staticmethod
    def of(grid: Grid, row: Tensor) -> "_Nearest":
        if not isinstance(grid, Affine):
            return _Nearest(grid, row)
        zero = grid.zero_point[row].float() if isinstance(grid.zero_point, Tensor) else grid.zero_point
        return _Nearest(grid, row, grid.scale[row], torch.where(grid.scale > 0, grid.scale, 1.0)[row], zero)

    def columns(self) -> list["_Nearest"]:
        """One for each index of the last axis."""
        rows = self.row.movedim(-1, 0).contiguous().unbind(0)
        if self.scale is None or self.divisor is None:
            return [_Nearest(self.grid, row) for row in rows]
        scales = self.scale.movedim(-1, 0).contiguous().unbind(0)
        divisors = self.divisor.movedim(-1, 0).contiguous().unbind(0)
        zeros = self.zero.movedim(-1, 0).contiguous().unbind(0) if isinstance(self.zero, Tensor) else None
        return [
            _Nearest(self.grid, row, scale, divisor, self.zero if zeros is None else zeros[j])
            for j, (row, scale, divisor) in enumerate(zip(rows, scales, divisors, strict=True))
        ]

    def __call__(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """``values [..] -> codes, decoded``, both ``[..]``."""
        if self.scale is not None:
            assert self.divisor is not None
            codes = (values / self.divisor).add_(self.zero).round_().clamp_(0, self.grid.count - 1)
            return codes, (codes - self.zero).mul_(self.scale)
        levels = self.grid.levels()
        if levels.shape[0] == 1:
            middles = ((levels[0, 1:] + levels[0, :-1]) / 2).contiguous()
            index = torch.bucketize(values.contiguous(), middles)
            return index, levels[0][index]
        own = levels[self.row]
        middles = ((own[..., 1:] + own[..., :-1]) / 2).contiguous()
        index = torch.searchsorted(middles, values[..., None].contiguous())
        return index[..., 0], own.gather(-1, index)[..., 0]


def nearest(grid: Grid, row: Tensor, weight: Tensor) -> Codes:
    """Every weight ``[G, r, n]`` to its nearest level."""
    step = weight.shape[2] if isinstance(grid, Affine) else max(1, 2**22 // (weight[..., 0].numel() * grid.count))
    parts = [
        _Nearest.of(grid, row[..., i : i + step])(weight[..., i : i + step])[0].to(torch.uint8)
        for i in range(0, weight.shape[2], step)
    ]
    return Codes(parts[0] if len(parts) == 1 else torch.cat(parts, 2), grid, row)


def _order(quadratic: Quadratic) -> Tensor:
    """``[G, n]``: columns from the most to the least important, by H's diagonal; ties in the given order."""
    return torch.diagonal(quadratic.h, dim1=1, dim2=2).sort(dim=1, descending=True, stable=True).indices


def _permuted(quadratic: Quadratic, row: Tensor, order: Tensor) -> tuple[Quadratic, Tensor]:
    columns = order[:, None, :].expand_as(quadratic.target)
    h = quadratic.h.gather(1, order[:, :, None].expand_as(quadratic.h))
    h = h.gather(2, order[:, None, :].expand_as(quadratic.h)).contiguous()
    return Quadratic(quadratic.target.gather(2, columns).contiguous(), h), row.gather(2, columns)


def _restored(codes: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(codes).scatter_(2, order[:, None, :].expand_as(codes), codes)


def gptq(quadratic: Quadratic, grid: Grid, row: Tensor, block: int = 64) -> Codes:
    """One pass over the columns, each rounded and its error handed to the columns still open (arXiv 2210.17323).

    The open columns are given their least-squares values after every rounding, through the Cholesky factor of
    ``H^-1``; columns go from the most to the least important.
    """
    order = _order(quadratic)
    turned, turned_row = _permuted(quadratic, row, order)
    columns = _Nearest.of(grid, turned_row).columns()
    factor = torch.linalg.cholesky(turned.h.double())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).float()
    open_ = turned.target.clone()
    n = open_.shape[2]
    codes = torch.empty(open_.shape, dtype=torch.uint8)
    for start in range(0, n, block):
        stop = min(start + block, n)
        part, errors = open_[..., start:stop], torch.empty_like(open_[..., start:stop])
        for j in range(start, stop):
            codes[..., j], decoded = columns[j](part[..., j - start])
            error = (part[..., j - start] - decoded) / factor[:, j, j, None]
            part[..., j - start :] -= error[..., None] * factor[:, None, j, j:stop]
            errors[..., j - start] = error
        open_[..., stop:] -= errors @ factor[:, start:stop, stop:]
    return Codes(_restored(codes, order), grid, row)


def descend(quadratic: Quadratic, start: Codes, sweeps: int, block: int = 64) -> tuple[Codes, int]:
    """Coordinate descent: every weight in turn to the level that is best with all others fixed.

    Never raises the loss (but for float32 rounding). Stops early when a sweep changes nothing: then no change of a
    single code lowers the loss. Returns the codes and how many changes the last sweep made.
    """
    order = _order(quadratic)
    turned, turned_row = _permuted(quadratic, start.row, order)
    columns = _Nearest.of(start.grid, turned_row).columns()
    codes = start.codes.gather(2, order[:, None, :].expand_as(start.codes)).contiguous()
    first_weight = _decode(start.grid, turned_row, codes)
    n, changes = codes.shape[2], 0
    weight = list(first_weight.unbind(2))
    curvature = torch.diagonal(turned.h, dim1=1, dim2=2)[:, None, :].contiguous().unbind(2)
    for _ in range(sweeps):
        gradient, changes = turned.gradient(torch.stack(weight, 2)), 0
        for first in range(0, n, block):
            last = min(first + block, n)
            here = gradient[..., first:last].contiguous()
            steps = []
            for j in range(first, last):
                old = weight[j]
                best = torch.addcdiv(old, here[..., j - first], curvature[j], value=-1)
                _, decoded = columns[j](best)
                # only what is an improvement beyond rounding: else two codes of one level, or a tie, would alternate
                worth = (decoded - best).abs_() < (old - best).abs_().mul_(1 - 1e-6)
                weight[j] = torch.where(worth, decoded, old)
                step = weight[j] - old
                here.addcmul_(step[..., None], turned.h[:, None, j, first:last])
                steps.append(step)
            moved = torch.stack(steps, 2)
            gradient += moved @ turned.h[:, first:last]
            changes += int(moved.count_nonzero())
        if not changes:
            break
    found = torch.stack(weight, 2)
    # a weight is a level, so its nearest is itself; one that did not move keeps its code
    codes = torch.where(found == first_weight, codes, nearest(start.grid, turned_row, found).codes)
    return replace(start, codes=_restored(codes, order)), changes


def refit(quadratic: Quadratic, start: Codes, steps: int = 8) -> Codes:
    """Least squares for the grid's levels with the codes fixed, by preconditioned conjugate gradients.

    What moves are the scales, or the tables of a codebook without scales. With one scale for each channel a single
    step is exact. A channel (all of them, where rows are shared by channels) keeps its levels if the new ones are out
    of order, negative in scale, or not better.
    """
    grid, row = start.grid, start.row
    scaled = isinstance(grid, Affine) or grid.scale is not None
    parameters = parameters_of(grid)
    if scaled:
        unit = with_parameters(grid, torch.ones_like(parameters))
        slot, base = row, _decode(unit, row, start.codes)
    else:
        slot = (row if parameters.shape[0] > 1 else torch.zeros_like(row)) * parameters.shape[1] + start.codes.long()
        base = torch.ones_like(quadratic.target)
    size = parameters.numel()
    # which independent problem each parameter belongs to: its channel, or 0 for all
    owner = torch.zeros(size, dtype=torch.long)
    channels = 1
    if start.own:
        channels = row.shape[0] * row.shape[1]
        channel = torch.arange(channels).reshape(*row.shape[:2], 1).expand_as(row)
        per_row = torch.zeros(parameters.shape[0], dtype=torch.long).scatter_(0, row.flatten(), channel.flatten())
        owner = per_row.repeat_interleave(parameters.shape[1])

    def apply(values: Tensor) -> Tensor:
        return values[slot] * base

    def adjoint(values: Tensor) -> Tensor:
        return torch.zeros(size).index_add_(0, slot.flatten(), (values * base).flatten())

    def total(values: Tensor) -> Tensor:
        return torch.zeros(channels).index_add_(0, owner, values)

    diagonal = torch.diagonal(quadratic.h, dim1=1, dim2=2)[:, None, :].expand_as(base)
    weight = torch.zeros(size).index_add_(0, slot.flatten(), (diagonal * base.square()).flatten())
    inverse = torch.where(weight > 0, 1 / weight, 0.0)
    values = parameters.flatten().clone()
    residual = -adjoint(quadratic.gradient(apply(values)))
    direction = inverse * residual
    power = total(residual * direction)
    for _ in range(steps):
        image = adjoint(apply(direction) @ quadratic.h)
        curvature = total(direction * image)
        pace = torch.where(curvature > 0, power / curvature, 0.0)[owner]
        values = values + pace * direction
        residual = residual - pace * image
        solved = inverse * residual
        fresh = total(residual * solved)
        direction = solved + torch.where(power > 0, fresh / power, 0.0)[owner] * direction
        power = fresh
        if scaled and start.own and size == channels:
            break
    fitted = values.reshape(parameters.shape)
    valid = (fitted >= 0).all(1) if scaled else (fitted[:, 1:] >= fitted[:, :-1]).all(1)
    valid &= fitted.isfinite().all(1)
    better = _per_owner(quadratic.loss(_decode(with_parameters(grid, fitted), row, start.codes)), channels)
    better = better < _per_owner(quadratic.loss(start.decode()), channels)
    owners = owner.reshape(parameters.shape)[:, 0]
    broken = torch.zeros(channels, dtype=torch.long).index_add_(0, owners, (~valid).long())
    keep = (better & (broken == 0))[owners]
    return replace(start, grid=with_parameters(grid, torch.where(keep[:, None], fitted, parameters)))


def _per_owner(losses: Tensor, channels: int) -> Tensor:
    return losses.flatten() if channels == losses.numel() else losses.sum().reshape(1)


def parameters_of(grid: Grid) -> Tensor:
    """What :func:`refit` moves: ``[g, 1]`` scales or ``[g, k]`` tables."""
    if isinstance(grid, Affine):
        return grid.scale[:, None]
    return grid.table if grid.scale is None else grid.scale[:, None]


def with_parameters(grid: Grid, parameters: Tensor) -> Grid:
    if isinstance(grid, Affine):
        return replace(grid, scale=parameters[:, 0].contiguous())
    if grid.scale is None:
        return Codebook(parameters.contiguous())
    return replace(grid, scale=parameters[:, 0].contiguous())


def proxconnect(
    quadratic: Quadratic, start: Codes, steps: int, free: bool, hard: float = 0.7, every: int = 10
) -> Codes:
    """ProxConnect on the quadratic, with its exact gradient (arXiv 2110.13220, Algorithm 1).

    ``w* <- w* - eta D^-1 (w - T) H``, then ``w = P_t(w*)``: the gradient is taken at the quantized point, the step at
    the latent one. ``P_t(w*) = (1 - s) w* + s nearest(w*)`` with s growing from 0 to 1 and staying there for the last
    ``hard`` part of the steps; D is H's diagonal (nearest levels are the same in any separable metric) and eta one over
    the largest eigenvalue of ``D^-1/2 H D^-1/2`` (three times that diverges). If ``free``, the levels are refitted
    every ``every`` steps.
    Returns the best hard point met, the nearest levels of the target included.
    """
    scale = torch.diagonal(quadratic.h, dim1=1, dim2=2).sqrt()
    top = 1.05 * largest_eigenvalue(quadratic.h / (scale[:, :, None] * scale[:, None, :]))[:, None, None]
    step = 1 / (top * scale.square()[:, None, :])
    latent, grid = quadratic.target.clone(), start.grid
    best, best_loss = start, quadratic.loss(start.decode())
    for t in range(steps):
        strength = min(1.0, t / max(1.0, (1 - hard) * steps))
        codes = nearest(grid, start.row, latent)
        point = codes.decode()
        if strength == 1.0 or t % every == 0:
            loss = quadratic.loss(point)
            if loss.sum() < best_loss.sum():
                best, best_loss = codes, loss
        if free and t % every == every - 1:
            grid = refit(quadratic, codes).grid
        latent = latent - quadratic.gradient(latent + strength * (point - latent)) * step
    return best


def largest_eigenvalue(matrices: Tensor) -> Tensor:
    """Of symmetric positive ``[G, n, n]``, by 30 power iterations from a fixed random vector: ``[G]``, never too large.

    A vector of ones would not do: inputs that go against one another can be orthogonal to it.
    """
    n = matrices.shape[1]
    vector = torch.randn(1, n, 1, generator=torch.Generator().manual_seed(0)).to(matrices)
    for _ in range(30):
        vector = F.normalize(matrices @ vector, dim=1)
    lengths: Tensor = torch.linalg.vector_norm(matrices @ vector, dim=1)
    return lengths[:, 0]
