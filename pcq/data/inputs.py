"""Samples of networks with several inputs: an array for each, by the name of the argument."""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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
