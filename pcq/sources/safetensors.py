"""Safetensors files, one or many: names, shapes and offsets from the header, one tensor at a time from the file.

A file is 8 bytes (little-endian length of the header), the header (JSON: name -> dtype, shape, data_offsets; strings
under ``__metadata__``), and the tensors' bytes without gaps. Tensors are read with plain file reads, because mapped
pages count as memory in use until the file is closed.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcq.errors import PcqError, raise_all
from pcq.sources.archive import damaged
from pcq.sources.source import Entry

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
"""Safetensors dtype -> torch dtype, without ``torch.``."""
LONGEST_HEADER = 100_000_000  # the format's own limit
SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.safetensors|\.bin)")


def itemsize(dtype: str) -> int:
    """Bytes of one element of a torch dtype's name."""
    kind: torch.dtype = getattr(torch, dtype)
    return kind.itemsize


@dataclass(frozen=True)
class Slot:
    """One tensor's place in a file: ``start`` counts from the file's first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True)
class Header:
    """What a file holds: its slots in the order of the header, and its metadata."""

    slots: Mapping[str, Slot]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header against the file's size; no tensor is read.

    Raises:
        CheckFailed: the file is damaged: cut short, or its header breaks the format's rules.
        PcqError: a tensor has a dtype that torch does not have.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER:
            raise damaged(path, f"its header would be {length:,} bytes long")
        if 8 + length > size:
            raise damaged(path, f"it ends at byte {size:,}, inside its header of {length:,} bytes")
        text = file.read(length)
    try:
        raw = json.loads(text, object_pairs_hook=_unique)
        metadata = raw.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is not text")
        unknown = sorted({f"{entry['dtype']}" for entry in raw.values()} - set(DTYPES))
        if unknown:
            names = [name for name, entry in raw.items() if entry["dtype"] in unknown]
            raise PcqError(
                f"'{names[0]}' is of type {unknown[0]}, which pcq cannot read",
                where=str(path),
                allowed=", ".join(DTYPES),
            )
        slots, spans = {}, []
        for name, entry in raw.items():
            begin, end = entry["data_offsets"]
            slots[name] = Slot(DTYPES[entry["dtype"]], _shape(entry["shape"]), 8 + length + begin)
            spans.append((begin, end))
            if end - begin != slots[name].nbytes:
                raise ValueError(f"'{name}' has {end - begin:,} bytes where its shape needs {slots[name].nbytes:,}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(path, f"its header is not a safetensors header ({error})") from error
    spans.sort()
    if any(end != begin for (_, end), (begin, _) in zip([(0, 0), *spans], spans, strict=False)):
        raise damaged(path, "its tensors overlap or leave gaps")
    expected = 8 + length + (spans[-1][1] if spans else 0)
    if size != expected:
        raise damaged(path, f"it has {size:,} bytes where its header promises {expected:,}")
    return Header(slots, metadata)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _shape(sizes: Any) -> tuple[int, ...]:
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"{sizes} is not a shape")
    return tuple(sizes)


def read_slot(path: Path, slot: Slot) -> Tensor:
    """Read one tensor into memory of its own."""
    buffer = torch.empty(slot.nbytes, dtype=torch.uint8)
    with open(path, "rb", buffering=0) as file:
        file.seek(slot.start)
        view = memoryview(buffer.numpy().data)
        while view:
            count = file.readinto(view)
            if not count:
                raise damaged(path, "it became shorter while it was read")
            view = view[count:]
    return buffer.view(getattr(torch, slot.dtype)).reshape(slot.shape)


def entries(path: Path) -> tuple[dict[str, Entry], Mapping[str, str]]:
    """The tensors of one file, and its metadata."""
    header = read_header(path)
    found = {name: Entry(slot.shape, slot.dtype, partial(read_slot, path, slot)) for name, slot in header.slots.items()}
    return found, header.metadata


def read_index(path: Path) -> dict[str, Path]:
    """``*.index.json`` -> the shard that holds each tensor.

    Raises:
        PcqError: it is not an index, or shards are missing: each is named.
    """
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        places = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        todo = "Give the checkpoint itself, or its folder"
        raise PcqError('it is JSON without a "weight_map" of tensors to files', where=str(path), todo=todo) from error
    shards = sorted(set(places.values()))
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise PcqError(f"it points outside its own folder, to '{outside[0]}'", where=str(path))
    missing = [shard for shard in shards if not (path.parent / shard).is_file()]
    todo = f"Put it into {path.parent}"
    raise_all([PcqError(f"the shard '{shard}' is missing", where=str(path), todo=todo) for shard in missing])
    return {name: path.parent / shard for name, shard in places.items()}


def sharded_entries(index: Path) -> dict[str, Entry]:
    """The tensors of a sharded checkpoint, in the order of its index.

    Raises:
        PcqError: a shard is missing, or does not hold what the index says.
    """
    places = read_index(index)
    shards = {shard: entries(shard)[0] for shard in dict.fromkeys(places.values())}
    return pick(index, places, shards)


def pick(index: Path, places: Mapping[str, Path], shards: Mapping[Path, Mapping[str, Entry]]) -> dict[str, Entry]:
    """The entry of each tensor from the shard that the index names."""
    todo = "The index and its shards are not of one checkpoint: fetch all of them again"
    raise_all(
        [
            PcqError(f"'{name}' is not in {shard.name}, where the index has it", where=str(index), todo=todo)
            for name, shard in places.items()
            if name not in shards[shard]
        ][:5]
    )
    return {name: shards[shard][name] for name, shard in places.items()}
