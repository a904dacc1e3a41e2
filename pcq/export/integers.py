"""Packed weights that unpack to int8: ``weight = s * q`` with q integers and one s for each output channel, exactly.

An affine weight ``scale * (code - zero_point)`` is ``(scale * gain) * (multiplier * (code - zero_point))``, where
``gain`` takes in what else multiplies the channel (a folded BatchNorm) and undoes the multiplier. Where that is
negative the channel's integers are negated (``flip``), as int8 kernels want positive scales.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from pcq.export.body import FLOAT, INT32, Body, Lowered
from pcq.export.frame import Array, Frame
from pcq.export.lowering import digits, is_signed, stored_codes
from pcq.grids import Affine, Grid
from pcq.packing import planes
from pcq.qtensor import QuantizedTensor
from pcq.rows import Rows

Floats = npt.NDArray[np.float32]

SAFE = 64
"""Largest integer of weights whose products with uint8, added in pairs, fit into int16: processors without VNNI
saturate there (2 * 255 * 64 < 2**15)."""


@dataclass(frozen=True)
class Integers:
    """What makes a weight's codes integers.

    Attributes:
        halves: 2 where the zero point lies between two codes, else 1.
        multiplier: what the integers ``halves * (code - zero_point)`` are multiplied by: as much as ``SAFE`` allows,
            so that a bias in units of ``s`` is fine enough.
    """

    halves: int
    multiplier: int

    @property
    def unit(self) -> int:
        return self.halves * self.multiplier


def integers(weight: QuantizedTensor) -> Integers | str:
    """How the weight becomes int8, or why it cannot."""
    return integers_of(weight.grid, weight.rows)


def integers_of(grid: Grid, rows: Rows) -> Integers | str:
    """How weights with these levels become int8, or why they cannot."""
    if not isinstance(grid, Affine):
        return "its levels are a list, not integers times a scale"
    if rows.groups > 1:
        return "groups along a row have scales of their own"
    if rows.blocks > 1 or (rows.axis == 1 and len(rows.shape) > 2):
        return "a transposed convolution"
    zero = grid.zero_point
    least, most = (float(zero.min()), float(zero.max())) if isinstance(zero, Tensor) else (zero, zero)
    halves = grid.halves
    low, high = -most * halves, (grid.count - 1 - least) * halves
    if low < -128 or high > 127:
        return f"its integers reach from {low:g} to {high:g}"
    return Integers(halves, max(1, int(SAFE // max(-low, high, 1))))


def large(grid: Grid) -> bool:
    """Whether a weight of this form of levels may have integers above ``SAFE``."""
    if not isinstance(grid, Affine):
        return False
    zero = grid.zero_point
    reach = grid.count - 1 if isinstance(zero, Tensor) else max(zero, grid.count - 1 - zero)
    return reach * grid.halves > SAFE


@dataclass(frozen=True)
class Channels:
    """What belongs to a layer's output channels in int8.

    Attributes:
        gain: float32 ``[C]`` or ``[1]``: ``s = scale * gain``.
        flip: int8 ``[C]`` in -1, 0, 1: integers are multiplied by it; None: by 1.
        floor: float32 ``[C]``: s is at least this; with flip.
    """

    gain: Floats
    flip: npt.NDArray[np.int8] | None = None
    floor: Floats | None = None


def lower_int8(
    weight: QuantizedTensor, form: Integers, channels: Channels, opset: int, transposed: bool = False
) -> Lowered:
    """The function ``packed, scale, [zero_point], gain, [flip, floor] -> q int8, s float32 [C] or [1]``."""
    grid, frame = weight.grid, Frame(weight.rows, transposed)
    assert isinstance(grid, Affine)
    body = Body(frame, grid.count, opset)
    arrays: dict[str, Array] = {"packed": stored_codes(weight, frame)}
    arrays["scale"] = frame.arrange(grid.scale)
    unit, name = form.unit, f"Int8x{form.unit}"
    tables = [table.astype(np.int64) * unit for table in digits(grid.count)]
    if isinstance(grid.zero_point, Tensor):
        arrays["zero_point"] = frame.arrange(grid.zero_point)
        zero = body.input("zero_point")
        if form.halves == 2:
            zero = body.cast(body.op("Mul", body.cast(zero, FLOAT), body.number(float(unit))), INT32)
            name += "Half"
        else:
            zero = body.cast(zero, INT32)
            zero = body.op("Mul", zero, body.cast(body.number(unit), INT32)) if unit > 1 else zero
        q = body.op("Sub", body.codes([table.astype(np.int32) for table in tables], INT32), zero)
        name += f"Affine{grid.count}"
    else:
        tables[-1] -= round(grid.zero_point * unit)
        name += f"Minus{grid.zero_point:g}of{grid.count}".replace(".", "_")
        if is_signed(grid):
            q = body.input("packed")
        elif len(planes(grid.count)) == 1:
            q = body.plane(0, body.table(tables[0].clip(-128, 127).astype(np.int8)))
        else:
            q = body.codes([table.astype(np.int32) for table in tables], INT32)
    arrays["gain"] = channels.gain
    s = body.op("Mul", body.op("Reshape", body.input("scale"), body.ints(-1)), body.input("gain"))
    if channels.flip is not None and channels.floor is not None:
        name += "Flipped"
        arrays |= {"flip": channels.flip, "floor": channels.floor}
        place = (1, -1) if transposed else (-1, *[1] * (len(frame.shape) - 1))
        flip = body.op("Reshape", body.cast(body.input("flip"), INT32), body.ints(*place))
        q = body.op("Mul", body.cast(q, INT32), flip)
        s = body.op("Max", s, body.input("floor"))
    s.name = "s"
    return body.finish(name, body.cast(q, ir.DataType.INT8), arrays, s)


def expected(weight: QuantizedTensor, form: Integers, channels: Channels) -> tuple[Tensor, Floats]:
    """What the function gives: q int8 in the weight's own shape, and s."""
    grid, rows = weight.grid, weight.rows
    assert isinstance(grid, Affine)
    q = rows.merge((rows.split(weight.codes).double() - grid.zeros()) * form.unit)
    s = (grid.scale.numpy() * channels.gain).astype(np.float32)
    if channels.flip is not None and channels.floor is not None:
        q *= torch.from_numpy(channels.flip).double().reshape(-1, *[1] * (q.ndim - 1))
        s = np.maximum(s, channels.floor)
    return q.to(torch.int8), s
