"""Rules x named parameters -> Plan: what happens to every tensor, how, and why; printed before anything runs.

The first rule that matches a tensor decides. A rule that decides nothing is an error unless it is ``optional``, and a
weight that no rule matches stays float: every tensor of the state dict gets an entry, every float one a reason.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import Protocol, get_args

from pcq.errors import PcqError, raise_all
from pcq.qtensor import blank, stored_bytes
from pcq.quantizers import Quantizer
from pcq.rows import Rows
from pcq.rules import Kind, Match, Parameter, Rule, Shape

__all__ = ["Kept", "Parameter", "Plan", "Quantized", "make_plan"]


class Rules(Protocol):
    """What a plan is made of: a ``Recipe``."""

    @property
    def rules(self) -> tuple[Rule, ...]: ...

    def where(self, rule: int) -> str:
        """File and line of a rule, for messages."""
        ...

    def todo(self, correction: str) -> str:
        """What to do about a rule that decides nothing: ``correction``, if the user can make it."""
        ...


@dataclass(frozen=True)
class Quantized:
    """A parameter that gets levels: cut into ``rows``, fitted by ``quantizer``; rule number ``rule`` says so."""

    parameter: Parameter
    rows: Rows
    quantizer: Quantizer
    rule: int

    @property
    def grouping(self) -> str:
        """Which weights share levels, in words."""
        if self.rows.group is not None:
            return f"groups of {self.rows.width}"
        return "per tensor" if self.rows.axis is None else "per channel"

    @property
    def text(self) -> str:
        """Levels and grouping, in words."""
        return f"{self.quantizer.text}, {self.grouping}"

    @cached_property
    def nbytes(self) -> int:
        """Bytes it will take, scales and tables included; exact before anything runs."""
        return stored_bytes(blank(self.quantizer, self.rows), self.parameter.numel)

    @property
    def bits(self) -> float:
        """Bits for each weight, scales and tables included."""
        return 8 * self.nbytes / self.parameter.numel


@dataclass(frozen=True)
class Kept:
    """A parameter that stays as it is, and why."""

    parameter: Parameter
    reason: str

    @property
    def nbytes(self) -> int:
        """Bytes it takes; a tied parameter none of its own."""
        return 0 if self.parameter.tied_to is not None else self.parameter.nbytes


@dataclass(frozen=True)
class Plan:
    """One entry for every tensor of the state dict, in its order.

    Attributes:
        entries: what happens to each.
        notes: what the reader should know about them, one sentence each.
    """

    entries: tuple[Quantized | Kept, ...]
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def quantized(self) -> tuple[Quantized, ...]:
        return tuple(entry for entry in self.entries if isinstance(entry, Quantized))

    @property
    def kept(self) -> tuple[Kept, ...]:
        return tuple(entry for entry in self.entries if isinstance(entry, Kept))

    @property
    def bytes_before(self) -> int:
        """Bytes of all tensors as they are, tied ones once."""
        return sum(e.parameter.nbytes for e in self.entries if e.parameter.tied_to is None)

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors as planned, without the file's header."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def bits(self) -> float:
        """Bits for each quantized weight, scales and tables included; 0 if there is none."""
        weights = sum(entry.parameter.numel for entry in self.quantized)
        return 8 * sum(entry.nbytes for entry in self.quantized) / weights if weights else 0.0


def make_plan(recipe: Rules, parameters: Sequence[Parameter]) -> Plan:
    """Settle what happens to each of ``parameters``, the state dict in the model's order.

    A rule with levels passes over what cannot be quantized; one that keeps may name any parameter, and its reason is
    the one given. A tied parameter follows the one it is tied to, whatever the rules say about its name.

    Raises:
        PcqError: rules that match nothing, or only what earlier rules took, or that go by position where the order of
            ``parameters`` is not a model's; all of them together.
    """
    rules = recipe.rules
    layers = [p.name for p in parameters if p.unfit is None and p.kind != "embedding"]
    positions: dict[str, list[str]] = {}
    for name, position in zip([*layers[:1], *layers[-1:]], ("first", "last"), strict=False):
        positions.setdefault(name, []).append(position)

    meant = [
        [i for i, rule in enumerate(rules) if rule.holds(parameter, positions.get(parameter.name, ()))]
        for parameter in parameters
    ]
    entries: list[Quantized | Kept] = []
    deciding: list[int | None] = []
    for parameter, candidates in zip(parameters, meant, strict=True):
        unfit = parameter.unfit
        usable = [i for i in candidates if unfit is None or (rules[i].keep and parameter.tied_to is None)]
        deciding.append(usable[0] if usable else None)
        if not usable:
            entries.append(Kept(parameter, unfit or "no rule matched"))
        elif (levels := rules[usable[0]].levels) is None:
            entries.append(Kept(parameter, rules[usable[0]].keep or ""))
        else:
            entries.append(Quantized(parameter, rules[usable[0]].rows(parameter), levels, usable[0]))
    problems: list[PcqError] = []
    for i, rule in enumerate(rules):
        if any(match.position for match in rule.match) and _sorted_by_name(parameters):
            what = f"rule {i + 1} ({_matches(rule)}) goes by position, but the file lists its tensors by name"
            todo = (
                "Give --arch, which tells the order of the layers, or write their names instead of `first` and `last`"
            )
            problems.append(PcqError(what, where=recipe.where(i), todo=todo))
        elif i not in deciding and not rule.optional:
            problems.append(_idle(recipe, i, parameters, meant, deciding))
    raise_all(problems)
    plan = Plan(tuple(entries))
    return Plan(plan.entries, tuple(_grown(plan)))


def _idle(
    recipe: Rules,
    index: int,
    parameters: Sequence[Parameter],
    meant: Sequence[Sequence[int]],
    deciding: Sequence[int | None],
) -> PcqError:
    """Why a rule decides nothing."""
    rule = recipe.rules[index]
    where, which = recipe.where(index), f"rule {index + 1} ({_matches(rule)})"
    found = [(p, by) for p, candidates, by in zip(parameters, meant, deciding, strict=True) if index in candidates]
    todo = "Correct it, delete it, or give it `optional: true`"
    if taken := sorted({by for p, by in found if by is not None}):
        earlier = " and ".join(f"rule {by + 1} ({_matches(recipe.rules[by])})" for by in taken)
        names = _few(p.name for p, by in found if by is not None)
        return PcqError(
            f"{which} decides nothing: {earlier} before it takes all it matches ({names})",
            where=where,
            todo=recipe.todo(f"Move it up, or: {todo[0].lower()}{todo[1:]}"),
        )
    if found:
        names = _few(f"{p.name}: {p.unfit}" for p, _ in found)
        return PcqError(f"{which} matches only what cannot be quantized ({names})", where=where, todo=todo)
    weights = Counter(p.kind for p in parameters if p.unfit is None)
    there = ", ".join(f"{count} {kind}" for kind, count in weights.items()) or "none"
    near = _near(rule, parameters)
    hint = f"Near: {near}" if near else f"The weights that can be quantized: {there}"
    return PcqError(f"{which} matches nothing", where=where, todo=f"{hint}. {todo}")


def _matches(rule: Rule) -> str:
    return ", ".join(str(match) for match in rule.match)


def _few(names: Iterator[str], most: int = 4) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def _near(rule: Rule, parameters: Sequence[Parameter]) -> str:
    """What the patterns of a rule that matches nothing may have meant."""
    names = [p.name for p in parameters][:5000]
    modules = {name[: dot.start()] for name in names for dot in re.finditer(r"\.|$", name)}
    found: dict[str, None] = {}
    for pattern in dict.fromkeys(pattern for match in rule.match for pattern in match.name):
        if pattern in get_args(Kind) or pattern in get_args(Shape):
            found[f"{{{'type' if pattern in get_args(Kind) else 'shape'}: {pattern}}}"] = None
        elif any(Match((f"{pattern}.*",)).holds(p) for p in parameters):
            found[f'"{pattern}.*"'] = None
        else:
            found |= dict.fromkeys(get_close_matches(pattern.replace("*", "").strip("."), sorted(modules), 3))
    return ", ".join(found)


def _grown(plan: Plan) -> Iterator[str]:
    names = [e.parameter.name for e in plan.quantized if e.nbytes >= e.parameter.nbytes]
    if names:
        verb = "takes" if len(names) == 1 else "take"
        yield f"{_few(iter(names))} {verb} no fewer bytes than before: the scales and tables outweigh what is saved."


def _sorted_by_name(parameters: Sequence[Parameter]) -> bool:
    """Whether the order is certainly not a model's but that of the names, by which safetensors files are sorted.

    A model defines a layer's weight before its bias, and the second of a list of modules before the tenth.
    """
    places = {p.name: i for i, p in enumerate(parameters)}
    layers = [name.removesuffix("bias") for name in places if name.rpartition(".")[2] == "bias"]
    biased = [layer for layer in layers if f"{layer}weight" in places]
    if biased and all(places[f"{layer}bias"] < places[f"{layer}weight"] for layer in biased):
        return True
    numbers: dict[tuple[str, str], dict[str, None]] = {}
    for p in parameters:  # such a file holds one dtype after the other
        parts = p.name.split(".")
        for i in (i for i, part in enumerate(parts) if part.isdecimal()):
            numbers.setdefault((p.dtype, ".".join(parts[:i])), {})[parts[i]] = None
    return any(list(seen) == sorted(seen) != sorted(seen, key=int) for seen in numbers.values())
