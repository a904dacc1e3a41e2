"""Activations in 8 bits: what a tensor's codes stand for, what a layer adds to its sums, and what tensors are called.

Training and export have to mean the same tensor by the same name. Names follow the weights: ``W/input`` enters the
first layer that reads it, that of weight W; ``W/output`` comes out of the convolution W with the BatchNorm and the
Relu behind it; ``W/sum`` and ``W/concat`` combine that with others. A second tensor of a name, in the order of
computing, is ``#2``.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

FULL, HALF = 255, 127
"""The last code of a tensor in 8 bits and in 7."""


@dataclass(frozen=True)
class Range:
    """Codes 0 to ``top`` stand for ``scale * (code - zero_point)``, which spans ``low <= 0`` to ``high >= 0``.

    Codes go on to 255 in any case; ``top`` is 127 where products with large weights are to fit into 16 bits.
    """

    low: float
    high: float
    top: int = FULL

    @property
    def scale(self) -> np.float32:
        return np.float32(max((self.high - self.low) / self.top, 1e-12))

    @property
    def zero_point(self) -> np.uint8:
        return np.uint8(np.clip(np.rint(-self.low / float(self.scale)), 0, self.top))


@dataclass(frozen=True)
class Sums:
    """The integers of 32 bits in which a layer sums, by channel.

    Attributes:
        gain: float32 ``[C]``: what the weight's scale is multiplied by.
        step: float32 ``[C]``: of the weight's integers.
        lost: where the weight's integers are 0.
        unit: ``[C]``: of the sums, ``step`` times that of the input.
        added: ``[C]``: whole numbers of them.
    """

    gain: npt.NDArray[np.float32]
    step: npt.NDArray[np.float32]
    lost: npt.NDArray[np.bool_]
    unit: Floats
    added: Floats


def sums(scale: npt.NDArray[np.float32], unit: int, factor: Floats, constant: Floats, x_scale: np.float32) -> Sums:
    """In what integers a layer sums that adds ``constant`` ``[C]``.

    A channel whose weights count for less than 2**-29 of its constant, and one of scale 0, loses them.

    Args:
        scale: of the weight, ``[C]`` or ``[1]``; its integers have ``unit`` to each.
        factor: ``[C]``: what the weight is multiplied by, a folded BatchNorm.
        x_scale: of the input.
    """
    gain = (np.abs(factor) / unit).astype(np.float32)
    step = (scale * gain).astype(np.float32)
    least = np.maximum(np.abs(constant) / 2**29 / float(x_scale), 1e-30)
    lost = step < least
    step = np.where(lost, least, step).astype(np.float32)
    whole = (step * x_scale).astype(np.float64)
    return Sums(gain, step, lost, whole, np.rint(constant / whole))


class Names:
    """Gives names to the tensors of one forward pass, in the order of computing."""

    def __init__(self) -> None:
        self._given: Counter[str] = Counter()

    def of(self, weight: str, what: str) -> str:
        """``W/input`` or ``W/output``."""
        name = f"{weight}/{what}"
        self._given[name] += 1
        return name if self._given[name] == 1 else f"{name}#{self._given[name]}"

    def combined(self, what: str, names: Sequence[str]) -> str:
        """``W/sum`` or ``W/concat`` of tensors with these names: W is the first one that a convolution computes."""
        computed = [name for name in names if name.partition("#")[0].endswith("/output")]
        return self.of((computed or list(names))[0].rpartition("/")[0], what)
