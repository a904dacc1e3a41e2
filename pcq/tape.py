"""One forward pass, written down as the tensor operations it made, so that it can be run again piece by piece.

What calibration needs from a network is not its modules but its data flow: what enters each weight, which BatchNorm
follows it, who else uses a value. :func:`record` runs the module once and writes down every ATen operation; nothing is
traced symbolically, so any Python code will do (functional calls, padding inside ``forward``, tied modules).
:func:`run` replays any stretch of the tape with any other parameters, on samples of the recorded shape. What the pass
writes in place becomes a new value; so do the tensors of which it was a part. Recording ends with a full replay that
must equal the module's own output up to rounding; a module that fails it (randomness, branches on the data, tensors
that share memory in other ways) is refused.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from pcq.errors import PcqError, first_line


@dataclass(frozen=True)
class Value:
    """Stands in an operation's arguments for the tensor with this number."""

    number: int


@dataclass(frozen=True)
class Op:
    """``outputs = function(*args, **kwargs)``; tensors among the arguments are :class:`Value` s.

    ``read``: the number that the pass took out of tokens or masks, to branch on; it has to come out again.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[int, ...]
    read: int | bool | None = None

    @property
    def name(self) -> str:
        """``convolution``, ``addmm``, ...: without namespace and overload."""
        return str(self.function.overloadpacket.__name__)

    @cached_property
    def inputs(self) -> tuple[int, ...]:
        """Numbers of the tensors it reads."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return tuple(leaf.number for leaf in leaves if isinstance(leaf, Value))


@dataclass(frozen=True)
class Tape:
    """The operations of one forward pass, in order.

    Attributes:
        ops: what was computed.
        inputs: the numbers of the samples' tensors.
        names: number -> name in the state dict, for parameters and buffers.
        shapes: name -> shape, for those of them that the state dict holds; others, such as buffers that are not
            persistent, come from the network's code.
        constants: number -> tensor, for tensors that are neither.
        output: the module's result, tensors replaced by :class:`Value` s.
    """

    ops: tuple[Op, ...]
    inputs: tuple[int, ...]
    names: Mapping[int, str]
    shapes: Mapping[str, tuple[int, ...]]
    constants: Mapping[int, Tensor]
    output: Any

    @cached_property
    def results(self) -> tuple[int, ...]:
        """Numbers of the tensors in the module's result."""
        return tuple(leaf.number for leaf in pytree.tree_leaves(self.output) if isinstance(leaf, Value))

    @cached_property
    def still(self) -> frozenset[int]:
        """Operations that read nothing of the samples, such as the transposition of a weight."""
        sampled, found = set(self.inputs), set[int]()
        for index, op in enumerate(self.ops):
            if any(number in sampled for number in op.inputs):
                sampled.update(op.outputs)
            else:
                found.add(index)
        return frozenset(found)

    @cached_property
    def makers(self) -> Mapping[int, int]:
        """Number -> the operation that made it."""
        return {number: index for index, op in enumerate(self.ops) for number in op.outputs}

    @cached_property
    def users(self) -> Mapping[int, tuple[int, ...]]:
        """Number -> the operations that read it, one entry for each; the result counts as ``len(ops)``."""
        found: dict[int, list[int]] = {}
        for index, op in enumerate(self.ops):
            for number in dict.fromkeys(op.inputs):
                found.setdefault(number, []).append(index)
        for number in self.results:
            found.setdefault(number, []).append(len(self.ops))
        return {number: tuple(indices) for number, indices in found.items()}

    def name_of(self, argument: Any) -> str | None:
        """The state dict's name of a tensor among an operation's arguments."""
        return self.names.get(argument.number) if isinstance(argument, Value) else None

    def sole_user(self, number: int) -> int | None:
        """The operation that reads ``number``, if it is the only one."""
        users = self.users.get(number, ())
        return users[0] if len(users) == 1 and users[0] < len(self.ops) else None

    def live(self, at: int) -> tuple[int, ...]:
        """Numbers of the computed tensors that operation ``at`` or a later one still reads, and were made before it."""
        made = [*self.inputs, *(number for op in self.ops[:at] for number in op.outputs)]
        return tuple(number for number in made if self.users.get(number, (-1,))[-1] >= at)


Interpret = Callable[[Op, tuple[Any, ...]], Any]


@dataclass(frozen=True)
class _Look:
    """The tensor that a :class:`Value` stands for, in one replay; ``unmoved``: what has been made of tensors alone.

    Not a pair of closures: those would hold each other, and so all values, until the garbage is collected.
    """

    tape: Tape
    tensors: Mapping[str, Tensor]
    now: Mapping[int, Tensor]
    unmoved: dict[int, Tensor]

    def __call__(self, leaf: Any) -> Any:
        if not isinstance(leaf, Value):
            return leaf
        number = leaf.number
        if number in self.tape.names:
            return self.tensors[self.tape.names[number]]
        if number in self.now:
            return self.now[number]
        return self.tape.constants[number] if number in self.tape.constants else self.still(number)

    def still(self, number: int) -> Tensor:
        """What operations that read nothing of the samples made."""
        if number not in self.unmoved:
            op = self.tape.ops[self.tape.makers[number]]
            args, kwargs = pytree.tree_map(self, (op.args, dict(op.kwargs)))
            made = pytree.tree_leaves(_again(op, args, kwargs))
            self.unmoved.update(zip(op.outputs, (leaf for leaf in made if isinstance(leaf, Tensor)), strict=True))
        return self.unmoved[number]


def run(
    tape: Tape,
    tensors: Mapping[str, Tensor],
    values: Mapping[int, Tensor],
    start: int,
    stop: int,
    interpret: Mapping[str, Interpret] | None = None,
    gradient: bool = False,
) -> dict[int, Tensor]:
    """Replay operations ``start .. stop - 1`` and return the tensors alive then.

    What is made of ``tensors`` alone is made where it is read, wherever that was recorded: of those that are given.

    Args:
        tape: what to replay.
        tensors: the parameters and buffers to use, by name.
        values: the tensors alive at ``start``: the samples at 0, else what an earlier call returned for ``stop``.
        start: the first operation.
        stop: the operation to stop before; ``len(tape.ops)`` for all.
        interpret: operations (by name) to compute by ``(op, args) -> outputs`` instead of the recorded function.
        gradient: let autograd follow.
    """
    now = dict(values)
    look = _Look(tape, tensors, now, {})
    with torch.set_grad_enabled(gradient):
        for index in range(start, stop):
            op = tape.ops[index]
            if index in tape.still:
                now.update({number: look.still(number) for number in op.outputs if number in tape.results})
                continue
            args, kwargs = pytree.tree_map(look, (op.args, dict(op.kwargs)))
            other = interpret.get(op.name) if interpret else None
            made = other(op, args) if other else _again(op, args, kwargs)
            if op.read is not None and made != op.read:
                raise PcqError(
                    "its forward pass takes another way for some of the samples than for others",
                    todo="Give samples that are alike: all of them padded, or none",
                )
            tensors_made = [leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)]
            # Where autograd follows, an operation may hand it more, behind what was recorded.
            now.update(zip(op.outputs, tensors_made, strict=not gradient))
            for number in (*op.inputs, *op.outputs):
                if tape.users.get(number, (-1,))[-1] <= index:
                    now.pop(number, None)
    return now


def _again(op: Op, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What the operation makes of other tensors, which may lie in memory in another order."""
    if op.name in ("view", "_unsafe_view") and not isinstance(args[1], torch.dtype):
        return args[0].reshape(args[1])
    return op.function(*args, **kwargs)


_PARTS = {"slice": torch.ops.aten.slice_scatter.default, "select": torch.ops.aten.select_scatter.default}
"""Operations that give a part of a tensor, and those that put another part in its place."""


def output(tape: Tape, values: Mapping[int, Tensor]) -> Any:
    """The module's result, from what :func:`run` returned at the end of the tape."""

    def look(leaf: Any) -> Any:
        if not isinstance(leaf, Value):
            return leaf
        return values[leaf.number] if leaf.number in values else tape.constants[leaf.number]

    return pytree.tree_map(look, tape.output)


class _Recorder(TorchDispatchMode):
    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = WeakTensorKeyDictionary()  # what nothing holds any more is no one's input
        self.state = names
        self.names: dict[int, str] = {}
        self.constants: dict[int, Tensor] = {}
        self.sampled: set[int] = set()
        self.discrete: set[int] = set()  # of those: tokens, masks, and what is made of nothing else
        self.ops: list[Op] = []
        self.parts: dict[int, tuple[Op, weakref.ref[Tensor]]] = {}  # what made a part, of which tensor
        self.became: dict[int, int] = {}  # what a tensor was before it was written to, and then
        self.count = 0

    def new(self, tensor: Tensor) -> int:
        self.count += 1
        self.known[tensor] = self.count
        return self.count

    def value(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        number: int | None = self.known.get(leaf)
        if number is None:
            number = self.new(leaf)
            if id(leaf) in self.state:
                self.names[number] = self.state[id(leaf)]
            else:
                self.constants[number] = leaf.detach().clone()
        return Value(number)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known_args, known_kwargs = pytree.tree_map(self.value, (args, kwargs))
        op = Op(_functional(function), known_args, known_kwargs, ())
        sampled = any(number in self.sampled for number in op.inputs)
        discrete = sampled and all(n in self.discrete or n not in self.sampled for n in op.inputs)
        if (
            sampled
            and op.name in ("_local_scalar_dense", "nonzero", "equal")
            and not (discrete and op.name == "_local_scalar_dense")
        ):
            raise PcqError(
                "its forward pass branches on the values of its input, so it cannot be replayed",
                todo="Leave --calib out, or compute the same without branches, such as by a mask for packed sequences",
            )
        made = function(*args, **kwargs)
        if discrete and not isinstance(made, Tensor) and isinstance(made, int):
            op = replace(op, read=made)
        numbers = tuple(self.new(leaf) for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor))
        if sampled:
            self.sampled.update(numbers)
        if discrete and all(not t.is_floating_point() for t in pytree.tree_leaves(made) if isinstance(t, Tensor)):
            self.discrete.update(numbers)
        self.ops.append(replace(op, outputs=numbers))
        if op.name in _PARTS and isinstance(made, Tensor):
            self.parts[numbers[0]] = op, weakref.ref(args[0])
        elif op.function is not function and isinstance(made, Tensor):
            self.written(known_args[0].number, numbers[0])
        return made

    def written(self, before: int, now: int) -> None:
        """Value ``before`` has become ``now``: if it is a part of a tensor, that has become another, too."""
        self.became[before] = now
        if before not in self.parts:
            return
        made_by, whole = self.parts[now] = self.parts[before]
        old: int = made_by.args[0].number
        while old in self.became:
            old = self.became[old]
        args = (Value(old), Value(now), *made_by.args[1:])
        self.count = new = self.count + 1
        if (tensor := whole()) is not None:
            self.known[tensor] = new
        self.ops.append(Op(_PARTS[made_by.name], args, made_by.kwargs, (new,)))
        if {old, now} & self.sampled:
            self.sampled.add(new)
        if {old, now} <= self.discrete:
            self.discrete.add(new)
        self.written(old, new)


def _functional(function: Any) -> Any:
    """The operation that returns what ``function`` writes in place; ``function`` itself if there is none."""
    name = function.overloadpacket.__name__
    if not name.endswith("_") or name.startswith("_"):
        return function
    packet = getattr(torch.ops.aten, name[:-1], None)
    return getattr(packet, function._overloadname, function)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """``module`` in evaluation mode and without torch's fused attention kernels; both as before afterwards."""
    training = {sub: sub.training for sub in module.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    module.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for sub, was in training.items():
            sub.training = was


def state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, detached; tied ones once, under their first name."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach() for name, tensor in named.items()}


def record(module: nn.Module, samples: tuple[Tensor, ...]) -> Tape:
    """Run ``module(*samples)`` in evaluation mode and write down what it does.

    Raises:
        PcqError: the module does not take the samples, or the pass cannot be replayed exactly.
    """
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with evaluating(module), torch.no_grad():
        recorder = _Recorder({id(tensor): name for name, tensor in named.items()})
        inputs = tuple(recorder.new(sample) for sample in samples)
        recorder.sampled.update(inputs)
        recorder.discrete.update(n for n, sample in zip(inputs, samples, strict=True) if not sample.is_floating_point())
        try:
            with recorder:
                result = module(*samples)
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
            where = f"samples of {' and '.join('x'.join(map(str, x.shape[1:])) or 'one number' for x in samples)}"
            raise PcqError(f"the network does not take them: {first_line(error)}", where=where) from error
        tape = Tape(
            tuple(recorder.ops),
            inputs,
            recorder.names,
            {name: tuple(named[name].shape) for name in module.state_dict() if name in named},
            recorder.constants,
            pytree.tree_map(recorder.value, result),
        )
        again = output(tape, run(tape, state(module), dict(zip(inputs, samples, strict=True)), 0, len(tape.ops)))
    pairs = zip(pytree.tree_leaves(result), pytree.tree_leaves(again), strict=True)
    if not all(_same(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs):
        raise PcqError(
            "its forward pass gives something else when its operations are run again",
            todo="Take randomness, and writes into tensors that share memory with others, out of its forward pass.",
        )
    return tape


def _same(one: Tensor, other: Tensor) -> bool:
    """Up to rounding: in place and out of it, a processor may take other instructions."""
    if torch.equal(one, other):
        return True
    if one.shape != other.shape or one.dtype != other.dtype or not one.is_floating_point() or not one.numel():
        return False
    slack = 64 * torch.finfo(one.dtype).eps * one.abs().max()
    return bool(((one - other).abs() <= slack).all())
