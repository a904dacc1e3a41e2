"""A quantized tensor as ONNX: small arrays to store, and the model-local function that unpacks them.

The unpacking must give the very bits of :meth:`QuantizedTensor.dequantize`, run on every ONNX Runtime since 1.17 (so
nothing but Cast, Gather, Reshape, Slice, BitwiseOr, Add, Sub, Mul, Div, Range and Transpose), and be foldable to a
constant when a session is made (so every shape is an attribute). Whatever the grid, a plane's bytes index a constant
table ``[radix ** digits, digits]`` that holds the digits of every byte (whole bytes need none); what is left is
arithmetic on small integers:

    affine    scale * (d0 + r0 * d1 + ... - zero_point)      the tables already hold the terms, zero point included
    codebook  levels[d0 + r0 * d1 + ...]                     with one plane and one table, levels go into the table

A function is ``Grouped`` or ``Ragged`` after the way its rows lie (pcq.export.frame), and ``Cut`` where the last byte
has digits to spare: else the codes need not be copied twice more.
"""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from pcq.errors import PcqError
from pcq.export.body import FLOAT, INT32, Body, Lowered
from pcq.export.frame import Array, Frame
from pcq.grids import Affine, Codebook
from pcq.packing import pack, planes
from pcq.qtensor import QuantizedTensor


def lower(weight: QuantizedTensor, opset: int, transposed: bool = False) -> Lowered:
    """Lay a quantized tensor out for ONNX.

    Args:
        weight: on the CPU.
        opset: the model's; a function must import the same.
        transposed: store a matrix as ``[in, out]``, as MatMul wants it.

    Raises:
        PcqError: there is nothing to store.
    """
    if not weight.numel:
        raise PcqError("an empty tensor cannot be packed", todo="Keep it in float")
    frame = Frame(weight.rows, transposed)
    grid = weight.grid
    arrays = {"packed": stored_codes(weight, frame)}
    body = Body(frame, grid.count, opset)
    if isinstance(grid, Affine):
        arrays["scale"] = frame.arrange(grid.scale)
        if isinstance(grid.zero_point, Tensor):
            arrays["zero_point"] = frame.arrange(grid.zero_point)
        name, result = _affine(body, grid)
    else:
        arrays["levels"] = grid.table[0].numpy() if _shared(grid) else frame.arrange(grid.table)
        if grid.scale is not None:
            arrays["scale"] = frame.arrange(grid.scale)
        name, result = _codebook(body, grid)
    return body.finish(name, result, arrays)


def stored_codes(weight: QuantizedTensor, frame: Frame) -> Array:
    """Packed bytes ``[bytes]``; of whole bytes, in the view's shape and where zero is 128 less that, as int8: then
    nothing is left to do but a cast."""
    grid, codes = weight.grid, weight.codes.t() if frame.transposed else weight.codes
    packed = pack(codes.contiguous(), grid.count)
    if planes(grid.count) != (256,):
        return packed.numpy()
    packed = packed.reshape(frame.view)
    return (packed ^ 128).view(torch.int8).numpy() if is_signed(grid) else packed.numpy()


def is_signed(grid: Affine | Codebook) -> bool:
    """Whether codes are stored as the int8 ``code - 128``."""
    if not isinstance(grid, Affine) or isinstance(grid.zero_point, Tensor):
        return False
    return planes(grid.count) == (256,) and grid.zero_point == 128


def _shared(grid: Codebook) -> bool:
    return grid.table.shape[0] == 1


def _affine(body: Body, grid: Affine) -> tuple[str, ir.Value]:
    """``scale * (code - zero_point)``: exactly that float32 arithmetic, or integers that give the same bits.

    A zero point that all rows share is subtracted in the tables, 128 of whole bytes before they are stored. For one
    of n/2 the tables hold twice the value and the scale is halved, which is exact unless a scale is so small that
    halving it rounds.
    """
    zero, count, tables = grid.zero_point, grid.count, digits(grid.count)
    scale = body.input("scale")
    if isinstance(zero, Tensor):
        centred = body.op("Sub", body.codes(tables, FLOAT), body.per_row(body.cast(body.input("zero_point"), FLOAT)))
        return f"Affine{count}", body.op("Mul", centred, body.per_row(scale))
    name = {(2, 0.5): "Binary", (3, 1.0): "Ternary"}.get((count, zero)) or (
        f"Symmetric{count}" if zero == (count - 1) / 2 else f"Affine{count}Minus{zero:g}".replace(".", "_")
    )
    doubled = zero != int(zero)
    terms = [table.astype(np.int64) * (2 if doubled else 1) for table in tables]
    terms[-1] -= round(zero * (2 if doubled else 1))
    fits = len(tables[0]) != 256 and all(table.min() >= -128 and table.max() <= 127 for table in terms)
    exact = not doubled or torch.equal(grid.scale * 0.5 * 2, grid.scale)
    if is_signed(grid):
        centred = body.cast(body.input("packed"), FLOAT)
    elif fits and exact:
        centred = body.codes([table.astype(np.int8) for table in terms], FLOAT)
        scale = body.op("Mul", scale, body.number(0.5)) if doubled else scale
    else:
        codes = body.codes(tables, FLOAT)
        centred = body.op("Sub", codes, body.number(zero)) if zero else codes
        name += "" if exact else "Tiny"
    return name, body.op("Mul", centred, body.per_row(scale))


def _codebook(body: Body, grid: Codebook) -> tuple[str, ir.Value]:
    """``(scale * table)[row, code]``."""
    count, tables = grid.count, digits(grid.count)
    levels = body.input("levels")
    name = f"Codebook{count}"
    if not _shared(grid):
        name = "Row" + name
        if grid.scale is not None:
            name = "Scaled" + name
            table = body.op("Reshape", levels, body.ints(-1, count))
            levels = body.op("Mul", body.op("Reshape", body.input("scale"), body.ints(-1, 1)), table)
        flat = body.op("Reshape", levels, body.ints(-1))
        entry = body.op("Add", body.codes(tables, INT32), body.per_row(body.row_starts()), name="entry")
        return name, body.op("Gather", flat, entry)
    if len(tables) == 1 and len(tables[0]) != 256:
        table = body.op("Gather", levels, body.cast(body.table(tables[0]), INT32), name="table")
        weight = body.plane(0, table)
    else:
        weight = body.op("Gather", levels, body.codes(tables, INT32))
    if grid.scale is None:
        return name, weight
    return "Scaled" + name, body.op("Mul", weight, body.per_row(body.input("scale")))


def digits(count: int) -> list[npt.NDArray[np.uint8]]:
    """For each plane what its digits add to the code; digits that no code has are like the largest that one has."""
    tables, place = [], 1
    for radix in planes(count):
        tables.append((np.minimum(np.arange(radix), (count - 1) // place) * place).astype(np.uint8))
        place *= radix
    return tables
