"""Codes as integers of ONNX's small types: what each layout can hold, and what it costs.

A stored integer is ``unit * code - offset``. A weight is ``scale / unit * (integer - zero)``.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pcq.grids import Affine, Grid
from pcq.rows import Rows

TYPES = {2: ("int2", "uint2"), 4: ("int4", "uint4"), 8: ("int8", "uint8")}
"""Bits -> the signed and the unsigned type."""

BLOCKS: tuple[int, ...] = (128, 64, 32, 16)
"""Weights that can share a scale in MatMulNBits."""


@dataclass(frozen=True)
class Stored:
    """How codes are stored as integers.

    Attributes:
        kind: the type, such as ``uint4``; MatMulNBits packs integers of ``bits`` into ``uint8`` itself.
        bits: 2, 4 or 8.
        unit: 2 where zero lies between two codes and the operator takes integers only: the scale is halved then.
        offset: what is subtracted.
        zero: the zero point of the stored integers; None: one for each row, ``unit`` times the grid's.
        block: for MatMulNBits: how many share a scale.
    """

    kind: str
    bits: int
    unit: int = 1
    offset: int = 0
    zero: float | None = 0
    block: int | None = None


def castable(grid: Affine) -> Iterator[Stored]:
    """In 2 and 4 bits, to be cast to float: integers around zero where one of them is zero; else the codes."""
    zero = grid.zero_point
    for bits in (2, 4):
        half, (signed, unsigned) = 2 ** (bits - 1), TYPES[bits]
        if grid.count > 2 * half:
            continue
        if isinstance(zero, Tensor):
            if grid.halves == 2 or _fit(zero, bits):
                yield Stored(unsigned, bits, zero=None)
        elif zero == int(zero) and 0 <= zero <= half and grid.count - 1 - zero < half:
            yield Stored(signed, bits, offset=int(zero))
        else:
            yield Stored(unsigned, bits, zero=zero)


def dequantizable(grid: Affine) -> Iterator[Stored]:
    """In 2, 4 and 8 bits with integer zero points, as DequantizeLinear takes them."""
    zero, unit = grid.zero_point, grid.halves
    if unit == 2 and not torch.equal(grid.scale * 0.5 * 2, grid.scale):
        return  # halving rounds the smallest scales
    for bits in (2, 4, 8):
        half, (signed, unsigned) = 2 ** (bits - 1), TYPES[bits]
        top = (grid.count - 1) * unit
        if isinstance(zero, Tensor):
            if top < 2 * half and _fit(zero * unit, bits):
                yield Stored(unsigned, bits, unit, zero=None)
            continue
        middle = int(zero * unit)
        if 0 <= middle <= half and top - middle < half:
            yield Stored(signed, bits, unit, middle)
        elif top < 2 * half and 0 <= middle < 2 * half:
            yield Stored(unsigned, bits, unit, zero=middle)


def multipliable(grid: Affine) -> Iterator[tuple[Stored, str]]:
    """In 2, 4 and 8 bits for MatMulNBits, without a block, and the form of its zero points: ``none``, which means
    half of the range, ``integer`` or ``float``."""
    zero = grid.zero_point
    for bits in (2, 4, 8):
        half = 2 ** (bits - 1)
        if grid.count > 2 * half:
            continue
        if isinstance(zero, Tensor):
            if grid.halves == 2:
                yield Stored("uint8", bits, zero=None), "float"
            elif _fit(zero, bits):
                yield Stored("uint8", bits, zero=None), "integer"
        elif zero != int(zero):
            yield Stored("uint8", bits, zero=zero), "float"
        elif 0 <= zero <= half and grid.count - 1 - zero < half:
            yield Stored("uint8", bits, offset=int(zero) - half, zero=half), "none"
        elif 0 <= zero < 2 * half:
            yield Stored("uint8", bits, zero=zero), "integer"


def _fit(zero: Tensor, bits: int) -> bool:
    return bool(zero.max() < 2**bits)


def typed_bytes(grid: Grid, rows: Rows, stored: Stored, zeros: int, bits: int | None = None) -> int:
    """Bytes of the integers, the scales and as many zero points of ``bits``, by default as many as the integers'."""
    return -(-math.prod(rows.shape) * stored.bits // 8) + 4 * grid.g + -(-zeros * (bits or stored.bits) // 8)


def blocked_bytes(rows: Rows, stored: Stored, form: str) -> int:
    """Bytes of MatMulNBits' integers, scales and zero points."""
    assert stored.block is not None, stored
    outputs, inputs = rows.shape
    blocks = -(-inputs // stored.block)
    zeros = {"none": 0, "integer": outputs * -(-blocks * stored.bits // 8), "float": 4 * outputs * blocks}[form]
    return outputs * blocks * (stored.block * stored.bits // 8 + 4) + zeros
