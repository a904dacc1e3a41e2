"""What an int8 layer adds to its sums is an integer of 32 bits, in units of its weight's step times its input's.

``pcq.export.int8`` folds BatchNorm into it. It is rounded (``pcq.activations.sums``) to some thousandths of the
output's levels, a hundred times as coarsely as float32, which decides on which side of a tie a number falls in one of a
thousand codes. So it is simulated where a network is scored; in training BatchNorm's constants move with each batch,
and it is not.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pcq.activations import Floats, sums
from pcq.grids import Affine, Grid


@dataclass(frozen=True)
class Steps:
    """Of a weight's integers: ``scale / unit``, float32 [C] or [1]."""

    scale: npt.NDArray[np.float32]
    unit: int

    @classmethod
    def of(cls, grid: Grid, unit: int) -> "Steps":
        assert isinstance(grid, Affine)
        return cls(grid.scale.detach().cpu().numpy().reshape(-1), unit)

    def rounding(self, value: Floats, factor: Floats, x_scale: np.float32) -> Floats:
        """What rounding adds to the constant ``value`` [C], the weight multiplied by ``factor`` [C]."""
        found = sums(self.scale, self.unit, factor, value, x_scale)
        return np.asarray(found.added * found.unit - value)


@dataclass(frozen=True)
class Constant:
    """What a layer adds: ``value`` [C]; ``added`` [C] is what its rounding has added to the layer's output."""

    steps: Steps
    x_scale: np.float32
    value: Floats
    added: Floats

    @classmethod
    def of(cls, steps: Steps, x_scale: np.float32, bias: Tensor | None, channels: int) -> "Constant":
        value = np.zeros(channels) if bias is None else _numbers(bias)
        return cls(steps, x_scale, value, steps.rounding(value, np.ones(channels), x_scale))

    def onto(self, made: Tensor) -> Tensor:
        """The layer's output [b, C, ...] with it rounded."""
        return _plus(made, self.added)

    def normed(
        self,
        made: Tensor,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """BatchNorm's output with the constant of both rounded; the rest are the arguments of ``F.batch_norm``."""
        if training or running_mean is None or running_var is None:
            return made
        factor = 1 / np.sqrt(_numbers(running_var) + eps)
        factor = factor if weight is None else factor * _numbers(weight)
        value = (self.value - _numbers(running_mean)) * factor + (0 if bias is None else _numbers(bias))
        return _plus(made, self.steps.rounding(value, factor, self.x_scale) - factor * self.added)


def _plus(made: Tensor, channels: Floats) -> Tensor:
    return made + torch.from_numpy(channels).to(made).view(-1, *[1] * (made.ndim - 2))


def _numbers(x: Tensor) -> Floats:
    return np.asarray(x.detach().cpu().double().numpy())
