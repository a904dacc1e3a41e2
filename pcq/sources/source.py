"""An opened checkpoint: names, shapes and dtypes at once, values one tensor at a time."""

import hashlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pcq import weight_norm
from pcq.errors import PcqError, did_you_mean
from pcq.sources.wrappers import listed

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DistributedDataParallel, torch.compile and Lightning put before every name."""


HASHED = 1 << 30


@dataclass(frozen=True)
class Entry:
    """One tensor that can be read.

    Attributes:
        shape: its shape.
        dtype: its dtype without ``torch.``, such as ``float32``.
        read: reads it: contiguous, on the CPU.
        identity: entries of equal identity are one tensor under several names; None: this one shares nothing.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]
    identity: Hashable = None


@dataclass(frozen=True)
class Source:
    """What a user handed in, opened; the values stay on disk until :meth:`tensor` asks for one.

    Attributes:
        path: the file or folder.
        entries: every tensor under its name in the state dict, in order.
        notes: what was found and done on the way (wrapper opened, prefix stripped), one sentence each.
        arch: the architecture spec, where the checkpoint itself says so.
        program: the exported program without its weights (see ``pcq.sources.pt2``), for ``.pt2``.
        make_module: loads the network with its weights, where the file holds one.
        files: what is read: the file, or an index and its shards.
        by_name: the file lists its tensors by their names, not in the network's order.
    """

    path: Path
    entries: Mapping[str, Entry]
    notes: tuple[str, ...] = ()
    arch: str | None = None
    program: bytes | None = field(default=None, repr=False)
    make_module: Callable[[], nn.Module] | None = field(default=None, repr=False)
    files: tuple[Path, ...] = ()
    by_name: bool = False

    def noted(self, *notes: str) -> "Source":
        """The same with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    @property
    def names(self) -> list[str]:
        return list(self.entries)

    @property
    def precision(self) -> str:
        """The dtype that most of its floating numbers have; `float32` where there are none."""
        counts = {"float32": 0}
        for entry in self.entries.values():
            if getattr(torch, entry.dtype).is_floating_point:
                counts[entry.dtype] = counts.get(entry.dtype, 0) + math.prod(entry.shape)
        return max(counts, key=lambda kind: counts[kind])

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise PcqError(f"there is no tensor '{name}'", where=str(self.path), todo=did_you_mean(name, self.entries))
        return self.entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """Without ``torch.``, such as ``float32``."""
        return self._entry(name).dtype

    def tensor(self, name: str) -> Tensor:
        """Read one tensor: contiguous, on the CPU, in its own dtype. Not kept: drop it, and its memory is free.

        Raises:
            CheckFailed: the file is damaged where the tensor lies.
            PcqError: the file is gone.
        """
        entry = self._entry(name)
        try:
            tensor = entry.read()
        except OSError as error:
            raise unreadable(self.path, error) from error
        assert (tuple(tensor.shape), str(tensor.dtype)) == (entry.shape, f"torch.{entry.dtype}"), (name, entry)
        return tensor

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor, read now; tied names hold one tensor."""
        found = {name: self.tensor(name) for name in self.entries if name not in self.tied}
        return {name: found[self.tied.get(name, name)] for name in self.entries}

    @cached_property
    def tied(self) -> dict[str, str]:
        """Name -> the first name of the same tensor, for all but the first."""
        first: dict[Hashable, str] = {}
        return {
            name: first[entry.identity]
            for name, entry in self.entries.items()
            if entry.identity is not None and first.setdefault(entry.identity, name) != name
        }

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors, tied ones counted once."""
        return sum(
            math.prod(entry.shape) * getattr(torch, entry.dtype).itemsize
            for name, entry in self.entries.items()
            if name not in self.tied
        )

    def origin(self) -> dict[str, str]:
        """``file``: the name; ``sha256``: of the content, where it is one file of at most a gigabyte."""
        found = {"file": self.path.name or self.path.resolve().name}
        if self.path.is_file() and self.path.suffix != ".json" and self.path.stat().st_size <= HASHED:
            with open(self.path, "rb") as file:
                found["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        return found

    def module(self) -> nn.Module | None:
        """The network with its weights, in eval mode, where the file holds one (``.pt2``, a pickled module)."""
        return None if self.make_module is None else self.make_module()


def strip_prefixes(entries: Mapping[str, Entry]) -> tuple[dict[str, Entry], list[str]]:
    """Take off every prefix that all names have; ``-> entries, notes``. ``AveragedModel``'s counter is left out."""
    found = dict(entries)
    notes = []
    while prefix := next((p for p in PREFIXES if found and all(name.startswith(p) for name in _counted(found))), None):
        if len(_counted(found)) < len(found):
            notes.append("Left out the averaging counter 'n_averaged'.")
        found = {name.removeprefix(prefix): found[name] for name in _counted(found)}
        notes.append(f"Took the prefix '{prefix}' off all {len(found)} names.")
    return found, notes


def with_prefix(source: Source, prefix: str) -> Source:
    """``source`` with ``prefix`` before every name: it belongs to the network, and not to what had wrapped it."""
    note = f"Put the prefix '{prefix}' back: the network's own names have it."
    entries = {prefix + name: entry for name, entry in source.entries.items()}
    return replace(source.noted(note), entries=entries)


def part(source: Source, prefix: str) -> Source:
    """Those of ``source``'s tensors whose names begin with ``prefix``, without it."""
    entries = {name.removeprefix(prefix): e for name, e in source.entries.items() if name.startswith(prefix)}
    others = [name for name in source.entries if not name.startswith(prefix)]
    beside = f"; beside them: {listed(others, 4)}" if others else ""
    note = f"Took the {len(entries)} tensors under '{prefix}'{beside}."
    return replace(source.noted(note), entries=entries)


def put_together(entries: Mapping[str, Entry], by_name: bool) -> tuple[dict[str, Entry], list[str]]:
    """A weight in the place of the two parts of each weight_norm, read when asked for; ``-> entries, notes``.

    It stands before its layer's bias, as in a layer without a weight_norm, unless the file lists tensors ``by_name``.
    """
    shapes = {name: entry.shape for name, entry in entries.items()}
    found = weight_norm.parts(shapes, {name: entry.dtype for name, entry in entries.items()})
    if not found:
        return dict(entries), []
    joined: dict[str, Entry] = {}
    places: dict[str, list[str]] = {}
    biases: dict[str, str] = {}
    for layer, _, last in () if by_name else (name.rpartition(".") for name in entries):
        if last.startswith("bias"):
            biases.setdefault(layer, f"{layer}.{last}" if layer else last)
    for weight, parts in found.items():
        g, v = entries[parts.g], entries[parts.v]
        identity = None if g.identity is None or v.identity is None else (g.identity, v.identity, parts.axis)
        joined[weight] = Entry(v.shape, v.dtype, partial(_join, parts, g, v), identity)
        places.setdefault(biases.get(weight.rpartition(".")[0], parts.g), []).append(weight)
    gone = {name for parts in found.values() for name in (parts.g, parts.v)}
    put: dict[str, Entry] = {}
    for name, entry in entries.items():
        put |= {weight: joined[weight] for weight in places.get(name, ())}
        if name not in gone:
            put[name] = entry
    return put, [weight_norm.note(len(found))]


def _join(parts: weight_norm.Parts, g: Entry, v: Entry) -> Tensor:
    return parts.join(g.read(), v.read())


def _counted(entries: Mapping[str, Entry]) -> Sequence[str]:
    return [name for name in entries if name != "n_averaged"]


def unreadable(path: Path, error: OSError) -> PcqError:
    """The sentence for a path that is not there or may not be read."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        todo = did_you_mean(path.name, near) if path.parent.is_dir() else f"There is no folder {path.parent} either"
        return PcqError("there is no such file", where=str(path), todo=todo)
    return PcqError(f"cannot be read: {(error.strerror or 'unknown reason').lower()}", where=str(path))
