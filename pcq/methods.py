"""The algorithms of the family, each one line of a small table; :mod:`pcq.proxconnect` runs them.

Minimised is ``l(w)`` over weights w on their levels. Each weight has two values: the latent ``w*``, continuous,
and ``w = P(w*)``, P the proximal map of the current strength. A method says at which of the two the gradient is taken
and which of the two the optimizer updates (METHOD.md section 1; eta the learning rate, or any optimizer's step)::

    gradient at   updated    step                                     method
    weight        latent     w*' = w* - eta grad l(w);  w' = P(w*')   ProxConnect, BinaryConnect, BinaryRelax, PARQ
    weight        weight     w*' = w  - eta grad l(w);  w' = P(w*')   ProxQuant
    latent        weight     w*' = w  - eta grad l(w*); w' = P(w*')   reverse ProxConnect
    latent        latent     w*' = w* - eta grad l(w*)                post-training quantization: P once, at the end

ProxConnect: arXiv 2110.13220. ProxQuant: arXiv 1810.00861. BinaryRelax: arXiv 1801.06313. PARQ: arXiv 2503.15748.
ProxConnect++, which multiplies the gradient by a factor B(w*), with BNN, BNN+ and BNN++: arXiv 2402.17710.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pcq.prox import BinaryRelax, Hard, L, Parq, Prox, ProxQuant


@dataclass(frozen=True)
class SignSwish:
    """BNN++'s smooth sign ``SS(x) = 2 sig(b x) (1 + b x (1 - sig(b x))) - 1`` (arXiv 2402.17710), b the sharpness.

    On more than two levels it is applied to each gap, x = -1 and 1 at the gap's ends, and the rises are summed. Its
    slope is about 0 at the levels (at sharpness 5 a little below), so as a factor it holds weights that are on their
    levels where they are: made for binary weights that start near 0, of little use with a level at 0.
    """

    sharpness: float = 5.0

    def value(self, rows: Tensor, levels: Tensor) -> Tensor:
        """``rows [g, n]``, ``levels [g, k]`` -> the smooth staircase, ``[g, n]``."""
        total = ((levels[:, :1] + levels[:, -1:]) / 2).expand_as(rows).clone()
        for x, half in self._gaps(rows, levels):
            s = torch.sigmoid(x)
            total += half * (2 * s * (1 + x * (1 - s)) - 1)
        return total

    def slope(self, rows: Tensor, levels: Tensor) -> Tensor:
        """The derivative of :meth:`value`: ``2 b sig(b x) (1 - sig(b x)) (2 + b x (1 - 2 sig(b x)))`` over the gaps."""
        total = torch.zeros_like(rows)
        for x, half in self._gaps(rows, levels):
            s = torch.sigmoid(x)
            total += torch.where(half > 0, 2 * self.sharpness * s * (1 - s) * (2 + x * (1 - 2 * s)), 0.0)
        return total

    def _gaps(self, rows: Tensor, levels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for gap in range(levels.shape[1] - 1):
            low, high = levels[:, gap : gap + 1], levels[:, gap + 1 : gap + 2]
            half = (high - low) / 2
            yield (rows - (low + high) / 2) / torch.where(half > 0, half, 1.0) * self.sharpness, half


@dataclass(frozen=True)
class Inside:
    """BNN's factor: 1 within the levels, 0 outside of them."""

    def slope(self, rows: Tensor, levels: Tensor) -> Tensor:
        return ((rows >= levels[:, :1]) & (rows <= levels[:, -1:])).to(rows.dtype)


@dataclass(frozen=True)
class Method:
    """One algorithm of the family.

    Attributes:
        gradient_at: the value that the model holds, so at which the gradient is taken.
        updates: the value that the optimizer steps from and to.
        prox: the map from latent to weight; a SignSwish gives way to the nearest level at strength 1.
        backward: what the gradient is multiplied by, as a function of the latent; None: 1.
    """

    gradient_at: Literal["weight", "latent"]
    updates: Literal["weight", "latent"]
    prox: Prox | SignSwish
    backward: SignSwish | Inside | None = None

    @property
    def posttraining(self) -> bool:
        """Whether training does not know of any levels."""
        return self.gradient_at == self.updates == "latent"


METHODS = {
    "binaryconnect": Method("weight", "latent", Hard()),
    "proxconnect": Method("weight", "latent", L()),
    "reverse": Method("latent", "weight", L(clip=False)),
    "proxquant": Method("weight", "weight", ProxQuant()),
    "binaryrelax": Method("weight", "latent", BinaryRelax()),
    "parq": Method("weight", "latent", Parq()),
    "bnn": Method("weight", "latent", Hard(), Inside()),
    "bnn+": Method("weight", "latent", Hard(), SignSwish()),
    "bnn++": Method("weight", "latent", SignSwish(), SignSwish()),
    "posttraining": Method("latent", "latent", Hard()),
}
"""The algorithms by the name they go by; ``dataclasses.replace`` any of them for another prox."""
