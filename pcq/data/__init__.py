"""Data specs -> data sets.

digits                         scikit-learn's 8x8 digits
fashion-mnist[:DIR]            idx files, in DIR or where Debian and torchvision put them
cifar10:DIR                    image folders train/ and test/, or torchvision's cifar-10-batches-py
folder:DIR?size=224&resize=256&mean=0.485,0.456,0.406&std=0.229,0.224,0.225
npz:FILE                       arrays x and y, or images and labels
file.py:function?key=value     package.module:function
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from pcq.data.arrays import from_arrays, numbered, open_npz, open_own
from pcq.data.dataset import Batch, Data, Inputs
from pcq.data.folder import open_folder
from pcq.data.inputs import Several
from pcq.data.sets import HELD_OUT, open_set
from pcq.errors import PcqError, did_you_mean
from pcq.spec import Spec, is_own, parse

__all__ = ["Batch", "Data", "Inputs", "from_arrays", "open_data", "open_inputs", "own"]

SPECS = "digits, fashion-mnist[:DIR], cifar10:DIR, folder:DIR, npz:FILE, file.py:function, package.module:function"


def open_data(spec: str, split: str = "test") -> Data:
    """The data set that ``spec`` names.

    Args:
        spec: one of the forms above.
        split: ``test``, ``val`` (held out of training, to choose settings by) or ``train``.

    Raises:
        PcqError: the spec is malformed, or the data is not there.
        CheckFailed: a file of it is damaged.
    """
    if split not in ("test", "val", "train"):
        raise PcqError(f"'{split}' is not a split", where=spec, allowed="test, val, train")
    parsed = parse(spec)
    if parsed.kind in HELD_OUT:
        _options(parsed, set())
        if parsed.kind == "digits" and parsed.name:
            raise PcqError(f"digits has no '{parsed.name}'", where=spec, allowed="digits")
        if parsed.kind == "cifar10" and not parsed.name:
            raise PcqError("CIFAR-10 needs its folder", where=spec, allowed="cifar10:DIR")
        return open_set(parsed.kind, parsed.name, split)
    if parsed.kind in ("folder", "npz"):
        opener: Callable[..., Data] = open_folder if parsed.kind == "folder" else open_npz
        _options(parsed, set(inspect.signature(opener).parameters) - {"root", "path", "split"})
        return opener(parsed.name, split, **parsed.options)
    if own(parsed):
        return open_own(parsed, split)
    todo = did_you_mean(parsed.kind, [*HELD_OUT, "folder", "npz"])
    raise PcqError("this is not a data set", where=spec, allowed=SPECS, todo=todo)


def open_inputs(spec: str, split: str, ordered: Callable[[Mapping[str, Any]], Mapping[str, Tensor]]) -> Data:
    """As :func:`open_data`, also of several inputs: ``ordered`` makes tensors of their arrays, in the network's order.

    Raises:
        PcqError: as there, or ``ordered`` does.
    """
    try:
        return open_data(spec, split)
    except Several as several:
        return numbered(several, split, ordered(several.arrays))


def own(spec: Spec) -> bool:
    """Whether the data is what a function of the user's returns."""
    return is_own(spec) and spec.kind not in (*HELD_OUT, "folder", "npz")


def _options(spec: Spec, known: set[str]) -> None:
    for key in spec.options:
        if key not in known:
            allowed = ", ".join(sorted(known)) or "no options"
            raise PcqError(
                f"there is no option '{key}'", where=str(spec), allowed=allowed, todo=did_you_mean(key, known)
            )
