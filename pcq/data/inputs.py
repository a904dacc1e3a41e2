"""Samples of networks with several inputs, an array for each by the name of the argument; and invented ones of one."""

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pcq.errors import PcqError, did_you_mean, first_line
from pcq.words import dimensions

LABELS = ("y", "labels")
"""Names of an array that is no input."""


SEVERAL = (
    "Give data with an array for each of them by its name, and y: npz:FILE, or a function that returns a dictionary"
)

MASK = "attention_mask"

LARGEST = 2**31
"""Numbers in one sample, at most."""

OTHER_TYPE = re.compile(r"scalar type|input type|dtype", re.I)
"""In torch's words about numbers of another type than a layer's."""


def sample_shape(shape: Sequence[int] | None) -> tuple[int, ...] | None:
    """One sample's shape as it was given; an empty one is none.

    Raises:
        PcqError: it is not made of whole numbers from 1 on, or a sample of it is too large to be run on.
    """
    if shape is None or (not isinstance(shape, int) and not len(shape)):
        return None
    sizes: list[Any] = [None] if isinstance(shape, int) else [*shape]
    if any(isinstance(size, bool) or not isinstance(size, int | np.integer) or size <= 0 for size in sizes):
        raise PcqError(f"{shape!r} is not one sample's shape", where="--input", allowed="sizes such as (3, 224, 224)")
    if math.prod(map(int, sizes)) > LARGEST:
        raise PcqError(f"a sample of {'x'.join(map(str, shape))} is too large", where="--input",
                       allowed=f"up to {LARGEST:,} numbers")  # fmt: skip
    return tuple(map(int, sizes))


class Several(PcqError):
    """Data of several inputs, where that of one was expected: ``arrays`` of inputs by name, and ``labels`` or None."""

    def __init__(self, what: str, arrays: Mapping[str, Any], *, where: str, allowed: str) -> None:
        super().__init__(what, where=where, allowed=allowed)
        self.arrays = {name: array for name, array in arrays.items() if name not in LABELS}
        self.labels = next((arrays[name] for name in LABELS if name in arrays), None)


def inputs(arrays: Mapping[str, Any], module: nn.Module, spec: str) -> dict[str, Tensor]:
    """The arrays by name, in the order of ``module``'s arguments, as :func:`numbers` makes them.

    Raises:
        PcqError: as :func:`in_order` and :func:`numbers` do.
    """
    order = in_order(arrays, module, spec)
    found = numbers(arrays, spec)
    return {name: found[name] for name in order}


def in_order(arrays: Mapping[str, Any], module: nn.Module, spec: str) -> list[str]:
    """The arrays' names in the order of ``module``'s arguments, which it takes from now on without any between them.

    Raises:
        PcqError: there is no such argument, or one that is needed is not given.
    """
    _take_all(module)
    takes = names(module)
    if lost := [name for name in arrays if name not in takes]:
        what = f"the network has no input '{lost[0]}'"
        raise PcqError(what, where=spec, allowed=", ".join(takes), todo=did_you_mean(lost[0], takes))
    if missing := [name for name in needed(module) if name not in arrays]:
        raise PcqError(f"it has no array for the input '{missing[0]}'", where=spec, allowed=", ".join(takes))
    order = [name for name in takes if name in arrays]
    if order != takes[: len(order)]:
        _take_only(module, order)
    return order


class _Bound:
    """A network's class that takes some of its arguments by position, and leaves the others at their defaults.

    It is a class, so that copies of the network take the same, and all that calls it.
    """


def _take_only(module: nn.Module, order: Sequence[str]) -> None:
    kind = type(module)
    arguments = _arguments(module)

    def forward(self: nn.Module, *values: Any, **named: Any) -> Any:
        return kind.forward(self, **dict(zip(order, values, strict=False)), **named)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    taken = [arguments[name].replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in order]
    setattr(forward, "__signature__", inspect.Signature([own, *taken]))  # noqa: B010
    module.__class__ = type(kind.__name__, (kind, _Bound), {"forward": forward})


def bind_as(module: nn.Module, other: nn.Module) -> None:
    """Let ``module``, of the same network, take the arguments that ``other`` takes."""
    module.__class__ = type(other)


def _take_all(module: nn.Module) -> None:
    """As the network was before other data had bound its arguments."""
    if isinstance(module, _Bound):
        module.__class__ = type(module).__bases__[0]


def refuse_one(module: nn.Module, where: str, notes: Sequence[str] = ()) -> None:
    """The data has one input; ``notes``: what else it says.

    Raises:
        PcqError: the network does not run without others.
    """
    if len(takes := needed(module)) > 1:
        said = " ".join(["", *notes]).rstrip(".")
        what = f"the network takes {len(takes)} inputs ({', '.join(takes)}), and the data has one"
        raise PcqError(f"{what}.{said}" if said else what, where=where, todo=SEVERAL)


def refuse_others(takes: Sequence[str], has: Sequence[str], where: str) -> None:
    """The data has arrays of these names, or one input without a name.

    Raises:
        PcqError: a model that ``takes`` inputs of those names takes others.
    """
    if not has and len(takes) != 1:
        what = f"it has {len(takes)} inputs ({', '.join(takes)})"
        raise PcqError(what, where=where, allowed="a model of one input", todo=SEVERAL)
    if has and (lost := [name for name in (*has, *takes) if name not in takes or name not in has]):
        what = f"its inputs are {', '.join(takes)}, the data has {', '.join(has)}"
        raise PcqError(what, where=where, todo=did_you_mean(lost[0], takes))


def numbers(arrays: Mapping[str, Any], spec: str) -> dict[str, Tensor]:
    """Tensors of as many samples each: bools, whole numbers as int64, others as float32, 8-bit images divided by 255.

    Raises:
        PcqError: the arrays are no numbers, or NaN, or not of the same length.
    """
    found = {name: _numbers(array, f"{spec}, {name}") for name, array in arrays.items()}
    lengths = {name: len(array) if array.ndim else 0 for name, array in found.items()}
    if 0 in lengths.values() or len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise PcqError(f"its arrays do not have as many samples each: {said}", where=spec)
    return found


def hides_tokens(name: str) -> bool:
    """Whether an input of that name says which tokens are real: ``attention_mask``, ``decoder_attention_mask``."""
    return name.endswith(MASK)


def named_mask(names: Sequence[str], inputs: Sequence[Tensor]) -> int | None:
    """Which of the inputs of these ``names`` is a mask ``[n, t]`` of tokens; None: none is."""
    at = names.index(MASK) if MASK in names else None
    return None if at is None or inputs[at].ndim != 2 or inputs[at].is_floating_point() else at


def of_tokens(y: Tensor, batch: Sequence[Tensor], at: int | None) -> Tensor:
    """Of an output ``[n, t, ...]`` the tokens ``[m, ...]`` that input number ``at`` does not mask; another as it is."""
    return y[batch[at] != 0] if at is not None and masks(batch[at], y) else y


def masks(mask: Tensor, y: Tensor) -> bool:
    """Whether ``y`` is an output ``[n, t, ...]`` of the tokens of ``mask`` ``[n, t]``."""
    return y.ndim > 2 and y.shape[:2] == mask.shape


def of_any_length(inputs: Sequence[Tensor]) -> list[bool]:
    """Of each input whether it is whole numbers or booleans ``[n, t]`` of which there may be more or fewer: tokens,
    their mask, their types; a mask of frames that are floats has their number."""
    frames = {size for x in inputs if x.is_floating_point() for size in x.shape[1:]}
    return [x.ndim == 2 and not x.is_floating_point() and x.shape[1] > 1 and x.shape[1] not in frames for x in inputs]


def resized(names: Sequence[str], inputs: Sequence[Tensor], sizes: Sequence[Mapping[int, int]]) -> tuple[Tensor, ...]:
    """The inputs of these ``names``, cut along the axes in ``sizes`` to those; a mask then hides no token."""
    made = []
    for name, x, one in zip(names, inputs, sizes, strict=True):
        for axis, size in one.items():
            x = x.narrow(axis, 0, size)
        made.append(torch.ones_like(x) if one and hides_tokens(name) else x)
    return tuple(made)


@contextmanager
def refusing(inputs: Sequence[Tensor], todo: str = "") -> Iterator[None]:
    """Within it a network runs on ``inputs``.

    Raises:
        PcqError: it does not take them; ``todo``: what may help.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        where = f"samples of {' and '.join(dimensions(x.shape[1:]) for x in inputs)}"
        said, whole = first_line(error), [x.dtype for x in inputs if not x.is_floating_point()]
        if whole and OTHER_TYPE.search(said):
            where += f" in {str(whole[0]).removeprefix('torch.')}"
            todo = "Give numbers in float32, or images in uint8"
        elif OTHER_TYPE.search(said):
            todo = "It computes in other numbers than float32: export or build it in float32"
        if "custom C++ ops" in said:  # torchvision's
            todo = "Install the torchvision that is built for this torch"
        raise PcqError(f"the network does not take them: {said}", where=where, todo=todo) from error


def per_channel(value: Any, option: str, where: str, *, positive: bool = False) -> tuple[float, ...]:
    """Means or standard deviations: a number, or one for each channel, within what float32 holds.

    Raises:
        PcqError: one is not a finite number, or is not ``positive``.
    """
    value = value.tolist() if isinstance(value, (Tensor, np.ndarray)) else value
    kind, held = "a positive number" if positive else "a number", torch.finfo(torch.float32)
    several = tuple(value) if isinstance(value, (tuple, list)) and value else (value,)
    for one in several:
        real = isinstance(one, Real) and not isinstance(one, bool)
        if not real or not (held.tiny if positive else -held.max) <= one <= held.max:
            raise PcqError(
                f"{one!r} is not {kind}", where=f"{where}, {option}", allowed=f"{kind}, or one for each channel"
            )
    return tuple(map(float, several))


def names(module: nn.Module) -> list[str]:
    """What the network takes, in order: an exported program's inputs, else the arguments of ``forward``."""
    if isinstance(module, torch.fx.GraphModule):
        return [node.name for node in module.graph.nodes if node.op == "placeholder"]
    return list(_arguments(module))


def needed(module: nn.Module) -> list[str]:
    """The inputs that the network does not run without."""
    if isinstance(module, torch.fx.GraphModule):
        return names(module)
    return [name for name, parameter in _arguments(module).items() if parameter.default is parameter.empty]


def held_batch(module: nn.Module) -> int | None:
    """How many samples an exported program takes at once; None: any number."""
    if not isinstance(module, torch.fx.GraphModule):
        return None
    taken = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    sizes: list[object] = [x.shape[0] for x in taken if isinstance(x, Tensor) and x.ndim]
    fixed = [size for size in sizes if isinstance(size, int)]
    return fixed[0] if len(fixed) == len(sizes) and len(set(fixed)) == 1 else None


def filled(x: Tensor, batch: int) -> Tensor:
    """As many samples as ``batch``, zeros behind those that there are."""
    return torch.cat([x, x.new_zeros(batch - len(x), *x.shape[1:])]) if len(x) < batch else x


def _arguments(module: nn.Module) -> dict[str, inspect.Parameter]:
    return {
        name: parameter
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }


def tensor(array: Any, where: str) -> Tensor:
    """An array, a tensor, a number or a list of them as a dense tensor in main memory.

    Raises:
        PcqError: it is not made of numbers, or of complex ones, or is sparse.
    """
    if isinstance(array, Tensor):
        if array.layout != torch.strided:
            raise PcqError("a tensor is sparse", where=where, allowed="dense tensors", todo="Call its `to_dense()`")
        found = array.detach().cpu()
    else:
        try:
            held = np.asarray(array)
            if held.dtype.kind in "US":
                what, allowed = "an array is not made of numbers: it is of text", "arrays or tensors of numbers"
                todo = "Labels are class numbers: numpy.unique(labels, return_inverse=True)[1]"
                raise PcqError(what, where=where, allowed=allowed, todo=todo)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of memory that is only read, as np.memmap's: so it is here
                found = torch.from_numpy(held.astype(held.dtype.newbyteorder("="), order="C", copy=False))
        except (TypeError, ValueError, RuntimeError) as error:
            allowed = "arrays or tensors of numbers"
            raise PcqError(f"an array is not made of numbers: {error}", where=where, allowed=allowed) from error
    if found.is_complex():
        raise PcqError("the numbers are complex", where=where, allowed="real ones")
    return found


def refuse_kind(floats: bool, takes: "np.dtype[Any]", name: str, where: str, *, only: bool) -> None:
    """Samples of another kind than a model's input: it would round them, or take tokens for values.

    ``only``: it is the only input. Of several, whole numbers may be floats of the model, such as a mask's.

    Raises:
        PcqError: so it is.
    """
    if takes.kind == "f" and not floats and only:
        what, todo = f"the model takes floats as {name}, and the data has whole numbers", "Store them as float32"
        raise PcqError(what, where=where, todo=todo)
    if takes.kind != "f" and floats:
        what, todo = f"the model takes whole numbers as {name}, and the data has floats", "Store them as integers"
        raise PcqError(what, where=where, todo=todo)


def _numbers(array: Any, where: str) -> Tensor:
    found = tensor(array, where)
    if found.is_floating_point():
        refuse(found.isnan(), "NaN", where)  # infinities may be a mask's
        return found.float()
    if is_images(found):
        return channels_first(found)[0].float() / 255
    return found if found.dtype == torch.bool else found.long()


def refuse(bad: Tensor, what: str, where: str) -> None:
    """Samples of which numbers are ``bad``, if any are.

    Raises:
        PcqError: so it is; how many of them hold ``what``.
    """
    if lost := bad.reshape(len(bad), -1).any(1).nonzero().flatten().tolist():
        said = f"{len(lost)} of {len(bad):,} samples hold {what}, such as sample {lost[0]}"
        raise PcqError(said, where=where, todo="Repair them, or leave them out")


def is_images(samples: Tensor) -> bool:
    """Whether they are 8-bit arrays of three axes or more."""
    return samples.dtype == torch.uint8 and samples.ndim > 2


def channels_first(images: Tensor) -> tuple[Tensor, list[str]]:
    """``[n, h, w]`` with a channel axis, ``[n, h, w, c]`` of 1 or 3 channels as ``[n, c, h, w]``; and what was done."""
    notes = []
    if images.ndim == 3:
        images = images[:, None]
        notes.append("Images without a channel axis got one.")
    if images.ndim == 4 and images.shape[3] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.permute(0, 3, 1, 2)
        notes.append("The channels were last and are first now.")
    return images, notes


@dataclass(frozen=True)
class Random:
    """Random samples of ``shape``: normal numbers, or whole ones below ``ids``, such as numbers of tokens."""

    shape: tuple[int, ...]
    ids: int | None = None

    def __call__(self, batch: int, seed: int = 0) -> Tensor:
        """``[batch, *shape]``, float32 or int64."""
        generator = torch.Generator().manual_seed(seed)
        if self.ids is None:
            return torch.randn(batch, *self.shape, generator=generator)
        return torch.randint(self.ids, (batch, *self.shape), generator=generator)

    @property
    def example(self) -> Tensor:
        """One sample; zeros where they are floats, whose values do not matter."""
        return torch.zeros(1, *self.shape) if self.ids is None else self(1)


def taken(module: nn.Module, shape: tuple[int, ...]) -> Random:
    """What the network, in eval mode, takes as samples of that shape, found by running it: floats, else whole numbers.

    Whole numbers stay below the size of the table that they are looked up in. Where the network runs on neither, torch
    says what it expected, and says it again to whoever runs it.
    """
    refused = _refused(module, torch.zeros(1, *shape))
    if refused is None:
        return Random(shape)
    (size,), refused_ids = _lookups(module, (torch.zeros(1, *shape, dtype=torch.int64),))
    if refused_ids is None or "Long" in refused:
        return Random(shape, size)
    return Random(shape)


def varied(module: Callable[..., object], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs, whole numbers replaced by any from below the size of the table that they are looked up in."""
    sizes, _ = _lookups(module, inputs)
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randint(size, x.shape, generator=generator, dtype=x.dtype) if size > 1 else x
        for x, size in zip(inputs, sizes, strict=True)
    )


def _lookups(module: Callable[..., object], inputs: tuple[Tensor, ...]) -> tuple[list[int], str | None]:
    """For each input the size of the smallest table it is looked up in, 1 without any; and why the network refuses."""
    with _Lookups(inputs) as lookups:
        refused = _refused(module, *inputs)
    return lookups.sizes, refused


def runs(network: Callable[[Sequence[Tensor]], object], inputs: Sequence[Tensor]) -> bool:
    """Whether the network takes these inputs."""
    return _refused(network, inputs) is None


def _refused(module: Callable[..., object], *inputs: Any) -> str | None:
    try:
        with torch.no_grad():
            module(*inputs)
    except Exception as error:  # a network may raise anything
        return str(error)
    return None


class _Lookups(TorchDispatchMode):
    """Notes the sizes of the tables in which the inputs themselves are looked up."""

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes = [1] * len(inputs)
        self._inputs = {x.data_ptr(): i for i, x in enumerate(inputs)}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        i = self._inputs.get(args[1].data_ptr()) if function is torch.ops.aten.embedding.default else None
        if i is not None:
            rows = args[0].shape[0]
            self.sizes[i] = rows if self.sizes[i] == 1 else min(self.sizes[i], rows)
        return function(*args, **(kwargs or {}))
