"""Reading an artifact back: every byte is accounted for, every number checked, before anything is returned."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pcq.activations import FULL, HALF, Range
from pcq.checkpoint.header import FORMAT, PROGRAM, Coded, part_shapes
from pcq.errors import CheckFailed, PcqError
from pcq.grids import Affine, Codebook, Grid
from pcq.packing import planes, unpack
from pcq.qtensor import QuantizedTensor
from pcq.rows import Rows
from pcq.sources import ARTIFACT_KEY
from pcq.sources.pt2 import Inputs, example_inputs, revive, runnable
from pcq.sources.safetensors import DTYPES, Header, read_header, read_slot
from pcq.sources.source import unreadable

if TYPE_CHECKING:
    from torch.export import ExportedProgram

PARTS = {
    "codes": ((torch.uint8,), 1),
    "scale": ((torch.float32,), 1),
    "zero_point": ((torch.uint8, torch.float16), 1),
    "levels": ((torch.float32,), 2),
}
"""Dtypes and number of axes of each part."""


@dataclass(frozen=True)
class Artifact:
    """An artifact in memory.

    Attributes:
        names: every name of the state dict in its order, tied ones last.
        quantized: weights as codes and grids.
        floats: everything else, as it was.
        tied: name -> the name in ``quantized`` or ``floats`` of the tensor it shares.
        dtypes: quantized weight -> its dtype before, without ``torch.``.
        texts: quantized weight -> its levels in words.
        arch: the architecture spec, if known.
        recipe: the resolved recipe as JSON.
        source: what it was made from.
        versions: pcq and torch that wrote it.
        program: the exported program without its weights, for ``.pt2`` inputs.
        nbytes: size of the file.
        calibration: data, method, samples and seed it was calibrated with; empty if it was not.
        activations: ranges of activations by name (``pcq.activations``), where it was trained with 8 bits of these.
    """

    names: tuple[str, ...]
    quantized: Mapping[str, QuantizedTensor]
    floats: Mapping[str, Tensor]
    tied: Mapping[str, str]
    dtypes: Mapping[str, str]
    texts: Mapping[str, str]
    arch: str | None
    recipe: Mapping[str, Any]
    source: Mapping[str, str]
    versions: Mapping[str, str]
    program: bytes | None = field(repr=False)
    nbytes: int
    calibration: Mapping[str, Any] = field(default_factory=dict)
    activations: Mapping[str, Range] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Tensor]:
        """A plain state dict for the original network, in the original dtypes; tied names hold the same tensor."""
        levels = self.quantized.items()
        return self._named({name: weight.dequantize().to(getattr(torch, self.dtypes[name])) for name, weight in levels})

    def dequantized(self) -> dict[str, Tensor]:
        """The same with quantized weights in float32: the very numbers that their codes stand for."""
        return self._named({name: weight.dequantize() for name, weight in self.quantized.items()})

    def _named(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        stored = {**self.floats, **weights}
        return {name: stored[self.tied.get(name, name)] for name in self.names}

    def exported_program(self) -> "ExportedProgram":
        """The exported program with the dequantized weights; needs no source code.

        Raises:
            PcqError: the artifact holds no program.
            CheckFailed: the program does not load in this torch.
        """
        if self.program is None:
            raise PcqError("the artifact holds no exported program", todo="Give the architecture with --arch")
        return revive(self.program, self.state_dict())

    def program_module(self) -> nn.Module:
        """That program as a module; raises what :meth:`exported_program` does."""
        return runnable(self.exported_program())

    def example_inputs(self) -> Inputs:
        """The exported program's inputs, as zeros of the shapes it was exported with; empty without a program."""
        return () if self.program is None else example_inputs(self.program)


def is_artifact(path: str | Path) -> bool:
    """Whether a file is an artifact, by its header; False also for whatever cannot be read."""
    try:
        return ARTIFACT_KEY in read_header(Path(path)).metadata
    except (OSError, PcqError):
        return False


def read_artifact(path: str | Path) -> Artifact:
    """Read an artifact and check all of it.

    Raises:
        PcqError: it is not an artifact, or of a format that this version does not know.
        CheckFailed: it is damaged.
    """
    path = Path(path)
    try:
        header = read_header(path)
        metadata = read_metadata(path, header)
        try:
            return assemble(path, header, metadata)
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
            said = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
            said = "its metadata contradicts itself" if isinstance(error, AssertionError) else said
            what = f"the artifact is damaged: {said}"
            raise CheckFailed(what, where=str(path), todo="Make it again with `pcq quantize`") from error
    except OSError as error:
        raise unreadable(path, error) from error


def read_metadata(path: Path, header: Header) -> dict[str, Any]:
    """The JSON under the key ``pcq``, of the format we know."""
    if ARTIFACT_KEY not in header.metadata:
        todo = "Make an artifact of it with `pcq quantize`"
        raise PcqError("a plain safetensors file, not an artifact of pcq", where=str(path), todo=todo)
    try:
        metadata: dict[str, Any] = json.loads(header.metadata[ARTIFACT_KEY])
        form, wrote = metadata["format"], metadata["versions"]["pcq"]
    except (ValueError, KeyError, TypeError) as error:
        what = "the artifact is damaged: its metadata does not say format and version"
        raise CheckFailed(what, where=str(path), todo="Make it again with `pcq quantize`") from error
    if form != FORMAT:
        what = f"written by pcq {wrote} in format {form}, and this pcq {version('pcq')} reads format {FORMAT}"
        raise PcqError(what, where=str(path), todo=f"Install pcq {wrote} or newer")
    return metadata


def assemble(path: Path, header: Header, metadata: Mapping[str, Any]) -> Artifact:
    """Build the artifact; an exception of Python's own means that the file contradicts itself."""
    entries: Mapping[str, Any] = metadata["tensors"]
    owner: dict[str, str] = {}
    quantized: dict[str, QuantizedTensor] = {}
    for name, entry in entries.items():
        keys = {part: f"{entry.get('stored_as', name)}.{part}" for part in entry["parts"]}
        if lost := [key for key in keys.values() if key not in header.slots]:
            raise ValueError(f"'{lost[0]}' is missing")
        quantized[name] = decode(name, entry, {part: read_slot(path, header.slots[key]) for part, key in keys.items()})
        owner |= dict.fromkeys(keys.values(), name)
    stored = list(dict.fromkeys(owner.get(key, key) for key in header.slots if key != PROGRAM))
    tied: Mapping[str, str] = metadata["tied"]
    if wrong := [name for name, first in tied.items() if first not in stored or name in stored]:
        raise ValueError(f"'{wrong[0]}' is tied to '{tied[wrong[0]]}', which is not in it")
    return Artifact(
        names=(*stored, *tied),
        quantized=quantized,
        floats={name: read_slot(path, header.slots[name]) for name in stored if name not in entries},
        tied=tied,
        dtypes={name: dtype_of(name, entry) for name, entry in entries.items()},
        texts={name: str(entry["text"]) for name, entry in entries.items()},
        arch=metadata["arch"],
        recipe=metadata["recipe"],
        source=metadata["source"],
        versions=metadata["versions"],
        program=bytes(read_slot(path, header.slots[PROGRAM]).numpy()) if PROGRAM in header.slots else None,
        nbytes=path.stat().st_size,
        calibration=metadata.get("calibration", {}),
        activations={name: range_of(name, span) for name, span in metadata.get("activations", {}).items()},
    )


def range_of(name: str, said: list[float]) -> Range:
    """A stored range.

    Raises:
        ValueError: it is none.
    """
    low, high, top = said
    if not (math.isfinite(low) and math.isfinite(high) and low <= 0 <= high and top in (HALF, FULL)):
        raise ValueError(f"the activations '{name}' have the range {said}")
    return Range(float(low), float(high), int(top))


def decode(name: str, entry: Mapping[str, Any], parts: Mapping[str, Tensor]) -> QuantizedTensor:
    """One quantized weight from its stored parts; every shape and every value is checked.

    Raises:
        ValueError: what is wrong with which part.
    """
    rows = Rows(tuple(entry["shape"]), entry["axis"], entry.get("blocks", 1), entry.get("group"))
    for part, tensor in parts.items():
        dtypes, axes = PARTS[part]
        if tensor.dtype not in dtypes or tensor.ndim != axes:
            raise ValueError(f"'{name}.{part}' is {tensor.dtype} {list(tensor.shape)}")
    grid = grid_of(entry, parts)
    if list(planes(grid.count)) != entry["planes"]:
        raise ValueError(f"'{name}' is packed in planes {entry['planes']}, not {list(planes(grid.count))}")
    expected = part_shapes(Coded(rows, entry["dtype"], grid, ""))
    for part, tensor in parts.items():
        rows_wanted = [rows.g, 1] if part == "levels" else [rows.g]
        found = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        if part not in expected or found != expected[part] or (part != "codes" and found[1][0] not in rows_wanted):
            raise ValueError(f"'{name}.{part}' is {found[0]} {list(found[1])}, which does not fit {rows.g} rows")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"'{name}.{part}' is not finite")
    if grid.scale is not None and bool((grid.scale < 0).any()):
        raise ValueError(f"'{name}.scale' is negative")
    if "zero_point" in parts and bool((parts["zero_point"].double() * 2 % 1 != 0).any()):
        raise ValueError(f"'{name}.zero_point' is no multiple of 1/2")
    if isinstance(grid, Codebook) and bool((grid.table.diff(dim=1) < 0).any()):
        raise ValueError(f"'{name}.levels' does not ascend")
    try:
        return QuantizedTensor(unpack(parts["codes"], grid.count, rows.shape), grid, rows)
    except ValueError as error:
        raise ValueError(f"'{name}.codes' holds {error}") from error


def grid_of(entry: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Grid:
    """``levels`` make a codebook, anything else is evenly spaced."""
    if "levels" in parts:
        grid: Grid = Codebook(parts["levels"], parts.get("scale"))
    else:
        zero = parts["zero_point"] if "zero_point" in parts else float(entry["zero_point"])
        grid = Affine(parts["scale"], zero, entry["count"])
    if grid.count != entry["count"]:
        raise ValueError(f"{grid.count} levels where the header says {entry['count']}")
    return grid


def dtype_of(name: str, entry: Mapping[str, Any]) -> str:
    if entry["dtype"] not in DTYPES.values():
        raise ValueError(f"'{name}' was of type {entry['dtype']}, which is none")
    return str(entry["dtype"])
