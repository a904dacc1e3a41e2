"""All of an artifact but its values: what is stored where, and so its exact size, from the plan alone."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from pcq.activations import Range
from pcq.errors import PcqError
from pcq.grids import Affine, Codebook, Grid
from pcq.packing import packed_size, planes
from pcq.plan import Plan, Quantized
from pcq.qtensor import blank
from pcq.rows import Rows
from pcq.sources import ARTIFACT_KEY, Source
from pcq.sources.safetensors import DTYPES, Slot, itemsize

FORMAT = 1
PROGRAM = "__program__"
RESERVED = ("__metadata__", PROGRAM)
CODES = {name: code for code, name in DTYPES.items()}
"""Torch dtype, without ``torch.``, -> safetensors dtype."""


@dataclass(frozen=True)
class Coded:
    """A weight that will be stored as codes: its rows, its dtype, a grid of the right form, what it is in words."""

    rows: Rows
    dtype: str
    grid: Grid
    text: str


@dataclass(frozen=True)
class Plain:
    """A tensor that will be stored as it is."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ArtifactHeader:
    """All of an artifact but the values of its tensors.

    Attributes:
        tensors: every stored tensor under its name, in the state dict's order.
        tied: name -> the stored tensor it is another name of.
        arch: the architecture spec, if known.
        recipe: the resolved recipe as JSON.
        source: what it was made from: ``file``, and ``sha256`` where it is one file of moderate size.
        program: the exported program without its weights, for ``.pt2`` inputs.
        calibration: what it was calibrated with; empty, and then not stored, if it was not.
        activations: ranges of activations, where it was trained with 8 bits of these; not stored if empty.
    """

    tensors: Mapping[str, Coded | Plain]
    tied: Mapping[str, str] = field(default_factory=dict)
    arch: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, str] = field(default_factory=dict)
    program: bytes | None = field(default=None, repr=False)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    activations: Mapping[str, Range] = field(default_factory=dict)

    @cached_property
    def stored_as(self) -> dict[str, str]:
        """Coded weight -> the name its parts begin with: its own, unless a tensor already has such a name."""
        taken = set(self.tensors)
        found: dict[str, str] = {}
        for name, form in self.tensors.items():
            if isinstance(form, Coded):
                found[name] = name
                while taken & (keys := {f"{found[name]}.{part}" for part in part_shapes(form)}):
                    found[name] += "~"
                taken |= keys
        return found

    @cached_property
    def slots(self) -> dict[str, Slot]:
        """Every tensor of the file in the state dict's order; wide dtypes lie first, so that all are aligned.

        ``start`` counts from the end of the header.
        """
        specs: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, form in self.tensors.items():
            if isinstance(form, Plain):
                specs[name] = (form.dtype, form.shape)
            else:
                specs |= {f"{self.stored_as[name]}.{part}": spec for part, spec in part_shapes(form).items()}
        if self.program is not None:
            specs[PROGRAM] = ("uint8", (len(self.program),))
        places, start = {}, 0
        for key, (dtype, shape) in sorted(specs.items(), key=lambda item: -itemsize(item[1][0])):
            places[key] = Slot(dtype, shape, start)
            start += places[key].nbytes
        return {key: places[key] for key in specs}

    @cached_property
    def prefix(self) -> bytes:
        """The file's bytes before the tensors: length, JSON, and spaces to a multiple of 8."""
        head: dict[str, Any] = {"__metadata__": {"format": "pt", ARTIFACT_KEY: json.dumps(self.metadata())}}
        for key, slot in self.slots.items():
            head[key] = {
                "dtype": CODES[slot.dtype],
                "shape": slot.shape,
                "data_offsets": [slot.start, slot.start + slot.nbytes],
            }
        text = json.dumps(head, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def metadata(self) -> dict[str, Any]:
        """What stands under the metadata key ``pcq``."""
        return {
            "format": FORMAT,
            "versions": {"pcq": version("pcq"), "torch": str(torch.__version__)},
            "arch": self.arch,
            "source": dict(self.source),
            "recipe": dict(self.recipe),
            **({"calibration": dict(self.calibration)} if self.calibration else {}),
            **(
                {"activations": {k: [r.low, r.high, r.top] for k, r in self.activations.items()}}
                if self.activations
                else {}
            ),
            "tied": dict(self.tied),
            "tensors": {
                name: coded_to_json(form, name, self.stored_as[name])
                for name, form in self.tensors.items()
                if isinstance(form, Coded)
            },
        }


def part_shapes(form: Coded) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The parts a coded weight is stored in: name behind the dot -> dtype and shape."""
    grid = form.grid
    parts: dict[str, tuple[str, tuple[int, ...]]] = {
        "codes": ("uint8", (packed_size(grid.count, math.prod(form.rows.shape)),))
    }
    if grid.scale is not None:
        parts["scale"] = ("float32", tuple(grid.scale.shape))
    if isinstance(grid, Codebook):
        parts["levels"] = ("float32", tuple(grid.table.shape))
    elif isinstance(grid.zero_point, Tensor):
        dtype = str(grid.zero_point.dtype).removeprefix("torch.")
        parts["zero_point"] = (dtype, tuple(grid.zero_point.shape))
    return parts


def coded_to_json(form: Coded, name: str, prefix: str) -> dict[str, Any]:
    """A coded weight's entry in the metadata; what has its usual value is left out."""
    rows, grid = form.rows, form.grid
    entry: dict[str, Any] = {"shape": rows.shape, "dtype": form.dtype, "text": form.text, "count": grid.count}
    entry |= {"planes": planes(grid.count), "axis": rows.axis, "parts": list(part_shapes(form))}
    optional = {"blocks": (rows.blocks, 1), "group": (rows.group, None), "stored_as": (prefix, name)}
    entry |= {key: value for key, (value, usual) in optional.items() if value != usual}
    if isinstance(grid, Affine) and not isinstance(grid.zero_point, Tensor):
        entry["zero_point"] = float(grid.zero_point)
    return entry


def make_header(
    plan: Plan,
    *,
    arch: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    source: Source | None = None,
    calibration: Mapping[str, Any] | None = None,
    activations: Mapping[str, Range] | None = None,
) -> ArtifactHeader:
    """The header of the artifact that ``plan`` will become; reads no weights.

    Raises:
        PcqError: a tensor has a name that the format keeps for itself.
    """
    tensors: dict[str, Coded | Plain] = {}
    tied = {}
    for entry in plan.entries:
        parameter = entry.parameter
        if parameter.name in RESERVED:
            raise PcqError(
                "the artifact format keeps this name for itself", where=parameter.name, todo="Rename the tensor"
            )
        if parameter.tied_to is not None:
            tied[parameter.name] = parameter.tied_to
        elif isinstance(entry, Quantized):
            grid = blank(entry.quantizer, entry.rows)
            tensors[parameter.name] = Coded(entry.rows, parameter.dtype, grid, entry.text)
        else:
            tensors[parameter.name] = Plain(tuple(parameter.shape), parameter.dtype)
    origin = {} if source is None else source.origin()
    program = None if source is None else source.program
    return ArtifactHeader(tensors, tied, arch, recipe or {}, origin, program, calibration or {}, activations or {})


def predicted_size(header: ArtifactHeader) -> int:
    """Bytes of the finished file, known before any weight is read."""
    return len(header.prefix) + sum(slot.nbytes for slot in header.slots.values())
