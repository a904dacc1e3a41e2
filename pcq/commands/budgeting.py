"""Which levels each weight gets so that the file fits into a budget, and what uniform levels would have done."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from pcq import checkpoint, qtensor
from pcq.budget import OPTIONS, Bits, Budget, Bytes, Option, parse_budget, solve
from pcq.errors import PcqError
from pcq.plan import Quantized, make_plan
from pcq.progress import Progress, silent
from pcq.quantizers import Uniform
from pcq.recipe import Recipe
from pcq.rules import Match, Rule

if TYPE_CHECKING:
    from pcq.commands.calibrating import Calibrated, Calibration
    from pcq.commands.quantizing import Planned

SAMPLES = 64
"""Calibration samples that the options are compared on."""

PROBE = Uniform(3)
"""The levels with which a weight's part in the network's output is measured."""

UNMOVED = 1e-3
"""The share of the noise of the coarsest option below which those say nothing of a weight, which lies on them already;
then it is measured with that option."""

ENDLESS = 1e9
"""What counts as the output's error where it is infinite."""

TRIALS = 16
"""How often an allocation is sought, to find how much of the budget its header leaves to the weights."""

CLOSE = 0.99
"""The share of the budget that should be used."""


@dataclass(frozen=True)
class Uniformly:
    """One option for all weights: what it takes, and its loss by the same measure as the allocation's."""

    option: Option
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Allocation:
    """Levels for each weight under a budget.

    Attributes:
        budget: as it was asked for.
        limit: bytes there are: of the file, or, where the budget is in bits, of the weights with levels.
        nbytes: bytes it takes, counted in the same way; the file's are exact but for the digits of a header entry.
        planned: the plan with the levels chosen.
        options: weight -> its option.
        loss: sum over the weights of what their levels do: to the network's output where there are samples, else
            noise / signal.
        gap: share of the loss by which it may be above the least; 0: proven least.
        uniform: every option that fits if all weights get it, best first.
        errors: the network's output error on samples held out, after calibration: of the allocation, and of the best
            uniform one; None without samples.
        uniformly: whether the best uniform allocation was taken, because it was better on the samples held out.
        note: why more than 1 % of the budget is left; empty if it is not.
        calibrated: what calibration found for ``planned``; None without samples.
    """

    budget: str
    limit: int
    nbytes: int
    planned: "Planned"
    options: Mapping[str, Option]
    loss: float
    gap: float
    uniform: tuple[Uniformly, ...]
    errors: tuple[float, float] | None
    uniformly: bool
    note: str
    calibrated: "Calibrated | None"

    def exceeded_by(self, size: int) -> bool:
        """Whether a file of ``size`` bytes is larger than a budget of bytes."""
        return isinstance(parse_budget(self.budget), Bytes) and size > self.limit


def everything(budget: str) -> Recipe:
    """The recipe where only a budget is given: levels for every weight that can have them."""
    name = "".join(letter for letter in budget if letter.isalnum() or letter == ".")
    parse_budget(budget)
    return Recipe(name, "", (Rule((Match(name=("*",)),), Uniform(4)),), budget=budget)


def named(recipe: Recipe, budget: str) -> str:
    """What a recipe is called once its levels are settled."""
    word = "".join(letter for letter in budget if letter.isalnum() or letter == ".")
    return recipe.name if word in recipe.name else f"{recipe.name}-{word}"


def allocate(
    planned: "Planned", budget: str, calibration: "Calibration | None" = None, progress: Progress = silent
) -> Allocation:
    """Choose levels for every weight to which the recipe gives some, so that the loss is least within ``budget``.

    Weights that the recipe keeps in float stay so. What a weight's levels lose is, with calibration, their error in
    the output of its layer (channel means aside) times what such an error does to the network's output; without, their
    noise / signal, so that every layer counts alike. Then the allocation and the best uniform one are calibrated, and
    the one with the lower output error on samples held out is taken.

    Raises:
        PcqError: the budget is no size or less than the least possible, or the samples are not usable.
    """
    limit = parse_budget(budget)
    entries = [entry for entry in planned.plan.quantized if entry.parameter.tied_to is None]
    if not entries:
        raise PcqError("the recipe quantizes nothing, so there is nothing to allocate", where=planned.recipe.name)
    problem = Problem(planned, budget, limit, entries, calibration)
    problem.refuse_too_little()
    losses = problem.losses(progress)
    uniform = problem.uniform(losses)
    choice, loss, gap = problem.solve(losses, uniform)
    finest = sum(map(min, losses)) * (1 + 1e-9)
    options = {entry.parameter.name: OPTIONS[k] for entry, k in zip(entries, choice, strict=True)}
    settled = problem.plan(options)
    if calibration is None:
        assert not uniform or loss <= uniform[0].loss * (1 + 1e-9), (loss, uniform[0])
        return problem.allocation(settled, options, loss, gap, uniform, None, False, None, finest)
    from pcq.commands.calibrating import calibrated

    made = calibrated(settled, calibration, progress)
    if not uniform:
        return problem.allocation(settled, options, loss, gap, uniform, None, False, made, finest)
    alike = {entry.parameter.name: uniform[0].option for entry in entries}
    other = problem.plan(alike)
    second = calibrated(other, calibration, progress)
    errors = (_held_out_error(made), _held_out_error(second))
    if errors[1] < errors[0]:
        return problem.allocation(other, alike, uniform[0].loss, gap, uniform, errors, True, second, finest)
    return problem.allocation(settled, options, loss, gap, uniform, errors, False, made, finest)


def _held_out_error(made: "Calibrated") -> float:
    kept = [step.error for step in made.outcome.steps if not step.reason and step.error is not None]
    return kept[-1] if kept else math.inf


@dataclass(frozen=True)
class Problem:
    """What :func:`allocate` was asked for."""

    planned: "Planned"
    budget: str
    limit: Budget
    entries: Sequence[Quantized]
    calibration: "Calibration | None"

    @cached_property
    def costs(self) -> list[list[int]]:
        """Packed bytes of each weight with each option: codes, scales, tables."""
        return [
            [replace(entry, quantizer=option.levels, rows=option.rows(entry.parameter)).nbytes for option in OPTIONS]
            for entry in self.entries
        ]

    @property
    def allowed(self) -> int:
        """Bytes there are."""
        if isinstance(self.limit, Bytes):
            return self.limit.limit
        return int(self.limit.limit * sum(entry.parameter.numel for entry in self.entries) / 8)

    def plan(self, options: Mapping[str, Option]) -> "Planned":
        """The plan that gives each weight its option; a rule for each option, then those that keep."""
        groups: dict[Option, list[str]] = {}
        for name, option in options.items():
            groups.setdefault(option, []).append(name)
        recipe = self.planned.recipe
        keeping = [replace(rule, optional=True) for rule in recipe.rules if rule.keep is not None]
        rules = [option.rule(groups[option]) for option in OPTIONS if option in groups]
        settled = replace(recipe, name=named(recipe, self.budget), rules=(*rules, *keeping), budget=None, places=())
        plan = make_plan(settled, [entry.parameter for entry in self.planned.plan.entries])
        return replace(self.planned, recipe=settled, plan=plan)

    def size(self, planned: "Planned") -> int:
        """Bytes as the budget counts them."""
        if isinstance(self.limit, Bits):
            return sum(entry.nbytes for entry in planned.plan.quantized)
        record = None if self.calibration is None else self.calibration.to_json(self.calibration.samples or 512)
        header = checkpoint.make_header(
            planned.plan,
            arch=planned.arch,
            recipe=planned.recipe.to_json(),
            source=planned.source,
            calibration=record,
        )
        return checkpoint.predicted_size(header)

    @cached_property
    def alike(self) -> list[int]:
        """The size with each option for all weights."""
        return [self.size(self.plan(self._named([k] * len(self.entries)))) for k in range(len(OPTIONS))]

    @cached_property
    def smallest(self) -> list[int]:
        """The options that take the fewest bytes: each weight's own, or one for all, of which the header says less."""
        own = [min(range(len(OPTIONS)), key=lambda k: (cost[k], k)) for cost in self.costs]
        best = min(range(len(OPTIONS)), key=lambda k: self.alike[k])
        return [best] * len(own) if self.alike[best] < self.size(self.plan(self._named(own))) else own

    @cached_property
    def least(self) -> int:
        """The size with those."""
        return self.size(self.plan(self._named(self.smallest)))

    @cached_property
    def header(self) -> int:
        """Bytes that are no weights', at least."""
        least = self.least - sum(cost[k] for cost, k in zip(self.costs, self.smallest, strict=True))
        return min(least, *(size - sum(cost[k] for cost in self.costs) for k, size in enumerate(self.alike)))

    def refuse_too_little(self) -> None:
        """Before anything is measured.

        Raises:
            PcqError: not even the smallest options fit.
        """
        if self.least > self.allowed:
            bits = isinstance(self.limit, Bits)
            numel = sum(entry.parameter.numel for entry in self.entries)
            said = f"{8 * self.least / numel:.3f} bits" if bits else f"{self.least:,} bytes"
            counts = "; what stays float counts too: `pcq quantize --dry-run` lists it"
            raise PcqError(
                f"{self.budget} is less than the smallest levels for every weight take, {said}",
                where="budget",
                todo="Give it more" + ("" if bits or not self.planned.plan.kept else counts),
            )

    def solve(
        self, losses: Sequence[Sequence[float]], uniform: Sequence[Uniformly]
    ) -> tuple[tuple[int, ...], float, float]:
        """Options, loss and gap. The header's size depends on the options, so the room for weights is found by trying;
        the gap is to the least loss in all the room that the shortest header leaves.

        The smallest options fit, and so does each of ``uniform``: in a small network these can be better than all that
        the room leaves beside the header of many options.
        """
        smallest = self.smallest
        room = self.allowed - self.header
        fitting = [tuple(smallest)]
        fitting += [(OPTIONS.index(each.option),) * len(self.entries) for each in uniform[:1]]
        bounds, enough, little = [], room + 1, None
        for _ in range(TRIALS):
            found = solve(self.costs, losses, room)
            if found is None:
                break
            bounds.append(found.bound)
            over = self.size(self.plan(self._named(found.choice))) - self.allowed
            if over <= 0:
                fitting.append(found.choice)
                little = room
            else:
                enough = found.cost
            if little is not None and enough - little <= 1:
                break
            room = found.cost - over if little is None else (little + enough) // 2
        lost = [sum(loss[k] for loss, k in zip(losses, choice, strict=True)) for choice in fitting]
        loss, choice = min(zip(lost, fitting, strict=True))
        return choice, loss, max(0.0, (loss - bounds[0]) / max(loss, 1e-300))

    def _named(self, choice: Sequence[int]) -> dict[str, Option]:
        return {entry.parameter.name: OPTIONS[k] for entry, k in zip(self.entries, choice, strict=True)}

    def uniform(self, losses: Sequence[Sequence[float]]) -> tuple[Uniformly, ...]:
        """Every option that fits for all weights alike, from the least loss."""
        found = []
        for k, (option, size) in enumerate(zip(OPTIONS, self.alike, strict=True)):
            if size <= self.allowed:
                found.append(Uniformly(option, size, sum(loss[k] for loss in losses)))
        return tuple(sorted(found, key=lambda each: each.loss))

    def losses(self, progress: Progress) -> list[list[float]]:
        """What each weight loses with each option."""
        from pcq.sensitivity import weight_noise

        rounded: dict[str, list[qtensor.QuantizedTensor]] = {}
        probes: dict[str, Tensor] = {}
        shares: dict[str, list[float]] = {}
        for index, entry in enumerate(self.entries):
            progress("options", index, len(self.entries))
            name = entry.parameter.name
            weight = self.planned.source.tensor(name).float()
            checkpoint.refuse_non_finite(name, weight)
            made = [qtensor.quantize(option.levels, weight, option.rows(entry.parameter)) for option in OPTIONS]
            shares[name] = [weight_noise(weight, each).share for each in made]
            if self.calibration is not None:
                probe = qtensor.quantize(PROBE, weight, Option(PROBE).rows(entry.parameter))
                share, most = weight_noise(weight, probe).share, max(shares[name])
                if share < UNMOVED * most:
                    share, probe = most, made[shares[name].index(most)]
                shares[name].append(share)
                rounded[name], probes[name] = [*made, probe], probe.dequantize()
        if self.calibration is None:
            return list(shares.values())
        from pcq.commands.analyzing import open_bench

        asked = self.calibration
        few = None if asked.samples is None else min(SAMPLES, asked.samples)
        bench, _ = open_bench(self.planned, asked.data, few, asked.seed, asked.input_shape, SAMPLES)
        known = {name for name in probes if name in bench.tensors}
        local = bench.local({name: [q.dequantize for q in rounded[name]] for name in known}, progress)
        alone = bench.one_by_one({}, {name: probes[name] for name in known}, "sensitivity", progress)
        result = []
        for entry in self.entries:
            name = entry.parameter.name
            damage = min(alone[name].error, ENDLESS) if name in alone else 1.0
            if name in local:
                factor = damage / max(local[name][-1].error, 1e-12)
                result.append([each.centred * factor for each in local[name][:-1]])
            else:
                factor = damage / max(shares[name][-1], 1e-12)
                result.append([share * factor for share in shares[name][:-1]])
        return result

    def allocation(
        self,
        settled: "Planned",
        options: Mapping[str, Option],
        loss: float,
        gap: float,
        uniform: tuple[Uniformly, ...],
        errors: tuple[float, float] | None,
        uniformly: bool,
        made: "Calibrated | None",
        finest: float,
    ) -> Allocation:
        size = self.size(settled)
        note = ""
        if size < CLOSE * self.allowed:
            note = self._why(options, self.allowed - size, uniformly, loss <= finest)
        return Allocation(
            self.budget, self.allowed, size, settled, options, loss, gap, uniform, errors, uniformly, note, made
        )

    def _why(self, options: Mapping[str, Option], left: int, uniformly: bool, finest: bool) -> str:
        """Why more than 1 % of the budget is left."""
        if uniformly:
            return "the best uniform allocation is better on the samples held out than one that uses the whole budget"
        if finest:
            return "every weight has the levels that lose least, and more bytes would gain nothing"
        steps = [
            min((more - cost[at] for more in cost if more > cost[at]), default=None)
            for entry, cost in zip(self.entries, self.costs, strict=True)
            for at in [OPTIONS.index(options[entry.parameter.name])]
        ]
        smallest = min((step for step in steps if step is not None), default=None)
        if smallest is not None and smallest > left:
            return f"{left:,} bytes are left, and the smallest step up of any weight takes {smallest:,}"
        return f"{left:,} bytes are left, and no step up that fits lowers the loss"
