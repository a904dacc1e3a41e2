"""Rounding up or down learned by gradient descent on the layer's quadratic (AdaRound, arXiv 2004.10568)."""

from dataclasses import replace

import torch
from torch import Tensor

from pcq.calibrate.quadratic import Codes, Quadratic, nearest
from pcq.grids import Grid

ZETA, GAMMA = 1.1, -0.1


def rounding(quadratic: Quadratic, grid: Grid, row: Tensor, steps: int = 300) -> Codes:
    """Each weight to one of the two levels around its target, chosen together.

    ``w = low + h(v) (high - low)``, ``h = clip(1.2 sigmoid(v) - 0.1, 0, 1)`` (eq. 23 there); Adam on the quadratic,
    each channel's divided by its mean curvature over a gap, plus ``lam (1 - |2h - 1|^beta)`` (eq. 24), without which
    the first fifth runs; beta falls from 20 to 2. Where the target lies outside the levels there is nothing to choose.
    Returns the codes of ``h >= 1/2``, or the nearest levels for channels where those are better.
    """
    start = nearest(grid, row, quadratic.target)
    below = start.decode() < quadratic.target
    top = grid.count - 1
    low = torch.where(below, start.codes.int(), start.codes.int() - 1).clamp(0, top)
    high = (low + 1).clamp(max=top)
    floor = replace(start, codes=low.to(torch.uint8)).decode()
    gap = replace(start, codes=high.to(torch.uint8)).decode() - floor
    wide = gap > 0
    share = ((quadratic.target - floor) / torch.where(wide, gap, 1.0)).clamp(0, 1)
    v = torch.logit(((share - GAMMA) / (ZETA - GAMMA)).clamp(1e-4, 1 - 1e-4))
    curvature = (torch.diagonal(quadratic.h, dim1=1, dim2=2)[:, None, :] * gap.square()).mean(2, keepdim=True)
    scale = 1 / curvature.clamp(min=1e-30)
    first, second = torch.zeros_like(v), torch.zeros_like(v)
    for t in range(steps):
        s = torch.sigmoid(v)
        h = (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
        slope = torch.where((h > 0) & (h < 1), (ZETA - GAMMA) * s * (1 - s), 0.0)
        gradient = 2 * quadratic.gradient(floor + h * gap) * gap * scale
        if t >= 0.2 * steps:
            beta = 20 - 18 * (t / steps - 0.2) / 0.8
            side = 2 * h - 1
            gradient = gradient - LAMBDA * 2 * beta * side.abs().pow(beta - 1) * side.sign()
        gradient = gradient * slope
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        v = v - RATE * (first / (1 - 0.9 ** (t + 1))) / ((second / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
    up = torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA >= 0.5
    found = replace(start, codes=torch.where(up & wide, high, torch.where(wide, low, start.codes)).to(torch.uint8))
    worse = (quadratic.loss(found.decode()) > quadratic.loss(start.decode()))[..., None]
    return replace(start, codes=torch.where(worse, start.codes, found.codes))


LAMBDA, RATE = 0.1, 0.05
