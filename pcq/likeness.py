"""How much of a network's outputs, where they are no predictions, another one's explain."""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Likeness:
    """Sums over rows of numbers ``y``, compared with ``aim``; not of those that ``aim`` masks by an infinity.

    Attributes:
        n: int64 [k], rows.
        apart: of ``||y - aim||^2``.
        total: float64 [k], of ``aim``.
        squared: of ``||aim||^2``.
    """

    n: Tensor
    apart: float
    total: Tensor
    squared: float

    @staticmethod
    def of(y: Tensor, aim: Tensor) -> "Likeness":
        """Of rows, the first axis of ``y`` and ``aim``."""
        y, aim = (t.double().reshape(len(t), math.prod(t.shape[1:])) for t in (y, aim))
        hidden = aim.isinf()
        y, aim = (t.masked_fill(hidden, 0) for t in (y, aim))
        apart, squared = (float(t.square().sum()) for t in (y - aim, aim))
        return Likeness((~hidden).sum(0), apart, aim.sum(0), squared)

    def __add__(self, other: "Likeness") -> "Likeness":
        return Likeness(
            self.n + other.n, self.apart + other.apart, self.total + other.total, self.squared + other.squared
        )

    @property
    def explained(self) -> float:
        """``100 (1 - sum ||y - aim||^2 / sum ||aim - E aim||^2)``: 100 for equal rows, 0 for their mean.

        One row has no mean but itself: then about 0.
        """
        mean = (self.total.square() / self.n.clamp(min=1)).masked_fill(self.n < 2, 0)
        variance = self.squared - float(mean.sum())
        return 100 * (1 - self.apart / max(variance, 1e-12 * self.squared, 1e-30))
