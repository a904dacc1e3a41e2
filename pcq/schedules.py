"""How strong the pull towards the levels is, as training goes on: from 0 (none) to 1 (the nearest level).

A schedule is a frozen dataclass; ``strength(progress, mu)`` is a pure function of the share of the steps that are done
and of ``mu = 1 + sum of the learning rates so far``. ``start`` and ``end`` are shares of the training. Before ``start``
the strength is 0 (for Geometric and Theory its first value), from ``end`` on it is 1: the hard phase, which is never
missing, so that the weights have settled on their levels when training ends.
"""

import math
from dataclasses import dataclass
from typing import Protocol

from pcq.errors import PcqError, raise_all


class Schedule(Protocol):
    """What :class:`pcq.proxconnect.ProxConnect` needs of a schedule."""

    @property
    def end(self) -> float: ...

    def strength(self, progress: float, mu: float) -> float:
        """``progress`` in [0, 1], ``mu`` >= 1 -> a number in [0, 1], 1 from ``end`` on."""
        ...


@dataclass(frozen=True)
class Linear:
    """From ``first`` to 1 in a straight line, as arXiv 2110.13220 grows its shifts."""

    start: float = 0.0
    end: float = 0.75
    first: float = 0.0

    def __post_init__(self) -> None:
        _check(self.start, self.end)
        if not 0 <= self.first <= 1:
            raise PcqError(f"first is {self.first}", where="schedule Linear", allowed="a strength from 0 to 1")

    def strength(self, progress: float, mu: float) -> float:
        f = _within(progress, self.start, self.end)
        return 1.0 if progress >= self.end else self.first + (1 - self.first) * f


@dataclass(frozen=True)
class Cosine:
    """Half a cosine wave from 0 to 1."""

    start: float = 0.0
    end: float = 0.75

    def __post_init__(self) -> None:
        _check(self.start, self.end)

    def strength(self, progress: float, mu: float) -> float:
        return 1.0 if progress >= self.end else (1 - math.cos(math.pi * _within(progress, self.start, self.end))) / 2


@dataclass(frozen=True)
class MirroredSigmoid:
    """PARQ's: the inverse slope, 1 - strength, is a falling sigmoid scaled to go from 1 to 0 (arXiv 2503.15748).

    With f the share of the way from start to end and S the steepness it is
    ``1 - (sig(S (f - 1/2)) - sig(-S / 2)) / (sig(S / 2) - sig(-S / 2))``.
    """

    start: float = 0.0
    end: float = 0.75
    steepness: float = 10.0

    def __post_init__(self) -> None:
        _check(self.start, self.end)
        if not 0.001 <= self.steepness <= 500:  # below it is a line, and rounding takes it apart
            raise PcqError(
                f"steepness is {self.steepness}", where="schedule MirroredSigmoid", allowed="a number from 0.001 to 500"
            )

    def strength(self, progress: float, mu: float) -> float:
        f, s = _within(progress, self.start, self.end), self.steepness
        low, high = _sigmoid(-s / 2), _sigmoid(s / 2)
        rise = (_sigmoid(s * (f - 0.5)) - low) / (high - low)
        return 1.0 if progress >= self.end else min(1.0, max(0.0, rise))


@dataclass(frozen=True)
class Geometric:
    """BinaryRelax's: ``e`` grows by a constant factor each step, from ``first`` to ``last``; strength e / (1 + e).

    arXiv 1801.06313 multiplies its relaxation by a constant factor and then takes the nearest level at once.
    """

    start: float = 0.0
    end: float = 0.75
    first: float = 1.0
    last: float = 100.0

    def __post_init__(self) -> None:
        _check(self.start, self.end)
        if not 0 < self.first <= self.last < math.inf:
            raise PcqError(
                f"first is {self.first}, last is {self.last}", where="schedule Geometric", allowed="0 < first <= last"
            )

    def strength(self, progress: float, mu: float) -> float:
        f = _within(progress, self.start, self.end)
        e = self.first * (self.last / self.first) ** f
        return 1.0 if progress >= self.end else e / (1 + e)


@dataclass(frozen=True)
class Theory:
    """The growth that ProxConnect's analysis has: the prox parameter is ``first * mu``, mu = 1 + sum of learning rates.

    ``first`` is the strength before the first step; what the learning rates do not reach by ``end`` is a jump.
    """

    end: float = 0.75
    first: float = 0.01

    def __post_init__(self) -> None:
        _check(0.0, self.end)
        if not 0 <= self.first <= 1:
            raise PcqError(f"first is {self.first}", where="schedule Theory", allowed="a strength from 0 to 1")

    def strength(self, progress: float, mu: float) -> float:
        return 1.0 if progress >= self.end else min(1.0, self.first * mu)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _within(progress: float, start: float, end: float) -> float:
    """How far ``progress`` is on the way from ``start`` to ``end``, in [0, 1]."""
    return 1.0 if progress >= end else 0.0 if progress <= start else (progress - start) / (end - start)


def _check(start: float, end: float) -> None:
    problems = []
    if not 0 <= start <= 1:
        problems.append(PcqError(f"start is {start}", where="schedule", allowed="a share of the training from 0 to 1"))
    if not 0 <= end < 1:
        problems.append(
            PcqError(
                f"end is {end}",
                where="schedule",
                allowed="a share of the training, 0 <= end < 1",
                todo="Leave at least the last steps for the hard phase, in which the weights settle on their levels.",
            )
        )
    elif start > end:
        problems.append(PcqError(f"start {start} comes after end {end}", where="schedule", allowed="start <= end"))
    raise_all(problems)
