"""Blocks refined after their layers: ProxConnect on the error of what a block puts out.

A layer's quadratic knows nothing of the nonlinearity behind it, of the branch it is added to, or of what the next layer
makes of its error. So the layers of a residual or transformer block are moved once more, together, with the blocks
before already refined. Minimised is ``E ||y_q - y||^2 / E ||y - E y||^2``, y what leaves the block in the float network
and ``y_q`` in the quantized one, over codes, levels, and the block's norms and biases. Blocks: BRECQ, arXiv 2102.05426.
The algorithm is ProxConnect (arXiv 2110.13220): the gradient is taken at the quantized point, the step at the latent.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pcq import tape as tapes
from pcq.calibrate.layers import Layer
from pcq.calibrate.padding import counted
from pcq.calibrate.quadratic import Codes, nearest, parameters_of, with_parameters
from pcq.grids import Grid
from pcq.progress import Progress, silent
from pcq.qtensor import QuantizedTensor
from pcq.tape import Tape, Value

TOGETHER = 3
"""Layers one after another, without a branch, that make up one block."""

RATE, LEVEL_RATE, FLOAT_RATE = 0.01, 0.0025, 0.005
"""Adam's rates: of latents and of levels in gaps between levels, of norms and biases in their root mean squares."""

SOFT = 0.3
"""The part of the steps over which the pull to the levels grows to its full strength."""


@dataclass(frozen=True)
class Block:
    """Operations ``start .. stop - 1`` of a tape, the weights in them to refine, and the value they are judged by."""

    start: int
    stop: int
    weights: tuple[str, ...]
    leaves: int | None


@dataclass(frozen=True)
class BlockReport:
    """One block: relative error of what leaves it, on the samples, with its layers as they were and refined.

    Where that is not lower the block stayed as it was.
    """

    weights: tuple[str, ...]
    before: float
    after: float


@dataclass(frozen=True)
class Refined:
    """What :func:`refine` found: as in ``pcq.calibrate.oneshot.Calibrated``, a report a block, samples used."""

    quantized: dict[str, QuantizedTensor]
    changed: dict[str, Tensor]
    blocks: tuple[BlockReport, ...]
    samples: int


def blocks(tape: Tape, layers: Sequence[Layer], weights: Sequence[str]) -> list[Block]:
    """The network in blocks, in order: a branch and what it is added to; else up to TOGETHER layers in a row.

    What comes after a block's last layer and has no weights (norms, activations) belongs to it. ``weights``: all that
    are quantized, refined or not.
    """
    at = {layer.op: layer.weight for layer in layers}
    found: list[Block] = []
    row = 0  # layers in a row, without a branch, that the last block has
    start = 0
    for stop, leaves in _cuts(tape, weights):
        inside = tuple(at[op] for op in range(start, stop) if op in at)
        if found and not inside:
            found[-1] = replace(found[-1], stop=stop, leaves=leaves)
        elif len(inside) == 1 and 0 < row < TOGETHER:
            found[-1] = replace(found[-1], stop=stop, leaves=leaves, weights=(*found[-1].weights, *inside))
            row += 1
        else:
            found.append(Block(start, stop, inside, leaves))
            row = 1 if len(inside) == 1 else 0
        start = stop
    return [_reached(tape, block) for block in found]


def _reached(tape: Tape, block: Block) -> Block:
    """Judged by what its weights have a part in: where that is not what leaves it, a result of the network, or none."""
    own = {number for number, name in tape.names.items() if name in block.weights}
    for op in tape.ops[: block.stop]:
        if any(number in own for number in op.inputs):
            own.update(op.outputs)
    if not block.weights or block.leaves in own:
        return block
    return replace(block, leaves=next((number for number in reversed(tape.results) if number in own), None))


def _cuts(tape: Tape, weights: Sequence[str]) -> list[tuple[int, int | None]]:
    """Where only one value is under way that the ``weights`` have a part in, and its number; last the tape's end."""
    touched = {number for number, name in tape.names.items() if name in set(weights)}
    last = {number: users[-1] for number, users in tape.users.items()}
    found: list[tuple[int, int | None]] = []
    under_way: set[int] = set()
    sampled = set(tape.inputs)
    for at, op in enumerate(tape.ops):
        if any(number in sampled for number in op.inputs):
            sampled.update(op.outputs)
        if any(number in touched for number in op.inputs):
            touched.update(op.outputs)
            under_way.update(op.outputs)
        under_way = {number for number in under_way if last.get(number, -1) > at}
        if len(under_way) == 1 and under_way <= sampled and at + 1 < len(tape.ops):
            found.append((at + 1, next(iter(under_way))))
    before = found[-1][0] if found else 0
    results = [n for n in tape.results if n in touched and tape.makers.get(n, -1) >= before]
    return [*found, (len(tape.ops), results[-1] if results else None)]


def latents(weight: Tensor, quantized: QuantizedTensor, margin: float = 0.05) -> Tensor:
    """The float ``weight`` moved no more than is needed for ``quantized``'s codes to be its nearest levels.

    A weight stays ``margin`` of a gap off the middle between two levels. Training that starts here rounds to
    ``quantized`` at first, and a weight that was near another level soon finds it.
    """
    rows, grid = quantized.rows, quantized.grid
    levels = grid.levels().expand(rows.g, -1)
    gaps, middles = levels.diff(dim=1), (levels[:, 1:] + levels[:, :-1]) / 2
    far = levels.new_full((rows.g, 1), torch.inf)
    codes = rows.split(quantized.codes).long()
    low = torch.cat([-far, middles + margin * gaps], 1).gather(1, codes)
    high = torch.cat([middles - margin * gaps, far], 1).gather(1, codes)
    return rows.merge(torch.minimum(torch.maximum(rows.split(weight.float()), low), high)).contiguous()


class _Moving:
    """A weight under way: latents ``[g, w]`` and what its levels are made of, both trained."""

    def __init__(self, weight: Tensor, start: QuantizedTensor) -> None:
        self.rows, self.grid = start.rows, start.grid
        g, width = start.rows.g, start.rows.width
        index = torch.arange(g)[:, None] if start.grid.g == g else torch.zeros(g, 1, dtype=torch.long)
        self.row = index[None].expand(1, g, width)
        self.latent = self.rows.split(latents(weight, start)).clone().requires_grad_()
        self.levels = parameters_of(self.grid).clone().requires_grad_()
        levels = self.grid.levels()
        self.gap = float((levels[:, -1] - levels[:, 0]).mean()) / (self.grid.count - 1)

    def _codes(self) -> tuple[Tensor, Grid]:
        grid = with_parameters(self.grid, self.levels.detach())
        return nearest(grid, self.row, self.latent.detach()[None]).codes, grid

    def point(self, strength: float) -> Tensor:
        """``(1 - s) w* + s nearest(w*)`` in the weight's shape; its gradient goes to w* unchanged, and to levels."""
        codes, _ = self._codes()
        hard = Codes(codes, with_parameters(self.grid, self.levels), self.row).decode()[0]
        still = self.latent.detach()
        return self.rows.merge(strength * hard + (1 - strength) * still + (self.latent - still))

    def keep_order(self) -> None:
        """Scales stay above zero, levels ascending."""
        with torch.no_grad():
            if self.levels.shape[1] == 1:
                self.levels.clamp_(min=0)
            else:
                self.levels.copy_(self.levels.sort(1).values)

    def result(self) -> QuantizedTensor:
        codes, grid = self._codes()
        return QuantizedTensor(self.rows.merge(codes[0]).contiguous(), grid, self.rows)


def refine(
    tape: Tape,
    found: Sequence[Block],
    quantized: Mapping[str, QuantizedTensor],
    changed: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    parts: Sequence[tuple[Tensor, ...]],
    steps: int,
    memory: int = 2**30,
    seed: int = 0,
    progress: Progress = silent,
    mask: int | None = None,
    listed: Collection[str] = (),
) -> Refined:
    """Refine one block after the other; one that its refinement does not help stays as it was.

    Args:
        tape: of the network, in batches of the size of ``parts``'.
        found: its blocks, from :func:`blocks`.
        quantized: name -> quantized weight to start from; those that belong to no block stay.
        changed: name -> other tensors that differ from the float network's.
        tensors: the float network's.
        parts: the samples in equal batches; as many are used as ``memory`` bytes hold what moves between blocks of.
        steps: optimizer steps for each block, a batch each.
        memory: see ``parts``.
        seed: of the order of the batches.
        progress: called once a block.
        mask: which of the inputs masks tokens (``pcq.calibrate.padding``); those do not count.
        listed: weights whose levels stay as they are.
    """
    quantized, changed = dict(quantized), dict(changed)
    student = {**tensors, **changed, **{name: q.dequantize() for name, q in quantized.items()}}
    parts = parts[: max(1, memory // _moving_bytes(tape, found, tensors, parts[0]))]
    exact = [dict(zip(tape.inputs, part, strict=True)) for part in parts]
    values = list(exact)
    places = [(block.stop, block.leaves) for block in found if block.leaves is not None]
    real = [counted(tape, tensors, part, mask, places) for part in parts]
    reports = []
    for index, block in enumerate(found):
        progress("refining blocks", index, len(found))
        aims = [tapes.run(tape, tensors, v, block.start, block.stop) for v in exact]
        coming = [tapes.run(tape, student, v, block.start, block.stop) for v in values]
        if block.weights and block.leaves is not None:
            leaves = block.leaves
            wanted = [Wanted.of(aim[leaves], rows.get(leaves)) for aim, rows in zip(aims, real, strict=True)]
            before = _error([v[block.leaves] for v in coming], wanted)
            moved, fresh = _trained(tape, block, quantized, student, tensors, values, wanted, steps, seed, listed)
            trial = {**student, **fresh, **{name: q.dequantize() for name, q in moved.items()}}
            after = [tapes.run(tape, trial, v, block.start, block.stop) for v in values]
            error = _error([v[block.leaves] for v in after], wanted)
            reports.append(BlockReport(block.weights, before, error))
            if error < before:
                quantized.update(moved)
                changed.update(fresh)
                student, coming = trial, after
        exact, values = aims, coming
    progress("refining blocks", len(found), len(found))
    return Refined(quantized, changed, tuple(reports), len(parts) * len(parts[0][0]))


def _moving_bytes(tape: Tape, found: Sequence[Block], tensors: Mapping[str, Tensor], part: tuple[Tensor, ...]) -> int:
    """Of one batch, at most: what enters a block, twice, and what leaves it, three times."""
    values = dict(zip(tape.inputs, part, strict=True))
    most = 1
    for block in found:
        after = tapes.run(tape, tensors, values, block.start, block.stop)
        sizes = [sum(tensor.nbytes for tensor in each.values()) for each in (values, after)]
        most, values = max(most, 2 * sizes[0] + 3 * sizes[1]), after
    return most


@dataclass(frozen=True)
class Wanted:
    """What is to leave a block for one batch, and which of it counts: 1 or 0, of a shape that broadcasts to it."""

    value: Tensor
    counts: Tensor

    @staticmethod
    def of(value: Tensor, rows: Tensor | None) -> "Wanted":
        counts = torch.ones(1) if rows is None else rows[..., None].to(value.dtype)
        infinite = value.isinf()  # masked outputs
        return Wanted(value.masked_fill(infinite, 0), counts * ~infinite) if infinite.any() else Wanted(value, counts)

    def missed(self, y: Tensor) -> Tensor:
        """Sum of squared differences."""
        return torch.where(self.counts > 0, y - self.value, 0).square().sum()


def _error(y: Sequence[Tensor], wanted: Sequence[Wanted]) -> float:
    above = sum(float(w.missed(a)) for a, w in zip(y, wanted, strict=True))
    return above / max(_spread(wanted), 1e-30)


def _spread(wanted: Sequence[Wanted]) -> float:
    """Sum of squared differences from the mean of all samples, place by place."""
    total = sum((w.value * w.counts).sum(0) for w in wanted)
    count = sum(w.counts.expand(len(w.value), *w.counts.shape[1:]).sum(0) for w in wanted)
    return sum(float(w.missed(total / torch.as_tensor(count).clamp(min=1))) for w in wanted)


def _trained(
    tape: Tape,
    block: Block,
    quantized: Mapping[str, QuantizedTensor],
    student: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    values: Sequence[Mapping[int, Tensor]],
    wanted: Sequence[Wanted],
    steps: int,
    seed: int,
    listed: Collection[str],
) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
    """The block's weights on their levels, and its norms and biases, after ``steps`` steps."""
    moving = {name: _Moving(tensors[name], quantized[name]) for name in block.weights}
    floats = {name: student[name].clone().requires_grad_() for name in norms_and_biases(tape, block, student)}
    groups: list[dict[str, object]] = []
    for name, weight in moving.items():
        groups.append({"params": [weight.latent], "lr": RATE * weight.gap})
        if name not in listed:
            groups.append({"params": [weight.levels], "lr": LEVEL_RATE * weight.gap})
    for tensor in floats.values():
        size = float(tensor.detach().square().mean().sqrt())
        groups.append({"params": [tensor], "lr": FLOAT_RATE * max(size, 1e-3)})
    optimizer = torch.optim.Adam(groups)
    peaks = [group["lr"] for group in optimizer.param_groups]
    scale = _spread(wanted) / len(wanted)
    if scale <= 0:
        return {}, {}
    generator = torch.Generator().manual_seed(seed)
    order = list[int]()
    for t in range(steps):
        order = order or torch.randperm(len(values), generator=generator).tolist()
        which, done = order.pop(), t / steps
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * (1 + math.cos(math.pi * done)) / 2
        points = {name: weight.point(min(1.0, done / SOFT)) for name, weight in moving.items()}
        now = tapes.run(tape, {**student, **floats, **points}, values[which], block.start, block.stop, gradient=True)
        assert block.leaves is not None
        loss = wanted[which].missed(now[block.leaves]) / scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for weight in moving.values():
            weight.keep_order()
    found = {name: weight.result() for name, weight in moving.items()}
    return found, {name: tensor.detach() for name, tensor in floats.items()}


def norms_and_biases(tape: Tape, block: Block, tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the block's stored finite tensors of one axis that nothing outside of it reads, statistics aside."""
    found: dict[str, None] = {}
    for op in tape.ops[block.start : block.stop]:
        statistics = op.args[3:5] if op.name == "native_batch_norm" else ()
        passed = {argument.number for argument in statistics if isinstance(argument, Value)}
        for number in op.inputs:
            users = tape.users[number]
            own = block.start <= users[0] and users[-1] < block.stop
            name = tape.names.get(number)
            if name is not None and name in tape.shapes and own and number not in passed and _trainable(tensors[name]):
                found[name] = None
    return list(found)


def _trainable(tensor: Tensor) -> bool:
    return tensor.ndim == 1 and tensor.is_floating_point() and bool(tensor.isfinite().all())
