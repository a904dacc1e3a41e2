"""Which of a network's outputs counts: what it calls its logits, else the first."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils import _pytree as pytree

NAME = "logits"

Array = TypeVar("Array", Tensor, npt.NDArray[np.float32])


def main_output(out: Any) -> Any:
    """Of what a network returned its ``logits``, an attribute (Hugging Face) or a key, else the first of it."""
    while True:
        if isinstance(out, Mapping) and len(out):
            out = out[NAME] if NAME in out else next(iter(out.values()))
        elif hasattr(out, NAME):
            out = getattr(out, NAME)
        elif isinstance(out, tuple | list) and len(out):
            out = out[0]
        else:
            return out


def flat(out: Array, labelled: bool) -> Array:
    """Outputs [b, c, 1, 1] as [b, c], with labels [b, c, 1] too; others as they are."""
    single = out.ndim > (2 if labelled else 3) and math.prod(out.shape[2:]) == 1
    return out.reshape(out.shape[:2]) if single else out


def predicts(out: Tensor | npt.NDArray[Any]) -> bool:
    """Whether they are [b, classes], of two classes or more: of one number no largest one can be told."""
    return out.ndim == 2 and out.shape[1] > 1


def tensors(out: Any) -> list[Tensor]:
    """All tensors of what a network returned, in its order."""
    return [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]


def all_tensors(out: Any) -> list[Tensor]:
    """As :func:`tensors`, that of :func:`main_output` before the others."""
    found = tensors(out)
    main = main_output(out)
    return [main, *(leaf for leaf in found if leaf is not main)] if isinstance(main, Tensor) else found


def main_name(names: Sequence[str]) -> str:
    """Of an ONNX graph's outputs the one that counts."""
    return NAME if NAME in names else names[0]


def of_each_sample(result: object, n: int) -> dict[int, Tensor]:
    """Of what a network puts out the floating tensors with a row for each of ``n`` samples; ``logits`` come first.

    By their places: another tensor may have as many rows by chance, but not in batches of all sizes.
    """
    found = enumerate(all_tensors(result))
    return {place: leaf for place, leaf in found if leaf.is_floating_point() and leaf.ndim and len(leaf) == n}
