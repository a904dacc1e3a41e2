"""Which published classification network a bare state dict belongs to, from its names and shapes alone.

A network's *signature* is a hash of its sorted tensor names and shapes, with the axes that hold the number of classes
(its head) and the number of input channels (its stem) left open. ``architectures.json`` lists the signatures of the
classification networks of torchvision and timm; ``tests/benchmarks/index_architectures.py`` makes it, and compares
constructors of equal signature by function: identical random weights, identical input. Constructors that compute the
same are one entry. Where they differ (another activation, padding or epsilon leaves no trace in names or shapes), the
state dict is ambiguous, and the answer is the list of candidates, never a guess. The paths of the modules, which
``torch.save(model.state_dict())`` keeps beside the tensors, tell some of them apart (a resnet18 from a resnetblur18).
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from pcq.errors import PcqError
from pcq.words import counted

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Slot:
    """An axis left open: tensor ``name`` has ``factor`` times the open number along ``axis``."""

    name: str
    axis: int
    factor: int = 1

    def read(self, shapes: Shapes) -> int | None:
        """The open number, or None where this tensor is absent or does not fit."""
        shape = shapes.get(self.name, ())
        if self.axis >= len(shape) or shape[self.axis] < 1 or shape[self.axis] % self.factor:
            return None
        return shape[self.axis] // self.factor


@dataclass(frozen=True)
class Network:
    """Constructors that compute the same function.

    Attributes:
        spec: the preferred one (torchvision's where there is one), without options for classes and channels.
        input: the channels, height and width it is usually run at.
        trees: hashes of the constructors' module paths; empty where the names alone decide.
    """

    spec: str
    input: tuple[int, int, int]
    trees: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Recognised:
    """A network found: what to build, and the sentence that says how it was found.

    Attributes:
        arch: the spec for ``pcq.models.build``, with ``num_classes`` (and ``in_chans`` unless 3).
        num_classes: outputs of the head.
        input_shape: channels, height and width it is usually run at.
        sentence: such as «torchvision resnet18, 10 classes, from its 122 names and shapes».
    """

    arch: str
    num_classes: int
    input_shape: tuple[int, int, int]
    sentence: str


class Ambiguous(PcqError):
    """Several networks that compute different things have these names and shapes; ``candidates`` are their specs."""

    def __init__(self, candidates: tuple[str, ...], count: int) -> None:
        self.candidates = candidates
        lines = "".join(f"\n  `--arch '{candidate}'`" for candidate in candidates)
        super().__init__(
            f"the {count} names and shapes fit {len(candidates)} networks that compute different things",
            todo=f"Say which one it is:{lines}",
        )


def recognise(shapes: Shapes, modules: Iterable[str] | None = None) -> Recognised | None:
    """The network whose state dict has these names and shapes; None if no indexed one has.

    Args:
        shapes: the state dict's names and shapes; counters of BatchNorm may be missing.
        modules: paths of the network's modules, where they are known: the keys of ``_metadata``, an attribute of the
            state dict that ``torch.save`` keeps. A prefix that all have does not matter.

    Raises:
        Ambiguous: more than one function fits.
    """
    for head, stem, networks in _matches(shapes):
        classes = head[0].read(shapes) if head else None
        channels = stem[0].read(shapes) if stem else networks[0].input[0]
        if modules is not None and len(networks) > 1:
            tree = tree_hash(modules)
            networks = tuple(network for network in networks if tree in network.trees) or networks
        options = {"num_classes": classes} | ({} if channels == networks[0].input[0] else {"in_chans": channels})
        if len(networks) > 1:
            raise Ambiguous(tuple(_with(network.spec, options) for network in networks), len(shapes))
        network = networks[0]
        kind, _, name = network.spec.partition(":")
        assert classes is not None
        assert channels is not None
        other = f", {counted(channels, 'input channel')}" if "in_chans" in options else ""
        sentence = f"{kind} {name}, {classes} classes{other}, from its {len(shapes)} names and shapes"
        return Recognised(_with(network.spec, options), classes, (channels, *network.input[1:]), sentence)
    return None


def _with(spec: str, options: Mapping[str, object]) -> str:
    return spec + ("&" if "?" in spec else "?") + "&".join(f"{key}={value}" for key, value in options.items())


def _matches(shapes: Shapes) -> Iterator[tuple[tuple[Slot, ...], tuple[Slot, ...], tuple[Network, ...]]]:
    for (head, stem), networks in _index().items():
        if all(len({slot.read(shapes) for slot in slots} | {None}) == 2 for slots in (head, stem) if slots) and all(
            slot.read(shapes) is not None for slot in head + stem
        ):
            found = networks.get(signature(shapes, head + stem))
            if found is not None:
                yield head, stem, found


def signature(shapes: Shapes, free: Iterable[Slot]) -> str:
    """12 hex digits of the sorted names and shapes, ``free`` axes left open, counters of BatchNorm left out."""
    open_axes = {(slot.name, slot.axis): f"{slot.factor}*" for slot in free}
    digest = hashlib.sha256()
    for name in sorted(shapes):
        if not name.endswith("num_batches_tracked"):
            sizes = (open_axes.get((name, axis), str(size)) for axis, size in enumerate(shapes[name]))
            digest.update(f"{name} {' '.join(sizes)}\n".encode())
    return digest.hexdigest()[:12]


def tree_hash(modules: Iterable[str]) -> str:
    """8 hex digits of the sorted module paths, without what wraps the whole network (``module.`` and the like)."""
    paths = set(modules) - {""}
    while len({path.partition(".")[0] for path in paths}) == 1:
        paths = {path.partition(".")[2] for path in paths} - {""}
    return hashlib.sha256("\n".join(sorted(paths | {""})).encode()).hexdigest()[:8]


Index = dict[tuple[tuple[Slot, ...], tuple[Slot, ...]], dict[str, tuple[Network, ...]]]


@functools.cache
def _index() -> Index:
    """(head, stem) -> signature -> the functions that have it."""
    return read_index(json.loads(resources.files("pcq.models").joinpath("architectures.json").read_text("utf-8")))


def read_index(text: dict[str, Any]) -> Index:
    """The index from its JSON: slots are listed once and referred to by number."""
    slots = [tuple(Slot(*slot) for slot in group) for group in text["slots"]]
    index: Index = {}
    for key, (head, stem, *networks) in text["networks"].items():
        entry = tuple(Network(spec, tuple(size), frozenset(trees)) for spec, size, trees in networks)
        index.setdefault((slots[head], slots[stem]), {})[key] = entry
    return index
