"""How each quantized weight lies in the file, chosen for a purpose and the runtimes that have to run it.

    exact        codes packed in bytes, unpacked to float when a session is made: every runtime, the fewest bytes
    native       codes in ONNX's own types of 2 and 4 bits, cast to float when a session is made: loads quicker
    low-memory   the same types and 8 bits behind DequantizeLinear: packed in memory too, unpacked in every run
    matmulnbits  ONNX Runtime's own MatMulNBits: packed in memory too, but no operator of ONNX

Nothing here touches a graph: a pure function from what the weights are and who reads them to a choice for each, with
its reason. A layout is chosen only where every known runtime from the target on runs it right, as the table in
pcq.export.facts says.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from pcq.errors import PcqError
from pcq.export.facts import EXACT, IR_VERSIONS, RUNTIMES, Target, target
from pcq.export.frame import Frame, can_transpose
from pcq.export.stored import BLOCKS, Stored, blocked_bytes, castable, dequantizable, multipliable, typed_bytes
from pcq.grids import Affine, Grid
from pcq.qtensor import QuantizedTensor, stored_bytes
from pcq.rows import Rows

Layout = Literal["exact", "native", "low-memory", "matmulnbits"]
Aim = Literal["size", "speed", "ram"]
Level = Literal[1, 4]
"""MatMulNBits computes in float32 (1) or, where a runtime can, with activations rounded to int8 (4)."""

LOADING = {"exact": 16, "native": 12, "low-memory": 1, "matmulnbits": 1}
"""Bytes for each weight that loading takes for a moment, about (docs/onnx.md)."""

LOADS = {
    "exact": "longer than float: everything is unpacked",
    "native": "about as float: codes are cast",
    "low-memory": "shorter than float: codes stay packed",
    "matmulnbits": "shorter than float: codes stay packed",
}

_LIST = "its levels are a list, not integers times a scale"


@dataclass(frozen=True)
class Need:
    """A weight to lay out.

    Attributes:
        name: the parameter.
        grid, rows: its levels and rows.
        transposed: whether the graph wants the transpose.
        readers: what reads it: ``Conv``, ``ConvTranspose``, ``Gemm`` and ``MatMul`` multiply by it as layers do.
    """

    name: str
    grid: Grid
    rows: Rows
    transposed: bool
    readers: tuple[str, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.rows.shape)


@dataclass(frozen=True)
class Choice:
    """What was chosen for one weight.

    Attributes:
        layout: how it lies in the file.
        reason: why.
        stored: its integers; None: ``exact``.
        numel: how many weights.
        nbytes: bytes in the file.
        resident: bytes in memory while the network runs.
    """

    name: str
    layout: Layout
    reason: str
    stored: Stored | None
    numel: int
    nbytes: int
    resident: int


@dataclass(frozen=True)
class Plan:
    """Choices for all weights, in their order, and the operator set, the IR version and accuracy level they need."""

    choices: tuple[Choice, ...]
    opset: int
    ir_version: int
    level: Level

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in the file."""
        return sum(choice.nbytes for choice in self.choices)

    @property
    def resident(self) -> int:
        """Bytes of the weights in memory while the network runs."""
        return sum(choice.resident for choice in self.choices)

    @property
    def transient(self) -> int:
        """Bytes that a run takes for a moment: the largest weight that is unpacked in every run."""
        return 4 * max((choice.numel for choice in self.choices if choice.layout == "low-memory"), default=0)

    @property
    def loading(self) -> int:
        """Bytes that loading takes for a moment."""
        return sum(LOADING[choice.layout] * choice.numel for choice in self.choices)

    @property
    def load(self) -> str:
        """How long loading takes, in words: as that of the layout which most weights have."""
        numbers = dict.fromkeys(LOADS.values(), 0)
        for choice in self.choices:
            numbers[LOADS[choice.layout]] += choice.numel
        return max(numbers, key=lambda words: numbers[words])


def smallest(needs: Sequence[Need], goal: Target, size: Callable[[Plan], int]) -> Plan:
    """The plan for ``size``, or where that takes fewer bytes in all, one of fewer forms: each brings a function along.

    Args:
        needs, goal: as for :func:`plan`.
        size: bytes of the whole file by a plan.
    """
    rivals = [plan(needs, goal, aim="size"), plan(needs, goal, aim="speed"), plan(needs, goal)]
    different = {tuple((choice.layout, choice.stored) for choice in made.choices): made for made in reversed(rivals)}
    plans = list(reversed(different.values()))
    return plans[0] if len(plans) == 1 else min(plans, key=size)


def plan(
    needs: Sequence[Need], goal: Target, layout: Layout = "exact", aim: Aim | None = None, level: Level = 1
) -> Plan:
    """Choose a layout for each weight, and with them the file's operator set.

    Args:
        needs: the weights.
        goal: the runtimes that have to run the file.
        layout: what to use where it serves; ``exact`` elsewhere.
        aim: instead: of the layouts that run at the speed of float those of the fewest bytes (of equals, the quickest
            to load) or the quickest to load; or of all whose outputs are torch's up to rounding those of least memory.
        level: the accuracy level of MatMulNBits.

    Raises:
        PcqError: no weight can have that layout on these runtimes.
    """
    if aim is not None:
        level = 1
    opsets = [goal.opset, *(opset for opset in IR_VERSIONS if opset > goal.opset and goal.loads(opset))]
    plans = [_at(needs, goal, opset, layout, aim, level) for opset in opsets]
    best = min(plans, key=lambda made: (_cost(made, layout, aim), made.opset))
    if aim is None and layout != "exact" and all(choice.layout == "exact" for choice in best.choices):
        raise _refusal(needs, goal, layout, level, best)
    return best


def refuse(weights: Mapping[str, QuantizedTensor], goal: Target, layout: Layout, level: Level) -> None:
    """What :func:`plan` raises, raised before the network is traced: no weight can have the layout, whatever reads it.

    Raises:
        PcqError: as for :func:`plan`.
    """
    if layout != "exact" and weights:
        plan([need for name, weight in weights.items() for need in _possible(name, weight)], goal, layout, level=level)


def _possible(name: str, weight: QuantizedTensor) -> Iterator[Need]:
    """A weight with everything that may read it as a layer does."""
    grid, rows = weight.grid, weight.rows
    for reader in ("Gemm",) if len(rows.shape) == 2 else ("Conv", "ConvTranspose"):
        yield Need(name, grid, rows, False, (reader,))
    yield Need(name, grid, rows, can_transpose(rows), ("MatMul",))


def _cost(made: Plan, layout: Layout, aim: Aim | None) -> tuple[float, ...]:
    """What to keep small in choosing the operator set."""
    unpacked = sum(choice.numel for choice in made.choices if choice.layout == "exact")
    if aim is None:
        return -sum(choice.layout == layout for choice in made.choices), made.nbytes
    return {"size": (made.nbytes, unpacked), "speed": (unpacked, made.nbytes), "ram": (made.resident, made.nbytes)}[aim]


def _at(needs: Sequence[Need], goal: Target, opset: int, layout: Layout, aim: Aim | None, level: Level) -> Plan:
    """The plan for a file of this operator set."""
    choices = []
    for need in needs:
        able = list(options(need, goal, opset, level))
        choices.append(_wanted(able, layout) if aim is None else _best(able, aim))
    return Plan(tuple(choices), opset, goal.ir_version if opset == goal.opset else IR_VERSIONS[opset], level)


def _wanted(able: Sequence["Choice | Refused"], layout: Layout) -> Choice:
    """That layout, or exact with the reason."""
    for one in able:
        if one.layout == layout:
            return one if isinstance(one, Choice) else replace(_exact(able), reason=f"not {layout}: {one.why}")
    raise AssertionError(layout)


def _best(able: Sequence["Choice | Refused"], aim: Aim) -> Choice:
    served = ("low-memory", "matmulnbits") if aim == "ram" else ("native",)
    choices = [one for one in able if isinstance(one, Choice) and one.layout in ("exact", *served)]

    def cost(one: Choice) -> tuple[int, int]:
        slow = int(one.layout == "exact")
        return {"size": (one.nbytes, slow), "speed": (slow, one.nbytes), "ram": (one.resident, one.nbytes)}[aim]

    best = min(choices, key=cost)
    if best.layout != "exact":
        return best
    why = [f"not {one.layout}: {one.why}" for one in able if isinstance(one, Refused) and one.layout in served]
    return replace(best, reason="; ".join(why) or "the fewest bytes")


def _exact(able: Sequence["Choice | Refused"]) -> Choice:
    return next(one for one in able if isinstance(one, Choice) and one.layout == "exact")


@dataclass(frozen=True)
class Refused:
    """A layout that a weight cannot have, and why."""

    layout: Layout
    why: str


def options(need: Need, goal: Target, opset: int, level: Level) -> Iterator[Choice | Refused]:
    """Every layout that the weight can have in a file of this operator set, and why it cannot have the others."""
    nbytes = stored_bytes(need.grid, need.numel)
    yield Choice(need.name, "exact", "runs everywhere", None, need.numel, nbytes, 4 * need.numel)
    yield _native(need, goal, opset)
    yield _low_memory(need, goal, opset)
    yield _matmulnbits(need, goal, level)


def _native(need: Need, goal: Target, opset: int) -> Choice | Refused:
    if not isinstance(need.grid, Affine):
        return Refused("native", _LIST)
    forms = list(castable(need.grid))
    for stored in forms:
        if goal.folds(stored.kind, opset):
            wide = 16 if need.grid.halves == 2 else None
            nbytes = typed_bytes(need.grid, need.rows, stored, need.rows.g if stored.zero is None else 0, wide)
            reason = f"{stored.kind}, cast to float at load"
            return Choice(need.name, "native", reason, stored, need.numel, nbytes, 4 * need.numel)
    if not forms:
        return Refused("native", "more than 4 bits are bytes already")
    kinds = " or ".join(stored.kind for stored in forms)
    return Refused("native", f"ONNX Runtime {goal.ort} casts no {kinds} at load")


def _low_memory(need: Need, goal: Target, opset: int) -> Choice | Refused:
    grid, rows, frame = need.grid, need.rows, Frame(need.rows, need.transposed)
    if not isinstance(grid, Affine):
        return Refused("low-memory", _LIST)
    if "MatMul" in need.readers:
        return Refused("low-memory", "DequantizeLinear before MatMul would run in int8, unasked")
    if frame.way == "ragged" or (frame.way == "grouped" and (need.transposed or rows.axis == 1)):
        return Refused("low-memory", "DequantizeLinear has no such rows")
    forms = list(dequantizable(grid))
    for stored in forms:
        grain = "tensor" if frame.place == () else "channel"
        if need.readers and all(goal.dequantizes(reader, stored.kind, grain, opset) for reader in need.readers):
            nbytes = typed_bytes(grid, rows, stored, rows.g if stored.zero != 0 else 0)
            wide = "" if stored.unit == 1 else ", doubled because zero lies between two levels"
            reason = f"{stored.kind}{wide}, unpacked in every run"
            return Choice(need.name, "low-memory", reason, stored, need.numel, nbytes, nbytes)
    if not forms:
        return Refused("low-memory", "its integers do not fit into 8 bits")
    unknown = [reader for reader in need.readers if reader not in RUNTIMES[-1].dequantizes]
    if unknown or not need.readers:
        return Refused("low-memory", f"{(unknown or ['nothing'])[0]} reads it")
    return Refused("low-memory", f"ONNX Runtime {goal.ort} keeps no {forms[-1].kind} packed before {need.readers[0]}")


def _matmulnbits(need: Need, goal: Target, level: Level) -> Choice | Refused:
    grid, rows = need.grid, need.rows
    if set(need.readers) != ({"MatMul"} if need.transposed else {"Gemm"}):
        return Refused("matmulnbits", "it multiplies matrices only")
    if not isinstance(grid, Affine):
        return Refused("matmulnbits", _LIST)
    if rows.groups > 1 and (rows.axis is None or rows.width not in BLOCKS):
        return Refused("matmulnbits", f"its groups are no blocks of {', '.join(map(str, BLOCKS))}")
    missing = []
    for stored, form in multipliable(grid):
        error = goal.multiplies(stored.bits, form, level)
        if error is None or (level == 1 and error > EXACT):
            missing.append(f"{stored.bits} bits with {form} zero points" if form != "none" else f"{stored.bits} bits")
            continue
        widths = BLOCKS if rows.groups == 1 else (rows.width,)
        blocked = [replace(stored, block=block) for block in widths]
        smallest = min(blocked, key=lambda one: blocked_bytes(rows, one, form))
        nbytes = blocked_bytes(rows, smallest, form)
        how = "in float32" if error <= EXACT else "activations in int8"
        reason = f"{stored.bits} bits in blocks of {smallest.block}, {how}"
        return Choice(need.name, "matmulnbits", reason, smallest, need.numel, nbytes, nbytes)
    return Refused("matmulnbits", f"ONNX Runtime {goal.ort} has none of {', '.join(missing) or 'its integers'}")


def _refusal(needs: Sequence[Need], goal: Target, layout: Layout, level: Level, tried: Plan) -> PcqError:
    """No weight can have the layout: because of the runtimes (then, from which on it can) or of the weights."""
    for runtime in RUNTIMES:
        if _serves(needs, target(runtime.name), layout, level):
            return PcqError(
                f"these weights cannot have the layout '{layout}' on ONNX Runtime {goal.ort}", where="target ORT",
                allowed=f"{runtime.name} and later", todo=f"Give --target-ort {runtime.name}, or take another layout",
            )  # fmt: skip
    why = {choice.name: choice.reason for choice in reversed(tried.choices)}  # of several readers the first
    reasons = "; ".join(f"{name}: {reason}" for name, reason in [*reversed(why.items())][:3])
    others = [other for other in get_args(Layout) if _serves(needs, goal, other, level)]
    return PcqError(f"no weight of this network can have the layout '{layout}' ({reasons})", where="export",
                    allowed=", ".join(others), todo="Take another layout")  # fmt: skip


def _serves(needs: Sequence[Need], goal: Target, layout: Layout, level: Level) -> bool:
    """Whether a weight can have the layout on these runtimes."""
    opsets = [goal.opset, *(opset for opset in IR_VERSIONS if opset > goal.opset and goal.loads(opset))]
    plans = [_at(needs, goal, opset, layout, None, level) for opset in opsets]
    return any(choice.layout == layout for made in plans for choice in made.choices)
