"""Codes in ONNX's small integer types: the functions that cast or dequantize them.

Like the packed ones (pcq.export.lowering) they give the very bits of :meth:`QuantizedTensor.dequantize`. Casts are
folded to a constant when a session is made; ONNX Runtime folds no DequantizeLinear: there the codes stay as they are.
"""

import ml_dtypes
import numpy as np
from torch import Tensor

from pcq.export.body import FLOAT, Body, Lowered
from pcq.export.frame import Array, Frame
from pcq.export.stored import Stored
from pcq.grids import Affine
from pcq.qtensor import QuantizedTensor

DTYPES: dict[str, np.dtype] = {
    "int2": np.dtype(ml_dtypes.int2), "uint2": np.dtype(ml_dtypes.uint2),
    "int4": np.dtype(ml_dtypes.int4), "uint4": np.dtype(ml_dtypes.uint4),
    "int8": np.dtype(np.int8), "uint8": np.dtype(np.uint8),
}  # fmt: skip


def integers(codes: Tensor, stored: Stored) -> Array:
    """``unit * code - offset`` in the stored type."""
    return (codes.numpy().astype(np.int16) * stored.unit - stored.offset).astype(np.int8).astype(DTYPES[stored.kind])


def lower_native(weight: QuantizedTensor, stored: Stored, opset: int, transposed: bool = False) -> Lowered:
    """The function ``packed, scale, [zero_point] -> scale * (packed - zero)``."""
    grid, frame = weight.grid, Frame(weight.rows, transposed)
    assert isinstance(grid, Affine), grid
    body = Body(frame, grid.count, opset)
    body.cut = False
    codes = weight.codes.t() if transposed else weight.codes
    arrays: dict[str, Array] = {"packed": integers(codes.reshape(frame.view), stored)}
    arrays["scale"] = frame.arrange(grid.scale)
    name, value = stored.kind.capitalize(), body.cast(body.input("packed"), FLOAT)
    scale = body.input("scale")
    if isinstance(grid.zero_point, Tensor):
        zero = frame.arrange(grid.zero_point)
        arrays["zero_point"] = zero if grid.halves == 2 else zero.astype(DTYPES[stored.kind])
        value = body.op("Sub", value, body.per_row(body.cast(body.input("zero_point"), FLOAT)))
        name += "Affine"
    elif stored.zero:
        value = body.op("Sub", value, body.number(float(stored.zero)))
        name += f"Minus{stored.zero:g}".replace(".", "_")
    return body.finish(name, body.op("Mul", value, body.per_row(scale)), arrays)


def lower_dequantize(weight: QuantizedTensor, stored: Stored, opset: int, transposed: bool = False) -> Lowered:
    """The function ``packed, scale, [zero_point] -> DequantizeLinear``, of one row of scales along one axis."""
    grid, frame, rows = weight.grid, Frame(weight.rows, transposed), weight.rows
    assert isinstance(grid, Affine), grid
    assert frame.way != "ragged", frame
    body = Body(frame, grid.count, opset)
    body.cut = False
    if frame.way == "grouped":
        view: tuple[int, ...] = (rows.g, rows.width)
        axis: int | None = 0
    else:
        view = frame.shape
        axis = None if rows.axis is None else (1 - rows.axis if transposed else rows.axis)
    codes = weight.codes.t() if transposed else weight.codes
    per_row = (rows.g,) if axis is not None else ()
    arrays: dict[str, Array] = {"packed": integers(codes.reshape(view), stored)}
    arrays["scale"] = (grid.scale / stored.unit).reshape(per_row).numpy()
    inputs, name = [body.input("packed"), body.input("scale")], f"Dequantize{stored.kind.capitalize()}"
    if stored.zero != 0:
        if isinstance(grid.zero_point, Tensor):
            zero = grid.zero_point * stored.unit
        else:
            zero = grid.scale.new_full((rows.g,), stored.zero or 0)
        arrays["zero_point"] = zero.reshape(per_row).numpy().astype(np.uint8).astype(DTYPES[stored.kind])
        inputs.append(body.input("zero_point"))
        name += "Affine"
    if axis is not None:
        name += f"Axis{axis}"
    value = body.op("DequantizeLinear", *inputs, name="dequantized", **({} if axis is None else {"axis": axis}))
    return body.finish(name, value, arrays)
