"""Arrays as data: an ``.npz`` file, or what a function of the user's returns."""

import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from pcq.data.dataset import Data
from pcq.data.inputs import LABELS, Several, numbers, per_channel, tensor
from pcq.errors import CheckFailed, NoSplit, PcqError
from pcq.spec import Spec, call, running, takes

NAMES = (("x", "y"), ("images", "labels"), ("data", "labels"), ("X", "y"))
SPLIT = re.compile("_(test|val|train)$")
ANY_NAME = {name for pair in NAMES for name in pair}


@runtime_checkable
class Indexed(Protocol):
    """A map-style data set: ``len`` of it, and a sample or (sample, label) for every number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def open_npz(path: str, split: str, *, mean: Any = (0.0,), std: Any = (1.0,)) -> Data:
    """Arrays ``x`` and ``y`` (or ``images`` and ``labels``; for a split, ``x_test`` and so on). Labels may be absent.

    Args:
        path: the file; arrays of Python objects are refused.
        split: ``test``, ``val`` or ``train``; a file without arrays of that split is one set, whatever the split.
        mean: of each channel, subtracted after 8-bit images were divided by 255.
        std: likewise, divided by.

    Raises:
        PcqError: no such file, or no such arrays.
        NoSplit: all its arrays are of other splits.
        CheckFailed: the file is damaged.
    """
    file = Path(path).expanduser()
    if not path or not file.is_file():
        raise PcqError("there is no such file", where=f"npz:{path}")
    try:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise PcqError("this is one array, not a file of named ones", where=str(file), todo="Use `np.savez`")
        with loaded as arrays:
            tried = [(a, b, end) for end in (f"_{split}", "") for a, b in NAMES]
            a, b, end = next((names for names in tried if names[0] + names[2] in arrays.files), ("", "", ""))
            unread = [name for name in arrays.files if SPLIT.sub("", name) not in ANY_NAME]
            ends = {found[1] for found in map(SPLIT.search, arrays.files) if found}
            if ends and split not in ends and all(map(SPLIT.search, arrays.files)):
                said = f"it has arrays of {', '.join(sorted(ends))} but none of {split}"
                raise NoSplit(said, where=str(file), allowed=f"x_{split} and y_{split}, or x and y")
            if not a or (unread and b + end not in arrays.files):  # labels under another name, or more inputs
                allowed = "x and y, images and labels, or x_test and y_test"
                held = {name.removesuffix(f"_{split}"): arrays[name] for name in _of_split(arrays.files, split)}
                raise Several(f"it holds {', '.join(held)}", held, where=str(file), allowed=allowed)
            labels = next((label + end for label in (b, *LABELS) if label + end in arrays.files), None)
            if labels is None and (lost := _without_samples(arrays.files)):
                said, todo = f"{a}{end} has no labels, and {lost} no samples", f'Call the labels "{b}{end}"'
                raise PcqError(said, where=str(file), todo=todo)
            x = arrays[a + end]
            y = None if labels is None else arrays[labels]
    except PcqError:
        raise
    except ValueError as error:  # all that NumPy refuses for fear of pickles
        if zipfile.is_zipfile(file):
            raise PcqError("an array holds Python objects", where=str(file), allowed="arrays of numbers") from error
        raise PcqError("it is not a file of NumPy arrays", where=str(file), todo="Write it with `np.savez`") from error
    except Exception as error:  # zip, npy header and zlib errors are of many kinds
        raise CheckFailed(f"the file cannot be read: {error}", where=str(file)) from error
    return from_arrays(f"npz {file}", split, x, y, mean=mean, std=std)


def refuse(bad: Tensor, what: str, where: str) -> None:
    """Samples of which numbers are ``bad``, if any are.

    Raises:
        PcqError: so it is; how many of them hold ``what``.
    """
    if lost := bad.reshape(len(bad), -1).any(1).nonzero().flatten().tolist():
        said = f"{len(lost)} of {len(bad):,} samples hold {what}, such as sample {lost[0]}"
        raise PcqError(said, where=where, todo="Repair them, or leave them out")


def _without_samples(names: Sequence[str]) -> str | None:
    """The first labels that have no samples of the same split."""
    ends = {name: name.removeprefix(SPLIT.sub("", name)) for name in names}
    sampled = {end for name, end in ends.items() if name.removesuffix(end) not in LABELS}
    return next((name for name, end in ends.items() if end not in sampled), None)


def _of_split(names: Sequence[str], split: str) -> list[str]:
    """Those that end in ``_test`` and so on; where none does, those of no split."""
    mine = [name for name in names if name.endswith(f"_{split}")]
    return mine or [name for name in names if not SPLIT.search(name)] or list(names)


def numbered(several: Several, split: str) -> Data:
    """Data whose samples are their own numbers: what looks them up has the arrays.

    Raises:
        PcqError: the arrays are no numbers or not of the same length, or the labels do not fit them.
    """
    name = several.where or ""
    found = numbers(several.arrays, name)
    n = len(next(iter(found.values())))
    said = ", ".join(f"{key} {'x'.join(map(str, array.shape[1:])) or 'of one number'}" for key, array in found.items())
    labels = None if several.labels is None else _labels(name, tensor(several.labels, name), n)
    return Data(name, split, n, (), torch.as_tensor, labels, sample=said)


def from_arrays(name: str, split: str, x: Any, y: Any, *, mean: Any = (0.0,), std: Any = (1.0,)) -> Data:
    """Arrays or tensors x [n, ...] and y [n] (None: unlabelled).

    8-bit images are divided by 255; [n, h, w] gets a channel axis; [n, h, w, c] with 1 or 3 channels is turned to
    [n, c, h, w]. Other integers stay as they are, as tokens; other numbers become float32.

    Raises:
        PcqError: the arrays do not fit one another, or are not numbers; or mean or std are not, or std not positive.
    """
    samples, labels = tensor(x, name), None if y is None else tensor(y, name)
    if not samples.ndim or not len(samples):
        raise PcqError("there are no samples", where=name)
    if samples.is_floating_point():
        refuse(~samples.isfinite(), "NaN or infinity", name)
    notes = []
    if samples.dtype == torch.uint8 and samples.ndim == 3:
        samples = samples[:, None]
        notes.append("Images without a channel axis got one.")
    if samples.ndim == 4 and samples.shape[3] in (1, 3) and samples.shape[1] not in (1, 3):
        samples = samples.permute(0, 3, 1, 2)
        notes.append("The channels were last and are first now.")
    if samples.dtype == torch.uint8:
        notes.append("8-bit values were divided by 255.")
    means = torch.tensor(per_channel(mean, "mean", name))
    stds = torch.tensor(per_channel(std, "std", name, positive=True))
    channels = samples.shape[1] if samples.ndim > 1 else 1
    for value in (means, stds):
        if len(value) not in (1, channels):
            raise PcqError(f"mean and std have {len(value)} values for {channels} channels", where=name)
    shift, scale = (v.reshape(-1, *[1] * (samples.ndim - 2)) if samples.ndim > 1 else v for v in (means, stds))
    plain = not shift.any() and bool((scale == 1).all())
    tokens = not samples.is_floating_point() and samples.dtype != torch.uint8
    if tokens and not plain:
        said = f"mean and std are given, but the samples are {str(samples.dtype).removeprefix('torch.')}"
        todo = "Leave mean and std out, or store the samples as float32"
        raise PcqError(said, where=name, allowed="floating-point numbers or unsigned 8-bit images", todo=todo)

    def take(chosen: Sequence[int]) -> Tensor:
        part = samples[torch.as_tensor(chosen)]
        if tokens:
            return part.long()
        part = part.float() / 255 if part.dtype == torch.uint8 else part.float()
        return part.contiguous() if plain else (part - shift) / scale

    return Data(
        name, split, len(samples), tuple(samples.shape[1:]), take, _labels(name, labels, len(samples)), (), tuple(notes)
    )


def _labels(name: str, labels: Tensor | None, n: int) -> Tensor | None:
    if labels is None:
        return None
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or len(labels) != n:
        raise PcqError(f"the labels have shape {list(labels.shape)}", where=name, allowed=f"[{n}], class numbers")
    if labels.is_floating_point() and not (labels.isfinite() & (labels == labels.round())).all():
        raise PcqError("the labels are not whole numbers", where=name, allowed="class numbers, counted from 0")
    labels = labels.long()
    if int(labels.min()) < 0:
        raise PcqError(f"a label is {int(labels.min())}", where=name, allowed="class numbers, counted from 0")
    return labels


def open_own(spec: Spec, split: str) -> Data:
    """Call the user's function, with ``split`` if it takes one, and make data of what it returns:

    a :class:`Data`; arrays or tensors ``(x, y)``, or x alone; a map-style data set (such as torchvision's) or a
    DataLoader of one, whose samples are x or (x, y); any other iterable of batches (x, y), or of samples (x, label)
    with single numbers as labels, which is read into memory; None for a split that there is not.

    Raises:
        PcqError: the function is not there or raises, or returns something else.
        NoSplit: it returns None.
    """
    found = call(spec, split=split)
    name = str(spec)
    if found is None and takes(spec, "split"):
        raise NoSplit(f"it returned None for the split {split}", where=name)
    if isinstance(found, Data):
        return found
    if isinstance(found, torch.utils.data.DataLoader) and isinstance(found.dataset, Indexed):
        found = found.dataset
    if isinstance(found, Mapping):
        held = {str(key): value for key, value in found.items()}
        allowed = "arrays (x, y); several inputs by name are for calibration and eval"
        raise Several(f"it returned {', '.join(held)}", held, where=name, allowed=allowed)
    if isinstance(found, (Tensor, np.ndarray)):
        return from_arrays(name, split, found, None)
    if isinstance(found, tuple) and len(found) == 2 and all(isinstance(a, (Tensor, np.ndarray, list)) for a in found):
        return from_arrays(name, split, *found)
    if isinstance(found, Indexed) and not isinstance(found, (dict, str, tuple)):
        return _indexed(spec, split, found)
    if isinstance(found, Iterable) and not isinstance(found, (dict, str)):
        with running(spec, "iterating over what it returned"):
            items = list(found)
        return _collected(name, split, items)
    allowed = "arrays (x, y), a map-style data set, or an iterable of batches (x, y)"
    raise PcqError(f"it returned a {type(found).__name__}", where=name, allowed=allowed)


def _is_pair(item: Any) -> bool:
    return isinstance(item, (tuple, list)) and len(item) == 2


def _indexed(spec: Spec, split: str, found: Indexed) -> Data:
    name = str(spec)
    if not len(found):
        raise PcqError("the data set is empty", where=name)
    with running(spec, "its first sample"):
        first, label = found[0] if _is_pair(found[0]) else (found[0], None)
    if not isinstance(first, (Tensor, np.ndarray)):
        todo = "Give the data set a transform that makes tensors, such as torchvision's ToTensor"
        raise PcqError(f"its samples are not tensors but {type(first).__name__}", where=name, todo=todo)
    first = tensor(first, name)
    labels = None
    if label is not None:
        given = getattr(found, "targets", None)  # torchvision's sets tell all labels without reading the samples
        with running(spec, "reading its labels"):
            if given is None or len(given) != len(found):
                given = [float(found[i][1]) for i in range(len(found))]
            labels = _labels(name, tensor(given, name), len(found))
    classes = tuple(str(c) for c in getattr(found, "classes", ()) or ())

    def take(chosen: Sequence[int]) -> Tensor:
        with running(spec, "reading a sample"):
            items = [found[i] for i in chosen]
            x = torch.stack([torch.as_tensor(item[0] if _is_pair(item) else item) for item in items])
        return x.float() if x.is_floating_point() else x.long()

    return Data(name, split, len(found), tuple(first.shape), take, labels, classes)


def _collected(name: str, split: str, items: list[Any]) -> Data:
    xs, ys = [], []
    for item in items:
        if (
            isinstance(item, (tuple, list))
            and len(item) != 2
            and any(isinstance(a, (Tensor, np.ndarray)) for a in item)
        ):
            raise PcqError(f"it yields {len(item)} values at a time", where=name, allowed="x alone, or (x, y)")
        x, y = item if _is_pair(item) else (item, None)
        x, y = tensor(x, name), None if y is None else tensor(y, name)
        xs.append(x[None] if y is not None and y.ndim == 0 else x)
        ys.append(None if y is None else y.reshape(-1))
    if not xs:
        raise PcqError("the iterable is empty", where=name)
    if any(y is None for y in ys) != all(y is None for y in ys) or len({x.shape[1:] for x in xs}) > 1:
        raise PcqError("its batches differ in shape, or only some have labels", where=name)
    labels = None if ys[0] is None else torch.cat([y for y in ys if y is not None])
    return from_arrays(name, split, torch.cat(xs), labels)
