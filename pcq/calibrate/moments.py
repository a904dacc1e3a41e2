"""Second moments of what enters a layer, and the target for its weights that they give."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

PULLS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""How hard the target may be pulled to the float weights: parts of the mean diagonal, added to both covariances."""


@dataclass(frozen=True)
class Moments:
    """Of what enters a layer, ``x_q`` in the quantized network and ``x_f`` in the float one; and of what leaves.

    Attributes:
        mean: of ``x_q``, ``[G, n]``.
        cov: of ``x_q``, ``[G, n, n]``; about zero where nothing behind the layer can take up a mean.
        cross: ``cov(x_f, x_q)``, likewise.
        y_mean: of the float network's output without bias, ``[G, r]``.
        y_var: likewise.
        halves: ``cov`` and ``cross`` of either half of the batches; empty where there is one batch.
    """

    mean: Tensor
    cov: Tensor
    cross: Tensor
    y_mean: Tensor
    y_var: Tensor
    halves: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def finite(self) -> bool:
        """Whether all of them are numbers; activations can overflow where layers before are coarse."""
        return all(bool(torch.isfinite(t).all()) for t in (self.mean, self.cov, self.cross, self.y_mean, self.y_var))


@dataclass
class _Half:
    """Means and sums of products about them, of some batches; combined as Chan, Golub and LeVeque (1979) do.

    So a channel that is constant in every batch has a variance of nothing but what its means differ by: sums about one
    point for all batches would leave rounding errors there, of either sign.
    """

    count: float
    q: Tensor
    f: Tensor
    y: Tensor
    qq: Tensor
    fq: Tensor
    yy: Tensor

    @staticmethod
    def of(p_f: Tensor, p_q: Tensor, weight: Tensor, bounded: bool, crossed: bool) -> "_Half":
        y = p_f @ weight.transpose(1, 2)
        share = influence(y) if bounded else None
        total = torch.full_like(y[:, :1, :1], y.shape[1]) if share is None else share.sum(1, keepdim=True)
        root = None if share is None else share.sqrt()

        def weighed(x: Tensor, by: Tensor | None) -> Tensor:
            return x if by is None else x * by

        means = [weighed(x, share).sum(1, keepdim=True) / total for x in (p_q, p_f, y)]
        q, y = weighed(p_q - means[0], root), weighed(y - means[2], root)
        qq = (q.transpose(1, 2) @ q).double()
        fq = (weighed(p_f - means[1], root).transpose(1, 2) @ q).double() if crossed else qq
        mean_q, mean_f, mean_y = (mean[:, 0].double() for mean in means)
        return _Half(float(total.mean()), mean_q, mean_f, mean_y, qq, fq, y.square().sum(1).double())

    def join(self, other: "_Half") -> None:
        """Take in what is of ``other`` batches."""
        total = self.count + other.count
        share, part = other.count / total, self.count * other.count / total
        q, f, y = other.q - self.q, other.f - self.f, other.y - self.y
        if self.fq is not self.qq:
            self.fq += other.fq.addcmul_(f[:, :, None], q[:, None, :], value=part)
        self.qq += other.qq.addcmul_(q[:, :, None], q[:, None, :], value=part)
        self.yy += other.yy + part * y.square()
        self.q, self.f, self.y = self.q + share * q, self.f + share * f, self.y + share * y
        self.count = total

    def moments(self, centred: bool) -> Moments:
        cov, cross = self.qq / self.count, self.fq / self.count
        if not centred:
            cov = cov + self.q[:, :, None] * self.q[:, None, :]
            cross = cross + self.f[:, :, None] * self.q[:, None, :]
        y_var = self.yy / self.count
        return Moments(self.q.float(), cov.float(), cross.float(), self.y.float(), y_var.float())


class Sums:
    """Sums over batches for one layer.

    Args:
        weight: the layer's float weights ``[G, r, n]``.
        centred: moments about the mean; else about zero.
        bounded: no row counts more than :func:`influence` allows.
        crossed: ``cross`` is wanted, which is a matrix product more for each batch; else it is no use.
    """

    def __init__(self, weight: Tensor, centred: bool, bounded: bool = False, crossed: bool = True) -> None:
        self.weight, self.centred, self.bounded, self.crossed = weight, centred, bounded, crossed
        self.halves: list[_Half] = []

    def add(self, p_f: Tensor, p_q: Tensor) -> None:
        """One batch of what enters in the float and in the quantized network, ``[G, m, n]`` each."""
        new = _Half.of(p_f, p_q, self.weight, self.bounded, self.crossed)
        if len(self.halves) < 2:
            self.halves.append(new)
        else:
            min(self.halves, key=lambda half: half.count).join(new)

    def moments(self) -> Moments:
        """Of all batches, and of either half; to be asked for once, at the end."""
        found = [half.moments(self.centred) for half in self.halves]
        if len(found) == 1:
            return found[0]
        whole, other = self.halves
        whole.join(other)
        return replace(whole.moments(self.centred), halves=tuple((half.cov, half.cross) for half in found))


def influence(y: Tensor) -> Tensor:
    """How much each row of a layer's float output ``y [G, m, r]`` counts: ``[G, m, 1]``, Huber's weights (1964).

    One up to the median of ``||y||^2``; beyond, so little that it has the median row's part in the loss. Transformers
    have tokens whose values are a thousand times those of others (arXiv 2402.17762). Squared errors are theirs then,
    and the norm that follows makes all tokens alike.
    """
    energy = y.square().sum(2, keepdim=True)
    median = energy.median(1, keepdim=True).values
    return torch.where((median > 0) & (energy > median), median / energy.clamp(min=1e-30), 1.0)


def damped(cov: Tensor, part: float) -> Tensor:
    """``part`` of the mean diagonal of ``cov [G, n, n]``, as a diagonal to be added to it; of 1 where next to nothing
    enters: a part of that may be no number of float32."""
    diagonal = mean_diagonal(cov)
    return part * torch.where(diagonal > 1e-30, diagonal, 1.0) * torch.eye(cov.shape[1])


def mean_diagonal(matrices: Tensor) -> Tensor:
    """``[G, n, n] -> [G, 1, 1]``."""
    return torch.diagonal(matrices, dim1=1, dim2=2).mean(1)[:, None, None]


def target(weight: Tensor, cov: Tensor, cross: Tensor, pull: float) -> Tensor:
    """The weights ``[G, r, n]`` that make the float layer's output of the quantized network's input.

    Minimises ``E ||W x_f - T x_q||^2 + pull d ||T - W||^2``, ``d`` the mean of ``cov``'s diagonal: ridge regression
    about the float weights, ``T = W (cross + pull d) (cov + pull d)^-1``.
    """
    more = damped(cov, pull)
    factor = torch.linalg.cholesky((cov + more).double())
    right = (weight @ (cross + more)).double().transpose(1, 2)
    return torch.cholesky_solve(right, factor).transpose(1, 2).float().contiguous()


def pull(weight: Tensor, found: Moments) -> float:
    """The one of :data:`PULLS` whose target, made of either half of the batches, does best on the other.

    Without it the target of a layer with more weights a row than there are different samples is learnt by heart.
    """

    def lost(pull: float) -> float:
        total = 0.0
        for mine, other in (found.halves, found.halves[::-1]):
            aim = target(weight, *mine, pull)
            total += float(((aim @ other[0] - 2 * (weight @ other[1])) * aim).sum())
        return total

    if not found.halves:
        return PULLS[0]
    best, least = PULLS[0], lost(PULLS[0])
    for more in PULLS[1:]:
        now = lost(more)
        if now > least:
            break
        best, least = more, now
    return best


def noise(found: Moments) -> float:
    """How much of the mean diagonal has to be added to ``found.cov`` for want of samples, at most as much as there is.

    With a part rho replaced by the mean diagonal the covariance is nearest to the true one in the mean square if rho is
    its own expected squared error over its squared distance from the mean diagonal (Ledoit and Wolf 2004, Lemma 2.1);
    the error is a quarter of what the two halves' covariances differ by. ``rho / (1 - rho)``, as scale is no matter.
    """
    if not found.halves:
        return 0.0
    one, other = (half[0] for half in found.halves)
    rho = min(0.5, doubt(one, other, found.cov, damped(found.cov, 1.0)))
    return rho / (1 - rho)


def doubt(one: Tensor, other: Tensor, whole: Tensor, aim: Tensor) -> float:
    """The expected squared error of ``whole``, of which ``one`` and ``other`` are halves, over its squared distance
    from ``aim``: the part that ``aim`` should have."""
    distance = (whole - aim).square().sum().clamp(min=1e-30)
    return float((one - other).square().sum() / 4 / distance)
