"""Tensors in memory (or mapped) as entries: which are one, and which no file of ours can hold."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pcq.errors import PcqError, raise_all
from pcq.sources.safetensors import DTYPES
from pcq.sources.source import Entry, Source
from pcq.sources.wrappers import listed
from pcq.words import kind


def tensor_entries(
    tensors: Mapping[str, Tensor], path: Path, notes: list[str], checked: Callable[[], None] | None = None
) -> dict[str, Entry]:
    """Entries for tensors in memory (or mapped); equal storage and equal view mean one tensor.

    Raises:
        PcqError: tensors that no file of ours can hold, each named.
    """
    problems = [
        PcqError(f"the tensor '{name}' {reason[0]}", where=str(path), todo=reason[1])
        for name, tensor in tensors.items()
        if (reason := unusable(tensor))
    ]
    raise_all(problems)
    owners: dict[int, str] = {}
    views = []
    entries = {}
    for name, tensor in tensors.items():
        identity = view_of(tensor)
        if identity is not None and owners.setdefault(identity[0], name) != name:
            owner = tensors[owners[identity[0]]]
            if view_of(owner) != identity and overlap(owner, tensor):
                views.append(f"'{name}' and '{owners[identity[0]]}'")
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries[name] = Entry(
            tuple(tensor.shape), dtype, partial(_read, tensor, checked), identity and (path, *identity)
        )
    if views:
        notes.append(f"Different views of the same memory are kept as tensors of their own: {listed(views)}.")
    return entries


def as_loaded(source: Source, state: Mapping[str, Tensor], left_out: Sequence[str]) -> Source:
    """``source`` as transformers has loaded it: ``state``, and the names of ``source`` that it has no place for."""
    notes = ["Named and put together as transformers loads it."]
    if left_out:
        notes.append(f"Left out what the network does not have: {listed(left_out)}.")
    entries = tensor_entries(state, source.path, notes)
    return replace(source.noted(*notes), entries=entries, by_name=False)


def _read(tensor: Tensor, checked: Callable[[], None] | None) -> Tensor:
    if checked is not None:
        checked()
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


def view_of(tensor: Tensor) -> tuple[int, Hashable] | None:
    """``(storage, how it is looked at)``; None for a tensor without elements."""
    if not tensor.numel():
        return None
    view = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
    return tensor.untyped_storage().data_ptr(), view


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the byte ranges of two views of one storage meet."""

    def span(t: Tensor) -> tuple[int, int]:
        first = int(t.storage_offset())
        last = first + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
        return first * t.itemsize, (last + 1) * t.itemsize

    (a0, a1), (b0, b1) = span(a), span(b)
    return a0 < b1 and b0 < a1


def unusable(tensor: Tensor) -> tuple[str, str] | None:
    """Why a tensor cannot be kept, and what to do; None if it can."""
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        return f"is {kind(tensor)}, not a plain tensor", "Save it as one"
    if tensor.is_quantized:
        return "is quantized already", "Give the float network, or call .dequantize() on it"
    if tensor.layout != torch.strided:
        return f"is sparse ({tensor.layout})", "Call .to_dense() on it and save again"
    if tensor.device.type == "meta":
        return "has a shape but no values (device meta)", "Load the values before saving"
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES.values():
        return f"is of type {tensor.dtype}, which safetensors cannot hold", "Convert it and save again"
    return None
