"""Weights kept as a length and a direction, g * v / |v| (arXiv 1602.07868): found, put together, left out of a network.

torch keeps them as ``weight_g`` and ``weight_v``, or as ``parametrizations.weight.original0`` and ``original1``. The
norm is over all axes but one, which g's shape tells, or over all, where g is a single number.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import remove_parametrizations
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

FLOATS = ("float16", "bfloat16", "float32", "float64")
OLD = re.compile(r"((?:.*\.)?weight\w*)_g")
NEW = re.compile(r"((?:.*\.)?)parametrizations\.(\w+)\.original0")


@dataclass(frozen=True)
class Parts:
    """The names of the two parts of a weight, and the axis that its norms are not taken over; -1: over all axes."""

    g: str
    v: str
    axis: int

    def join(self, g: Tensor, v: Tensor) -> Tensor:
        """The weight, as torch computes it."""
        return torch._weight_norm(v, g, self.axis).detach()


def parts(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> dict[str, Parts]:
    """Name of a weight -> its parts, for every two tensors whose names and shapes are those of a weight_norm."""
    found: dict[str, Parts] = {}
    parametrized: dict[str, int] = {}
    for name in shapes:
        if "parametrizations." in name:
            stem = name[: name.find(".", name.index("parametrizations.") + len("parametrizations."))]
            parametrized[stem] = parametrized.get(stem, 0) + 1
    for g in shapes:
        if old := OLD.fullmatch(g):
            weight, v = old[1], f"{old[1]}_v"
        elif (new := NEW.fullmatch(g)) and parametrized[g.removesuffix(".original0")] == 2:
            weight, v = new[1] + new[2], g.removesuffix("0") + "1"
        else:
            continue
        if v not in shapes or weight in shapes or dtypes[g] != dtypes[v] or dtypes[v] not in FLOATS:
            continue
        axis = _axis(shapes[g], shapes[v])
        if axis is not None:
            found[weight] = Parts(g, v, axis)
    return found


def whole(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with every weight of a weight_norm put together, at the end."""
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in state.items()}
    found = parts({name: tuple(tensor.shape) for name, tensor in state.items()}, dtypes)
    gone = {name for each in found.values() for name in (each.g, each.v)}
    rest = {name: tensor for name, tensor in state.items() if name not in gone}
    return rest | {name: each.join(state[each.g], state[each.v]) for name, each in found.items()}


def _axis(g: tuple[int, ...], v: tuple[int, ...]) -> int | None:
    if len(v) < 2:
        return None
    if g == ():
        return -1
    fits = (axis for axis in range(len(v)) if g == tuple(n if i == axis else 1 for i, n in enumerate(v)))
    return next(fits, None)


def remove(module: nn.Module) -> int:
    """Put every weight of a weight_norm together in place, as a parameter before the biases; ``-> how many``."""
    count = 0
    for owner in module.modules():
        names = [hook.name for hook in owner._forward_pre_hooks.values() if isinstance(hook, WeightNorm)]
        for name in names:
            remove_weight_norm(owner, name)
        lists = getattr(owner, "parametrizations", {})
        normed = [name for name, each in lists.items() if len(each) == 1 and isinstance(each[0], _WeightNorm)]
        for name in normed:
            trained = any(part.requires_grad for part in lists[name].parameters())
            remove_parametrizations(owner, name)
            value = getattr(owner, name).detach()
            owner._buffers.pop(name, None)  # where torch puts what is not trained
            owner.register_parameter(name, nn.Parameter(value, trained))
        if names or normed:
            owner._parameters = dict(sorted(owner._parameters.items(), key=lambda item: "bias" in item[0]))
            count += len(names) + len(normed)
    return count


def note(count: int) -> str:
    """What was done, in a sentence."""
    if count == 1:
        return "Put 1 weight together from the parts of its weight_norm."
    return f"Put {count} weights together from the parts of their weight_norm."
