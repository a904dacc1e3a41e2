"""Where a network's quantizable weights act, and what enters them.

A weight is calibrated where it is the matrix of a linear map ``y = x W^T`` on patches ``x``: convolutions of any
dimension, stride, dilation, grouping and transposition, and Linear, also with its matrix the other way round.
:func:`find` reads this off a tape. What it cannot read (a weight used twice, by an operation it does not know, or not
at all) it names with the reason.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pcq.rows import Rows
from pcq.tape import Op, Tape, Value

_TURNED = ("t", "transpose", "permute")
_PASSED = ("view", "_unsafe_view", "reshape", "alias", "detach", "clone", "contiguous")


@dataclass(frozen=True)
class Convolution:
    """The geometry of a convolution: ``aten.convolution``'s arguments and the kernel's size."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class Norm:
    """A BatchNorm in evaluation mode: its operation, the names of its tensors, and its epsilon."""

    op: int
    weight: str | None
    bias: str | None
    mean: str
    var: str
    eps: float


@dataclass(frozen=True)
class Layer:
    """One weight at work.

    Attributes:
        weight: its name.
        op: the operation it is used by.
        x: number of the value that enters.
        y: number of the value that leaves.
        bias: name of the bias that is added right there.
        norm: the BatchNorm that follows, if it is the only reader of ``y``.
        geometry: the convolution's, None for a Linear.
        turned: a Linear's weight is ``[in, out]``.
        own: the bias has a number for each output channel, is stored, and nothing else reads it.
    """

    weight: str
    op: int
    x: int
    y: int
    bias: str | None
    norm: Norm | None
    geometry: Convolution | None
    turned: bool = False
    own: bool = True

    @property
    def shifts(self) -> bool:
        """Whether a BatchNorm or a bias can take up what the mean of each output channel changes by."""
        return self.norm is not None or (self.bias is not None and self.own)

    @property
    def transposed(self) -> bool:
        """The weight's second axis are the output channels."""
        return self.turned if self.geometry is None else self.geometry.transposed

    @property
    def groups(self) -> int:
        return 1 if self.geometry is None else self.geometry.groups

    def channels(self, shape: tuple[int, ...]) -> Rows:
        """One row for each output channel, whatever the levels are shared by: ``[c, n]``, groups one after another."""
        if self.transposed:
            return Rows(shape, axis=1, blocks=self.groups)
        return Rows(shape)


def norms(tape: Tape) -> list[Norm]:
    """Every BatchNorm in evaluation mode whose tensors nothing else reads."""
    found = (_norm(tape, index) for index in range(len(tape.ops)))
    return [norm for norm in found if norm is not None]


def _norm(tape: Tape, index: int) -> Norm | None:
    op = tape.ops[index]
    if op.name != "native_batch_norm" or op.args[5] is not False:
        return None
    weight, bias, mean, var = (tape.name_of(argument) for argument in op.args[1:5])
    shared = [name for name in (weight, bias, mean, var) if name and _uses(tape, name) != 1]
    if mean is None or var is None or shared:
        return None
    return Norm(index, weight, bias, mean, var, op.args[7])


def _norm_after(tape: Tape, number: int) -> Norm | None:
    """The BatchNorm that alone reads ``number``."""
    user = tape.sole_user(number)
    return None if user is None else _norm(tape, user)


def _uses(tape: Tape, name: str) -> int:
    numbers = [number for number, other in tape.names.items() if other == name]
    return sum(len(tape.users.get(number, ())) for number in numbers)


def _own(tape: Tape, name: str | None, channels: int) -> bool:
    """Whether ``name`` is stored, has a number for each channel, and is read by one operation only."""
    return name is not None and tape.shapes.get(name, ())[-1:] == (channels,) and _uses(tape, name) == 1


def _through(tape: Tape, argument: Any) -> tuple[int, list[Op]]:
    """The value behind views and transpositions, and these, outermost first."""
    passed: list[Op] = []
    number = argument.number
    while number in tape.makers:
        op = tape.ops[tape.makers[number]]
        if op.name not in (*_TURNED, *_PASSED):
            break
        passed.append(op)
        number = op.args[0].number
    return number, passed


def _matrix(shape: tuple[int, ...], passed: list[Op]) -> tuple[int, ...] | None:
    """What a weight of ``shape`` has become behind ``passed``, but for being turned; None: its rows are others."""
    turned = False
    for op in reversed(passed):
        if op.name in _TURNED:
            turned = True
        elif "view" in op.name or op.name == "reshape":
            size = op.args[1]
            if turned or isinstance(size, torch.dtype) or size[0] != shape[0]:
                return None
            shape = tuple(torch.empty(shape, device="meta").reshape(size).shape)
    return shape


def _added_bias(tape: Tape, number: int) -> tuple[str | None, int]:
    """The parameter that is added to ``number`` right behind views, and the value after that."""
    user = tape.sole_user(number)
    while user is not None and tape.ops[user].name in _PASSED:
        number = tape.ops[user].outputs[0]
        user = tape.sole_user(number)
    if user is None or tape.ops[user].name != "add" or tape.ops[user].kwargs:
        return None, number
    names = [tape.name_of(argument) for argument in tape.ops[user].args[:2]]
    name = next((name for name in names if name is not None), None)
    return (None, number) if name is None else (name, tape.ops[user].outputs[0])


def _convolution(tape: Tape, index: int, op: Op, weight: str, shape: tuple[int, ...]) -> Layer:
    _, _, bias, stride, padding, dilation, transposed, output_padding, groups = op.args
    d = len(shape) - 2
    wide = [tuple(v) if len(v) == d else tuple(v) * d for v in (stride, padding, dilation, output_padding)]
    geometry = Convolution(shape[2:], wide[0], wide[1], wide[2], transposed, wide[3], groups)
    y, channels = op.outputs[0], shape[1] * groups if transposed else shape[0]
    name, norm = tape.name_of(bias), _norm_after(tape, y)
    return Layer(weight, index, op.args[0].number, y, name, norm, geometry, own=_own(tape, name, channels))


def _linear(tape: Tape, index: int, op: Op, weight: str, channels: int, turned: bool) -> Layer:
    x = op.args[1] if op.name == "addmm" else op.args[0]
    bias, y = (tape.name_of(op.args[0]), op.outputs[0]) if op.name == "addmm" else _added_bias(tape, op.outputs[0])
    norm, own = _norm_after(tape, op.outputs[0]), _own(tape, bias, channels)
    return Layer(weight, index, x.number, y, bias, norm, None, turned, own)


def find(tape: Tape, weights: dict[str, tuple[int, ...]]) -> tuple[list[Layer], dict[str, str]]:
    """The layers of ``weights`` (name -> shape) in the order they run, and for the rest name -> why there is none."""
    layers: dict[str, Layer] = {}
    refused: dict[str, str] = {}
    for index, op in enumerate(tape.ops):
        for position, argument in enumerate(op.args):
            if not isinstance(argument, Value) or (op.name in ("t", "transpose", *_PASSED)):
                continue
            number, passed = _through(tape, argument)
            name = tape.names.get(number)
            if name is None or name not in weights:
                continue
            made = None
            turns, shape = [each.name for each in passed if each.name in _TURNED], _matrix(weights[name], passed)
            if op.name == "convolution" and position == 1 and not turns and shape == weights[name]:
                made = _convolution(tape, index, op, name, weights[name])
            elif (
                op.name in ("addmm", "mm")
                and position == len(op.args) - 1
                and turns in ([], ["t"], ["transpose"])
                and shape is not None
            ):
                made = _linear(tape, index, op, name, shape[0] if turns else shape[1], turned=not turns)
            if made is None:
                refused[name] = f"it is used by '{op.name}', which calibration does not know"
            elif index in tape.still:
                refused[name] = "what enters it is the same for all samples"
            elif name in layers:
                refused[name] = "it is used more than once"
            else:
                layers[name] = made
    for name in weights.keys() - layers.keys() - refused.keys():
        refused[name] = "the network does not use it on these samples"
    return [layer for name, layer in layers.items() if name not in refused], refused


def generator(seed: int, op: int, batch: int) -> torch.Generator:
    """A new one for what is drawn of one layer and batch: the same whatever else is drawn."""
    return torch.Generator().manual_seed(seed * 1_000_003 + op * 1009 + batch)


def patches(layer: Layer, x: Tensor, count: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """What one output position of each group sees: ``[groups, m, n]``, ``n`` in the order of the weight's row.

    ``count`` positions (of the samples and the plane together) are drawn with replacement by ``generator``; None takes
    all of them in order: samples outermost, then the output plane.
    """
    geometry = layer.geometry
    if geometry is None:
        flat = x.reshape(1, -1, x.shape[-1])
        if count is None or count >= flat.shape[1]:
            return flat
        return flat[:, torch.randint(flat.shape[1], (count,), generator=generator)]
    d = len(geometry.kernel)
    if x.ndim == d + 1:
        x = x[None]
    if geometry.transposed:
        x = _stuffed(x, geometry)
        stride: tuple[int, ...] = (1,) * d
    else:
        x = F.pad(x, [p for pad in reversed(geometry.padding) for p in (pad, pad)])
        stride = geometry.stride
    for axis, (k, step, apart) in enumerate(zip(geometry.kernel, stride, geometry.dilation, strict=True)):
        x = x.unfold(2 + axis, apart * (k - 1) + 1, step)[..., ::apart]
    if geometry.transposed:
        x = x.flip(tuple(range(2 + d, 2 + 2 * d)))
    # [b, c, *plane, *kernel] -> [b, *plane, c, *kernel]
    x = x.permute(0, *range(2, 2 + d), 1, *range(2 + d, 2 + 2 * d))
    plane = x.shape[: 1 + d]
    total = plane.numel()
    if count is not None and count < total:
        drawn = torch.randint(total, (count,), generator=generator)
        x = x[torch.unravel_index(drawn, plane)]
    x = x.reshape(-1, geometry.groups, x.shape[-1 - d] // geometry.groups * torch.Size(geometry.kernel).numel())
    return x.transpose(0, 1).contiguous()


def _stuffed(x: Tensor, geometry: Convolution) -> Tensor:
    """A transposed convolution's input with zeros between its pixels and padding, so that stride 1 follows."""
    planes = x.shape[2:]
    spread = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(planes, geometry.stride, strict=True)))
    where: list[Any] = [slice(None, None, s) for s in geometry.stride]
    spread[(..., *where)] = x
    pads = []
    for k, apart, p, extra in zip(
        geometry.kernel, geometry.dilation, geometry.padding, geometry.output_padding, strict=True
    ):
        pads.append((apart * (k - 1) - p, apart * (k - 1) - p + extra))
    return F.pad(spread, [p for pad in reversed(pads) for p in pad])
