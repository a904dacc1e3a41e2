"""Samples of networks with several inputs, an array for each by the name of the argument; and invented ones of one."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pcq.errors import PcqError, did_you_mean


class Several(PcqError):
    """Data of several inputs, where that of one was expected; ``arrays`` are those found, by name."""

    def __init__(self, what: str, arrays: Mapping[str, Any], *, where: str, allowed: str) -> None:
        super().__init__(what, where=where, allowed=allowed)
        self.arrays = arrays


def inputs(arrays: Mapping[str, Any], module: nn.Module, spec: str) -> tuple[Tensor, ...]:
    """The arrays in the order of ``module``'s arguments; whole numbers as int64, others as float32.

    Raises:
        PcqError: there is no such argument, or one before it is not given; the arrays are no numbers, or not of the
            same length.
    """
    takes = [
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if lost := [name for name in arrays if name not in takes]:
        what = f"the network has no input '{lost[0]}'"
        raise PcqError(what, where=spec, allowed=", ".join(takes), todo=did_you_mean(lost[0], takes))
    first = takes[: len(arrays)]
    if missing := [name for name in first if name not in arrays]:
        raise PcqError(f"it has no array for the input '{missing[0]}'", where=spec, allowed=", ".join(takes))
    found = tuple(_numbers(arrays[name], f"{spec}, {name}") for name in first)
    lengths = [len(array) if array.ndim else 0 for array in found]
    if 0 in lengths or len(set(lengths)) > 1:
        said = ", ".join(f"{name} {length}" for name, length in zip(first, lengths, strict=True))
        raise PcqError(f"its arrays do not have as many samples each: {said}", where=spec)
    return found


def _numbers(array: Any, where: str) -> Tensor:
    try:
        tensor = array.detach().cpu() if isinstance(array, Tensor) else torch.from_numpy(np.ascontiguousarray(array))
    except (TypeError, ValueError) as error:
        raise PcqError(f"an array is not made of numbers: {error}", where=where) from error
    return tensor.float() if tensor.is_floating_point() else tensor.long()


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
    sizes: list[int] = []
    ids = torch.zeros(1, *shape, dtype=torch.int64)
    with _Lookups(ids, sizes):
        refused_ids = _refused(module, ids)
    if refused_ids is None or "Long" in refused:
        return Random(shape, min(sizes, default=1))
    return Random(shape)


def _refused(module: nn.Module, x: Tensor) -> str | None:
    try:
        with torch.no_grad():
            module(x)
    except Exception as error:  # a network may raise anything
        return str(error)
    return None


class _Lookups(TorchDispatchMode):
    """Notes the sizes of the tables in which ``ids`` themselves are looked up."""

    def __init__(self, ids: Tensor, sizes: list[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storage, self._sizes = ids.data_ptr(), sizes

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.embedding.default and args[1].data_ptr() == self._storage:
            self._sizes.append(args[0].shape[0])
        return function(*args, **(kwargs or {}))
