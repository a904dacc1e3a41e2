"""What is trained on, what is looked at on the way, and what is looked at once, at the end."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pcq.data import Data, open_data, open_inputs, own
from pcq.data.inputs import inputs, refuse_one
from pcq.errors import NoSplit, PcqError, raise_all
from pcq.scores import misfit
from pcq.spec import Spec, parse, takes
from pcq.words import dimensions

HELD_OUT = 5000
"""Samples held out of training where the data has no ``val``; at most a tenth of them."""


@dataclass(frozen=True)
class Splits:
    """Three disjoint sets.

    Attributes:
        train: what is trained on, large enough for ``augment`` to cut its crops from.
        plain: the same samples as the network takes them, without any change.
        val: looked at on the way, to choose by.
        test: looked at once, at the end; None where the data has none besides what is trained on.
        notes: what was found and done, one sentence each.
    """

    train: Data
    plain: Data
    val: Data
    test: Data | None
    notes: tuple[str, ...]

    def on(self, device: torch.device) -> "Splits":
        """The same samples, on ``device`` where they can be kept there."""
        test = None if self.test is None else self.test.on(device)
        return replace(
            self, train=self.train.on(device), plain=self.plain.on(device), val=self.val.on(device), test=test
        )


def open_splits(spec: str, resized_crop: bool = False, network: nn.Module | None = None) -> Splits:
    """Open a data spec for training; ``val`` is held out of ``train`` where there is none of its own.

    What a function returns that takes no ``split`` is one set, whatever it returns the next time.

    Args:
        spec: a data spec; see ``pcq.data``.
        resized_crop: open a folder's training images larger than the network takes them.
        network: what takes the samples, for data of several inputs.

    Raises:
        PcqError: the data is not there, or is too little; or a split of it is not usable, or unlike the others; or it
            has not the network's inputs.
    """
    parsed = parse(spec)
    if resized_crop and parsed.kind != "folder":
        where, allowed = "finetune.augment: resized-crop", "none, crop or crop-flip"
        raise PcqError(f"it is for folders of images, and the data is {spec}", where=where, allowed=allowed)
    plain = _open(spec, "train", network)
    one = own(parsed) and not takes(parsed, "split")
    test, val = (None if one else _other(spec, split, plain, network) for split in ("test", "val"))
    train = open_data(str(_larger(parsed)), "train") if resized_crop else plain
    notes = []
    if val is not None and test is not None and _same(val, test):
        val = None
    _alike([plain, *(each for each in (val, test) if each is not None)])
    if val is None:
        count = min(HELD_OUT, plain.n // 10)
        if count < 1:
            raise PcqError(f"{plain.n} samples are too few to train on", where=spec, allowed="10 or more")
        order = torch.randperm(plain.n, generator=torch.Generator().manual_seed(0))
        val = subset(plain, order[-count:], "val")
        train, plain = (subset(data, order[:-count], "train") for data in (train, plain))
        held = "1 of the training samples is" if count == 1 else f"{count:,} of the training samples are"
        notes.append(f"{held} held out to choose by.")
    if test is None:
        notes.append("There is no test split: the scores are those of the samples held out.")
    return Splits(train, plain, val, test, tuple(notes))


def _open(spec: str, split: str, network: nn.Module | None) -> Data:
    if network is None:
        return open_data(spec, split)
    data = open_inputs(spec, split, lambda arrays: inputs(arrays, network, spec))
    if not data.arrays:
        refuse_one(network, spec, data.notes)
    return data


def _other(spec: str, split: str, train: Data, network: nn.Module | None) -> Data | None:
    """Another split, unless it is not there or is the training data itself."""
    try:
        found = _open(spec, split, network)
    except NoSplit:
        return None
    except PcqError as error:
        if not own(parse(spec)) or error.__cause__ is None:
            raise
        todo = f"{error.todo}. " * bool(error.todo) + "For a split that there is not, return None"
        raise PcqError(f"{error.what} for the split {split}", where=error.where, todo=todo) from error
    return None if _same(found, train) else found


def _alike(splits: Sequence[Data]) -> None:
    """
    Raises:
        PcqError: samples of one have another shape than those of the first, or it has no labels where another has.
    """
    problems, first = [], splits[0]
    for data in splits[1:]:
        where = f"{data.name}, {data.split}"
        shapes = [_shapes(each) for each in (data, first)]
        if shapes[0] != shapes[1]:
            problems.append(PcqError(f"its samples are {shapes[0]}, those of {first.split} {shapes[1]}", where=where))
        labelled = [other.split for other in splits if other.labels is not None]
        if data.labels is None and labelled:
            what = f"it has no labels, and {labelled[0]} has some"
            problems.append(PcqError(what, where=where, todo=f"Add them, or leave {data.split} out"))
    raise_all(problems)


def _shapes(data: Data) -> str:
    """Those of a sample, in words."""
    shapes = [tuple(array.shape[1:]) for array in data.arrays.values()] or [data.shape]
    return " and ".join(map(dimensions, shapes))


def check_outputs(splits: Splits, outputs: int) -> None:
    """
    Raises:
        PcqError: labels or classes of a split are more than the network's ``outputs``, or there is one output for them.
    """
    given = [data for data in (splits.train, splits.val, splits.test) if data is not None]
    found = [misfit(each, outputs, f"{each.name}, {each.split}", ": the network then follows the float one")
             for each in given]  # fmt: skip
    raise_all([wrong for wrong in found if wrong is not None])


def _same(a: Data, b: Data) -> bool:
    """Whether two sets are one, by their labels and some samples."""
    if a.n != b.n or _shapes(a) != _shapes(b) or (a.labels is None) != (b.labels is None):
        return False
    if a.labels is not None and b.labels is not None and not torch.equal(a.labels, b.labels):
        return False
    some = sorted({0, a.n // 3, a.n - 1})
    return all(map(torch.equal, a.given(some), b.given(some)))


def subset(data: Data, numbers: Tensor, split: str) -> Data:
    """The samples ``numbers`` of a set."""

    def take(chosen: Sequence[int]) -> Tensor:
        return data.take(numbers[torch.as_tensor(chosen)].tolist())

    labels = None if data.labels is None else data.labels[numbers]
    return replace(data, split=split, n=len(numbers), take=take, labels=labels)


def _larger(spec: Spec) -> Spec:
    size = spec.options.get("size", 224)
    side = max(size, spec.options.get("resize") or round(size * 256 / 224))
    return Spec(spec.kind, spec.name, {**spec.options, "size": side, "resize": side})
