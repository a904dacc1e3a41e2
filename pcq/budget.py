"""Byte budgets: which levels each weight gets, so that the whole fits and the loss is least.

A multiple-choice knapsack: of every weight's options one is taken, ``min sum loss`` under ``sum cost <= budget``, costs
in whole bytes. :func:`solve` is exact unless it says otherwise.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pcq.errors import PcqError
from pcq.quantizers import Binary, KMeans, Quantizer, Ternary, Uniform
from pcq.rows import Rows
from pcq.rules import Match, Parameter, Rule

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

STATES = 400_000
"""Partial allocations that are kept at a time."""


@dataclass(frozen=True)
class Bytes:
    """The whole file takes at most ``limit`` bytes."""

    limit: int


@dataclass(frozen=True)
class Bits:
    """The weights with levels take at most ``limit`` bits each on average, scales and tables included."""

    limit: float


Budget = Bytes | Bits

_UNITS = {
    **dict.fromkeys(("bit", "bits", "byte", "bytes", "b"), 1),
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30,
}  # fmt: skip


def parse_budget(text: str) -> Budget:
    """``3MB`` (a million bytes each), ``2.8 MiB``, ``900kB``, ``2.5bits``.

    Raises:
        PcqError: it is none of these.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    unit = found[2].lower() if found else ""
    size = float(found[1]) * _UNITS.get(unit, 0) if found else 0.0
    if 0 < size < math.inf:
        return Bits(size) if unit in ("bit", "bits") else Bytes(int(size))
    raise PcqError(f"'{text}' is not a budget", where="budget", allowed="such as 3MB, 900kB, 2.8MiB, 2.5bits")


@dataclass(frozen=True)
class Option:
    """Levels that a weight may get, and how they are shared."""

    levels: Quantizer
    per: Literal["tensor", "channel"] = "channel"
    group: int | None = None

    @property
    def text(self) -> str:
        shared = f"groups of {self.group}" if self.group else f"per {self.per}"
        return f"{self.levels.text}, {shared}"

    def rule(self, names: Sequence[str]) -> Rule:
        """The rule that gives it to the weights ``names``."""
        return Rule((Match(name=tuple(map(literal, names))),), self.levels, per=self.per, group=self.group)

    def rows(self, parameter: Parameter) -> Rows:
        return self.rule([parameter.name]).rows(parameter)


OPTIONS = (
    Option(Binary()),
    Option(Binary(), group=64),
    Option(Ternary()),
    Option(Ternary(), group=64),
    *(Option(Uniform(bits)) for bits in (2, 3, 4, 5, 6, 8)),
    *(Option(Uniform(bits), group=64) for bits in (2, 3, 4)),
    *(Option(KMeans(levels)) for levels in (4, 8, 16)),
    *(Option(KMeans(levels), per="tensor") for levels in (3, 4, 8, 16, 64)),
)
"""What each weight may get."""


def literal(name: str) -> str:
    """A pattern that matches ``name`` and nothing else."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


@dataclass(frozen=True)
class Solution:
    """What :func:`solve` found.

    Attributes:
        choice: for each weight the number of its option.
        cost: of all together.
        loss: of all together.
        bound: no allocation within the budget has a lower loss than this; equal to ``loss`` if solved exactly.
    """

    choice: tuple[int, ...]
    cost: int
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """How far the loss may be above the least, as a share of it; 0: it is the least."""
        return 0.0 if self.loss <= self.bound else (self.loss - self.bound) / max(self.loss, 1e-300)


def solve(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int, states: int = STATES
) -> Solution | None:
    """One option of each weight, the sum of losses least under ``sum of costs <= budget``; None if nothing fits.

    Dynamic programming over the weights. A partial allocation is dropped if another costs no more and loses no more,
    and if even the linear relaxation of the rest (by the multiplier that is best for the whole) cannot bring it below
    the best allocation known. That loses nothing; only if more than ``states`` of them are left are the least promising
    dropped, and the solution's ``bound`` tells by how much that may matter.
    """
    groups = [
        _efficient(np.asarray(c, np.int64), np.asarray(v, np.float64)) for c, v in zip(costs, losses, strict=True)
    ]
    cheapest = np.array([int(cost[0]) for cost, _, _ in groups], np.int64)
    if int(cheapest.sum()) > budget:
        return None
    budget = min(budget, sum(int(cost[-1]) for cost, _, _ in groups))  # more than the dearest take is no use
    slope, known = _relaxed(groups, budget)
    best = sum(float(groups[i][1][k]) for i, k in enumerate(known))
    least = [float((loss + slope * cost).min()) for cost, loss, _ in groups]
    order = sorted(range(len(groups)), key=lambda i: (-float(np.ptp(groups[i][1])), i))
    at_cost, at_loss = np.zeros(1, np.int64), np.zeros(1)
    back: list[tuple[Ints, Ints]] = []
    rest_cost, rest_least = int(cheapest.sum()), sum(least)
    dropped = np.inf
    for i in order:
        cost, loss, _ = groups[i]
        rest_cost -= int(cheapest[i])
        rest_least -= least[i]
        total, lost = (at_cost[:, None] + cost).ravel(), (at_loss[:, None] + loss).ravel()
        promise = lost + slope * (total - budget) + rest_least
        fits = np.flatnonzero((total + rest_cost <= budget) & (promise <= best + 1e-9 * abs(best)))
        fits = fits[np.lexsort((lost[fits], total[fits]))]
        falling = np.minimum.accumulate(lost[fits])
        fits = fits[np.concatenate([[True], lost[fits][1:] < falling[:-1]])] if len(fits) else fits
        if len(fits) > states:
            ranked = np.argsort(promise[fits], kind="stable")
            dropped = min(dropped, float(promise[fits][ranked[states]]))
            fits = fits[np.sort(ranked[:states])]
        back.append((fits // len(cost), fits % len(cost)))
        at_cost, at_loss = total[fits], lost[fits]
    choice = list(known)
    if len(at_loss) and float(at_loss.min()) <= best:
        state = int(at_loss.argmin())
        best = float(at_loss[state])
        for i, (parents, options) in zip(reversed(order), reversed(back), strict=True):
            choice[i] = int(options[state])
            state = int(parents[state])
    chosen = tuple(int(groups[i][2][k]) for i, k in enumerate(choice))
    spent = sum(int(groups[i][0][k]) for i, k in enumerate(choice))
    return Solution(chosen, spent, best, min(best, dropped))


def _efficient(cost: Ints, loss: Floats) -> tuple[Ints, Floats, Ints]:
    """The options that no other beats in both, from cheap to dear, and their numbers."""
    order = np.lexsort((loss, cost))
    keep: list[int] = []
    for i in order:
        if not keep or loss[i] < loss[keep[-1]]:
            keep.append(int(i))
    return cost[keep], loss[keep], np.array(keep, np.int64)


def _relaxed(groups: list[tuple[Ints, Floats, Ints]], budget: int) -> tuple[float, list[int]]:
    """The best multiplier of the linear relaxation (loss for each byte), and a good allocation that fits."""
    steps: list[tuple[float, int, int, int]] = []
    for i, (cost, loss, _) in enumerate(groups):
        hull = [0]
        for k in range(1, len(cost)):
            while len(hull) > 1 and _gain(cost, loss, hull[-2], hull[-1]) <= _gain(cost, loss, hull[-2], k):
                hull.pop()
            hull.append(k)
        steps += [(_gain(cost, loss, a, b), i, a, b) for a, b in pairwise(hull)]
    steps.sort(key=lambda step: (-step[0], step[1], step[2]))
    at = [0] * len(groups)
    left = budget - sum(int(cost[0]) for cost, _, _ in groups)
    slope = 0.0
    stuck = set[int]()
    for gain, i, a, b in steps:
        if i in stuck:
            continue
        price = int(groups[i][0][b] - groups[i][0][a])
        if price <= left:
            at[i], left = b, left - price
        else:
            slope = max(slope, gain)
            stuck.add(i)
    for i, (cost, _, _) in enumerate(groups):
        fitting = [k for k in range(at[i], len(cost)) if cost[k] - cost[at[i]] <= left]
        left -= int(cost[fitting[-1]] - cost[at[i]])
        at[i] = fitting[-1]
    return slope, at


def _gain(cost: Any, loss: Any, a: int, b: int) -> float:
    return float(loss[a] - loss[b]) / float(cost[b] - cost[a])
