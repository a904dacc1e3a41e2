"""Arrays as data: an ``.npz`` file, or what a function of the user's returns."""

import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    default_collate,
    default_convert,
)

from pcq.data.dataset import Data
from pcq.data.inputs import LABELS, Several, channels_first, is_images, per_channel, refuse, tensor
from pcq.errors import CheckFailed, NoSplit, PcqError
from pcq.spec import Spec, call, running, takes
from pcq.words import dimensions, kind

NAMES = (("x", "y"), ("images", "labels"), ("data", "labels"), ("X", "y"))
SPLIT = re.compile("_(test|val|train)$")
ANY_NAME = {name for pair in NAMES for name in pair}

PLAIN = (SequentialSampler, RandomSampler, DistributedSampler)
"""Samplers that take every sample, in an order of their own."""
ASKED = 64

ALONE = "Maps, sequences and the like are not read: give the samples alone, to compare outputs with the float network's"


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
            chosen = _of_one_input(arrays.files, split, str(file))
            if chosen is None:
                allowed = "x and y, images and labels, or x_test and y_test"
                held = {name: arrays[key] for name, key in _of_split(arrays.files, split, str(file)).items()}
                if (mean, std) != ((0.0,), (1.0,)):
                    what = f"mean and std are of one input, and it holds {', '.join(held)}"
                    raise PcqError(what, where=str(file), todo="Leave them out, and store what the network reads")
                raise Several(f"it holds {', '.join(held)}", held, where=str(file), allowed=allowed)
            x, y = (None if name is None else arrays[name] for name in chosen)
            unread = _unread(arrays.files)
    except PcqError:
        raise
    except ValueError as error:  # all that NumPy refuses for fear of pickles
        if zipfile.is_zipfile(file):
            raise PcqError("an array holds Python objects", where=str(file), allowed="arrays of numbers") from error
        raise PcqError("it is not a file of NumPy arrays", where=str(file), todo="Write it with `np.savez`") from error
    except Exception as error:  # zip, npy header and zlib errors are of many kinds
        raise CheckFailed(f"the file cannot be read: {error}", where=str(file)) from error
    data = from_arrays(f"npz {file}", split, x, y, mean=mean, std=std)
    return replace(data, notes=(*data.notes, f"Not read beside x and y: {', '.join(unread)}.")) if unread else data


def _of_one_input(names: Sequence[str], split: str, where: str) -> tuple[str, str | None] | None:
    """The names of the samples and of their labels; None: labels have another name, or there are more inputs.

    Raises:
        NoSplit: all arrays are of other splits.
        PcqError: there are labels, and they are those of no samples.
    """
    ends = {found[1] for found in map(SPLIT.search, names) if found}
    if ends and split not in ends and all(map(SPLIT.search, names)):
        said = f"it has arrays of {', '.join(sorted(ends))} but none of {split}"
        raise NoSplit(said, where=where, allowed=f"x_{split} and y_{split}, or x and y")
    tried = [(a, b, end) for end in (f"_{split}", "") for a, b in NAMES]
    a, b, end = next((each for each in tried if each[0] + each[2] in names), ("", "", ""))
    if not a or (_unread(names) and b + end not in names):
        return None
    labels = next((label + end for label in (b, *LABELS) if label + end in names), None)
    if labels is None:
        _refuse_lost_labels(names, a + end, b + end, where)
    return a + end, labels


def _refuse_lost_labels(names: Sequence[str], samples: str, wanted: str, where: str) -> None:
    """``samples`` have no labels, which would be called ``wanted``.

    Raises:
        PcqError: there are some, of a split that has no samples.
    """
    ends = {name: name.removeprefix(SPLIT.sub("", name)) for name in names}
    sampled = {end for name, end in ends.items() if name.removesuffix(end) not in LABELS}
    if lost := next((name for name, end in ends.items() if end not in sampled), None):
        said = f"{samples} has no labels, and {lost} no samples"
        raise PcqError(said, where=where, todo=f'Call the labels "{wanted}"')


def _unread(names: Sequence[str]) -> list[str]:
    """Those that are not looked at where there are samples and labels."""
    return [name for name in names if SPLIT.sub("", name) not in ANY_NAME]


def _of_split(names: Sequence[str], split: str, where: str) -> dict[str, str]:
    """Those that end in ``_test`` and so on, by what stands before; where none does, those of no split.

    Raises:
        PcqError: there are labels, and they are those of no samples.
    """
    mine = [name for name in names if name.endswith(f"_{split}")]
    mine = mine or [name for name in names if not SPLIT.search(name)] or list(names)
    found = {name.removesuffix(f"_{split}"): name for name in mine}
    if not any(label in found for label in LABELS):
        end = f"_{split}" if mine[0].endswith(f"_{split}") else ""
        _refuse_lost_labels(names, mine[0], f"y{end}", where)
    return found


def numbered(several: Several, split: str, arrays: Mapping[str, Tensor]) -> Data:
    """Data of several inputs, which are ``arrays`` [n, ...].

    Raises:
        PcqError: the labels do not fit them.
    """
    name = several.where or ""
    n = len(next(iter(arrays.values())))
    said = ", ".join(f"{key} {'x'.join(map(str, array.shape[1:])) or 'of one number'}" for key, array in arrays.items())
    labels = None if several.labels is None else _labels(name, tensor(several.labels, name), n)
    return Data(name, split, n, (), torch.as_tensor, labels, sample=said, arrays=arrays)


def from_arrays(name: str, split: str, x: Any, y: Any, *, mean: Any = (0.0,), std: Any = (1.0,)) -> Data:
    """Arrays or tensors x [n, ...] and y [n] (None: unlabelled).

    8-bit arrays of three axes or more are images: they are divided by 255; [n, h, w] gets a channel axis, and
    [n, h, w, c] with 1 or 3 channels is turned to [n, c, h, w]. Other integers, 8-bit ones of fewer axes among them,
    stay as they are, as tokens; other numbers become float32, in the order that they have.

    Raises:
        PcqError: the arrays do not fit one another, or are not numbers; or mean or std are not, or std not positive.
    """
    samples, labels = tensor(x, name), None if y is None else tensor(y, name)
    if not samples.ndim or not len(samples):
        raise PcqError("there are no samples", where=name)
    if samples.is_floating_point():
        refuse(~samples.isfinite(), "NaN or infinity", name)
    notes: list[str] = []
    images = is_images(samples)
    if images:
        samples, notes = channels_first(samples)
        notes.append("8-bit values were divided by 255.")
    means = torch.tensor(per_channel(mean, "mean", name))
    stds = torch.tensor(per_channel(std, "std", name, positive=True))
    channels = samples.shape[1] if samples.ndim > 1 else 1
    for value in (means, stds):
        if len(value) not in (1, channels):
            raise PcqError(f"mean and std have {len(value)} values for {channels} channels", where=name)
    shift, scale = (v.reshape(-1, *[1] * (samples.ndim - 2)) if samples.ndim > 1 else v for v in (means, stds))
    plain = not shift.any() and bool((scale == 1).all())
    tokens = not samples.is_floating_point() and not images
    if tokens and not plain:
        said = f"mean and std are given, but the samples are {str(samples.dtype).removeprefix('torch.')}"
        todo = "Leave mean and std out, or store the samples as float32"
        raise PcqError(said, where=name, allowed="floating-point numbers or unsigned 8-bit images", todo=todo)

    def take(chosen: Sequence[int]) -> Tensor:
        part = samples[torch.as_tensor(chosen)]
        if tokens:
            return part.long()
        part = part.float() / 255 if images else part.float()
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
        todo = ALONE if labels.ndim > 1 else ""
        what = f"the labels have shape {list(labels.shape)}"
        raise PcqError(what, where=name, allowed=f"[{n}], class numbers", todo=todo)
    if labels.is_floating_point() and not (labels.isfinite() & (labels == labels.round())).all():
        raise PcqError("the labels are not whole numbers", where=name, allowed="class numbers, counted from 0")
    labels = labels.long()
    if int(labels.min()) < 0:
        raise PcqError(f"a label is {int(labels.min())}", where=name, allowed="class numbers, counted from 0")
    return labels


def open_own(spec: Spec, split: str) -> Data:
    """Call the user's function, with ``split`` if it takes one, and make data of what it returns:

    a :class:`Data`; arrays or tensors ``(x, y)``, or x alone; a dictionary of them, named as in an ``.npz``; a
    map-style data set (such as torchvision's) or a DataLoader of one, whose samples are x or (x, y); any other iterable
    of batches (x, y), or of samples (x, label) with single numbers as labels, which is read into memory, as is a list
    of batches; any of these of such dictionaries, which are read into memory; None for a split that there is not.

    Of a DataLoader the samples are those that its sampler chooses, each as its ``collate_fn`` makes it; batches,
    shuffling and a distribution among processes are pcq's own.

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
    if isinstance(found, DataLoader) and isinstance(found.dataset, Indexed):
        with running(spec, "its DataLoader's sampler"):
            found = _loaded(found)
    if isinstance(found, Mapping):
        return _named(name, split, found)
    if isinstance(found, (Tensor, np.ndarray)):
        return from_arrays(name, split, found, None)
    if isinstance(found, tuple) and len(found) == 2 and all(isinstance(a, (Tensor, np.ndarray, list)) for a in found):
        return from_arrays(name, split, *found)
    if isinstance(found, list) and found and _is_batch(found[0]):
        return _collected(name, split, found)
    if isinstance(found, Indexed) and not isinstance(found, (dict, str, tuple)):
        return _indexed(spec, split, found)
    if isinstance(found, Iterable) and not isinstance(found, (dict, str)):
        with running(spec, "iterating over what it returned"):
            items = list(found)
        return _collected(name, split, items)
    allowed = "arrays (x, y), a map-style data set, or an iterable of batches (x, y)"
    raise PcqError(f"it returned {kind(found)}", where=name, allowed=allowed)


def _named(name: str, split: str, found: Mapping[Any, Any]) -> Data:
    """Arrays by their names, as in an ``.npz``."""
    held = {str(key): value for key, value in found.items()}
    one = _of_one_input(list(held), split, name)
    if one is not None and not _unread(list(held)):
        return from_arrays(name, split, held[one[0]], None if one[1] is None else held[one[1]])
    mine = {key: held[of_split] for key, of_split in _of_split(list(held), split, name).items()}
    raise Several(f"it returned {', '.join(mine)}", mine, where=name, allowed="arrays (x, y)")


@dataclass(frozen=True)
class _Chosen:
    """Some samples of a map-style data set, each as ``collate`` makes it of a batch of one; None: as it is."""

    dataset: Any
    numbers: Sequence[int]
    collate: Callable[[list[Any]], Any] | None

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int, /) -> Any:
        item = self.dataset[self.numbers[index]]
        if self.collate is None:
            return item
        made = self.collate([item])
        named = isinstance(made, Mapping)
        parts = list(made.values()) if named else made if isinstance(made, (tuple, list)) else (made,)
        if not all(isinstance(part, (Tensor, np.ndarray, list)) and len(part) == 1 for part in parts):
            said = "its DataLoader's collate_fn makes something else of one sample than a batch of one"
            raise PcqError(said, allowed="tensors x, or (x, y)", todo="Return the data set, or arrays")
        return {key: made[key][0] for key in made} if named else tuple(part[0] for part in parts)

    @property
    def classes(self) -> Any:
        return getattr(self.dataset, "classes", None)

    @property
    def targets(self) -> Any:
        given = getattr(self.dataset, "targets", None)
        if given is None or self.collate is not None or len(given) != len(self.dataset):
            return None
        return [given[number] for number in self.numbers]

    @property
    def target_transform(self) -> Any:
        return getattr(self.dataset, "target_transform", None)


def _loaded(loader: DataLoader[Any]) -> Any:
    """What a DataLoader draws from, in a fixed order: its data set, or some of its samples, or else the loader itself.

    What chance draws is drawn with the seed 0, so that it is the same every time.
    """
    dataset: Any = loader.dataset
    collate = loader.collate_fn
    batches: Any = loader.batch_sampler
    own = None if collate in (default_collate, default_convert) else collate
    if batches is None and (own is not None or type(loader.sampler) not in PLAIN):
        return loader  # its data set makes the batches
    batched = batches is not None and type(batches) is not BatchSampler
    if not batched and type(loader.sampler) in PLAIN and _takes_all(loader.sampler, dataset):
        return dataset if own is None else _Chosen(dataset, range(len(dataset)), own)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn: Iterable[Any] = loader.sampler
        if batched:
            drawn = (number for batch in batches for number in batch)
        numbers = sorted(int(number) for number in drawn)
    return _Chosen(dataset, numbers, own)


def _takes_all(sampler: Any, dataset: Any) -> bool:
    """Whether it only orders the samples, or divides them among processes."""
    if isinstance(sampler, RandomSampler):
        return not sampler.replacement and sampler.num_samples == len(dataset)
    return len(getattr(sampler, "data_source", dataset)) == len(dataset)


def _parts(item: Any) -> tuple[Any, Any]:
    """A sample, or a batch, and its label or labels, None without."""
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item[0], item[1]
    if isinstance(item, (tuple, list)) and len(item) == 1 and isinstance(item[0], (Tensor, np.ndarray)):
        return item[0], None
    return item, None


def _is_batch(item: Any) -> bool:
    """Whether it is samples with as many labels, rather than one with its own."""
    if isinstance(item, Mapping):
        return any(np.ndim(item[name]) for name in LABELS if name in item)
    x, y = _parts(item)
    arrays = isinstance(x, (Tensor, np.ndarray)) and isinstance(y, (Tensor, np.ndarray))
    return arrays and y.ndim > 0 and x.ndim > 0 and len(x) == len(y) > 1


def _refuse_more(item: Any, name: str) -> None:
    """Raise PcqError if it is neither x nor (x, y) but several tensors."""
    given = isinstance(item, (tuple, list)) and len(item) > 2
    if given and any(isinstance(a, (Tensor, np.ndarray)) for a in item):
        raise PcqError(f"it yields {len(item)} values at a time", where=name, allowed="x alone, or (x, y)")


def _indexed(spec: Spec, split: str, found: Indexed) -> Data:
    name = str(spec)
    if not len(found):
        raise PcqError("the data set is empty", where=name)
    with running(spec, "its first sample"):
        item = found[0]
    if isinstance(item, Mapping):
        with running(spec, "reading its samples"):
            items = [found[i] for i in range(len(found))]
        return _named(name, split, _joined(name, items, torch.stack))
    _refuse_more(item, name)
    first, label = _parts(item)
    if not isinstance(first, (Tensor, np.ndarray)):
        todo = "Give the data set a transform that makes tensors, such as torchvision's ToTensor"
        raise PcqError(f"its samples are not tensors but {type(first).__name__}", where=name, todo=todo)
    first = tensor(first, name)
    labels = None
    if label is not None:
        if (one := tensor(label, name)).numel() != 1:
            _labels(name, one.expand(len(found), *one.shape), len(found))
        with running(spec, "reading its labels"):
            given = _told(found)
            if given is None:
                given = [float(found[i][1]) for i in range(len(found))]
            labels = _labels(name, tensor(given, name), len(found))
    classes = tuple(str(c) for c in getattr(found, "classes", ()) or ())

    def take(chosen: Sequence[int]) -> Tensor:
        with running(spec, "reading a sample"):
            x = torch.stack([torch.as_tensor(_parts(found[i])[0]) for i in chosen])
        return x.float() if x.is_floating_point() else x.long()

    return Data(name, split, len(found), tuple(first.shape), take, labels, classes)


def _told(found: Indexed) -> Any:
    """``targets``, by which torchvision's sets tell all labels without reading the samples; None: not to be trusted.

    They are the labels only where nothing transforms them: a sample of each class is asked, of up to ``ASKED`` classes.
    """
    given = getattr(found, "targets", None)
    if given is None or len(given) != len(found) or getattr(found, "target_transform", None) is not None:
        return None
    try:
        told = np.asarray(given)
    except (TypeError, ValueError, RuntimeError):
        return None
    if told.ndim != 1 or told.dtype.kind not in "iuf":
        return None
    places = np.unique(told, return_index=True)[1]
    asked = places[np.linspace(0, len(places) - 1, min(ASKED, len(places))).astype(int)]
    return told if all(float(found[int(i)][1]) == told[i] for i in asked) else None


def _joined(name: str, items: Sequence[Any], join: Callable[[list[Tensor]], Tensor]) -> dict[str, Tensor]:
    """An array for each name in samples, or batches, that are dictionaries."""
    if any(not isinstance(item, Mapping) or item.keys() != items[0].keys() for item in items):
        raise PcqError("its samples have not the same names", where=name)
    joined = {}
    for key in items[0]:
        arrays = [tensor(item[key], f"{name}, {key}") for item in items]
        try:
            joined[str(key)] = join(arrays)
        except RuntimeError as error:
            shapes = sorted({tuple(array.shape) for array in arrays})[:3]
            said = ", ".join(map(dimensions, shapes))
            raise PcqError(
                f"its samples differ in shape: {said}", where=f"{name}, {key}", todo="Pad them to one length"
            ) from error
    return joined


def _collected(name: str, split: str, items: list[Any]) -> Data:
    if items and isinstance(items[0], Mapping):
        whole = _is_batch(items[0]) or not any(label in items[0] for label in LABELS)
        return _named(name, split, _joined(name, items, torch.cat if whole else torch.stack))
    xs, ys = [], []
    for item in items:
        _refuse_more(item, name)
        x, y = _parts(item)
        x, y = tensor(x, name), None if y is None else tensor(y, name)
        xs.append(x[None] if y is not None and y.ndim == 0 else x)
        ys.append(None if y is None else y.reshape(-1) if y.numel() == y.shape[:1].numel() else y)
    if not xs:
        raise PcqError("the iterable is empty", where=name)
    if any(y is None for y in ys) != all(y is None for y in ys) or len({x.shape[1:] for x in xs}) > 1:
        raise PcqError("its batches differ in shape, or only some have labels", where=name)
    labels = None if ys[0] is None else torch.cat([y for y in ys if y is not None])
    return from_arrays(name, split, torch.cat(xs), labels)
