"""What the file says about each packed weight: ``metadata_props["pcq.scheme"]``, JSON by parameter name.

With it and the initializers ``<param>/packed /scale /zero_point /levels`` a reader needs nothing else:

    planes      packed bytes are one plane after another; plane i has radix r_i, as many digits a byte as fit
                (r ** digits <= 256), least significant first; code = d_0 + r_0 * (d_1 + r_1 * (d_2 + ...))
    shape       the weight's; with ``transposed`` the codes are those of the transposed matrix
    kind        affine: scale * (code - zero_point); codebook: scale * levels[code]
    axis, blocks, group   which weights share a row of scale, zero_point and levels (see pcq.rows)
    sha256      of the codes, one byte each, row-major in the weight's own shape

Of another layout than ``exact`` (pcq.export.layouts) it says more, and there are no planes:

    layout      native, low-memory, matmulnbits
    unit, offset   what is stored is unit * code - offset, and scales are divided by unit
    bits, block    MatMulNBits: uint8 [out, blocks, block * bits / 8], least significant first, a scale for each block
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from pcq.errors import CheckFailed
from pcq.export.layouts import Layout
from pcq.export.stored import Stored
from pcq.grids import Affine
from pcq.marks import SCHEME
from pcq.packing import planes
from pcq.qtensor import QuantizedTensor

KEY = SCHEME
SATURATING = "pcq.int8_saturating"
FOLDED = "pcq.folded"
USUAL = "pcq.usual"
"""JSON by input, of those that take any sizes: one sample's sizes in the example that the file was exported with."""


@dataclass(frozen=True)
class Scheme:
    """One packed weight. ``zero_point`` is None where it is stored by row, and in codebooks."""

    kind: Literal["affine", "codebook"]
    levels: int
    planes: tuple[int, ...]
    shape: tuple[int, ...]
    axis: int | None
    blocks: int
    group: int | None
    zero_point: float | None
    transposed: bool
    function: str
    sha256: str
    layout: Layout = "exact"
    unit: int = 1
    offset: int = 0
    bits: int = 0
    block: int = 0


_OTHERWISE = ("layout", "unit", "offset", "bits", "block")
"""What is said of other layouts than ``exact`` only."""


def describe(
    weight: QuantizedTensor, function: str, transposed: bool, layout: Layout = "exact", stored: Stored | None = None
) -> Scheme:
    """The scheme of a weight that ``function`` unpacks."""
    grid, rows = weight.grid, weight.rows
    affine = isinstance(grid, Affine)
    zero = grid.zero_point if isinstance(grid, Affine) and isinstance(grid.zero_point, int | float) else None
    codes = np.ascontiguousarray(weight.codes.numpy())
    made = Scheme(
        "affine" if affine else "codebook", grid.count, planes(grid.count), rows.shape, rows.axis, rows.blocks,
        rows.group, zero, transposed, function, hashlib.sha256(codes.data).hexdigest(),
    )  # fmt: skip
    if stored is None:
        return made
    return replace(made, planes=(), layout=layout, unit=stored.unit, offset=stored.offset, bits=stored.bits,
                   block=stored.block or 0)  # fmt: skip


def usual_sizes(metadata: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """What a file's metadata says under :data:`USUAL`; nothing where it says nothing that can be read."""
    try:
        said = {name: tuple(map(int, sizes)) for name, sizes in json.loads(metadata.get(USUAL, "{}")).items()}
    except (ValueError, TypeError, AttributeError):
        return {}
    return {name: sizes for name, sizes in said.items() if min(sizes, default=1) > 0}


def to_json(schemes: Mapping[str, Scheme]) -> str:
    """Compact JSON."""
    said = {name: asdict(scheme) for name, scheme in schemes.items()}
    for entry in said.values():
        if entry["layout"] == "exact":
            for key in _OTHERWISE:
                del entry[key]
    return json.dumps(said, separators=(",", ":"))


def from_json(text: str, where: str) -> dict[str, Scheme]:
    """The inverse of :func:`to_json`.

    Raises:
        CheckFailed: it is not what :func:`to_json` writes.
    """
    try:
        read: dict[str, dict[str, Any]] = json.loads(text)
        return {
            name: Scheme(**{**entry, "planes": tuple(entry["planes"]), "shape": tuple(entry["shape"])})
            for name, entry in read.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckFailed(f"its packing scheme is unreadable ({error})", where=where,
                          todo="The file is damaged, or a newer pcq wrote it") from error  # fmt: skip
