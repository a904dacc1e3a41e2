"""The body of an unpacking function, recorded node by node, and beside it what a call's attributes are."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pcq.export.frame import Array, Frame
from pcq.packing import DIGITS, planes

DOMAIN = "pcq"
FLOAT, INT32 = ir.DataType.FLOAT, ir.DataType.INT32


@dataclass(frozen=True)
class Lowered:
    """What one quantized tensor becomes.

    Attributes:
        arrays: the initializers, by the last part of their names: ``packed``, ``scale``, ``zero_point``, ``levels``.
        function: the unpacking function; equal forms give functions of equal names and bodies.
        attributes: the call's attributes.
        shape: shape of the call's result; reversed where the weight is stored transposed.
    """

    arrays: dict[str, Array]
    function: ir.Function
    attributes: dict[str, int | list[int]]
    shape: tuple[int, ...]


class Body:
    """Records a function's nodes and, beside them, what its attributes are in the call at hand."""

    def __init__(self, frame: Frame, count: int, opset: int) -> None:
        self.frame, self.count, self.opset = frame, count, opset
        self.numel = math.prod(frame.shape)
        self.cut = any(self.numel % DIGITS[radix] for radix in planes(count))  # the last byte has digits to spare
        self.tape = ir.tape.Tape()
        self.inputs: dict[str, ir.Value] = {}
        self.attributes: dict[str, int | list[int]] = {}
        self.constants: dict[str, ir.Value] = {}
        self.names: Counter[str] = Counter()

    def op(
        self,
        kind: str,
        *inputs: ir.Value,
        name: str | None = None,
        **attributes: int | list[int] | ir.TensorProtocol | ir.Attr,
    ) -> ir.Value:
        """A node and its result; the name is for those who look at the graph."""
        self.names[name or kind.lower()] += 1
        count = self.names[name or kind.lower()]
        name = f"{name or kind.lower()}{count if count > 1 else ''}"
        return self.tape.op(kind, inputs, attributes, name=name, output=ir.Value(name=name))

    def input(self, name: str) -> ir.Value:
        return self.inputs.setdefault(name, ir.Value(name=name))

    def ints(self, *values: int) -> ir.Value:
        key = f"ints {values}"
        if key not in self.constants:
            self.constants[key] = self.op("Constant", value_ints=list(values), name="ints")
        return self.constants[key]

    def number(self, value: int | float) -> ir.Value:
        """A scalar: int64 or float32."""
        if isinstance(value, int):
            return self.op("Constant", value_int=value, name="number")
        return self.op("Constant", value=ir.tensor(np.float32(value)), name="number")

    def cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        return self.op("Cast", value, to=int(to))

    def attribute(self, name: str, value: int | tuple[int, ...]) -> ir.Value:
        """A constant that the call gives: a scalar or a list."""
        if name not in self.constants:
            self.attributes[name] = value if isinstance(value, int) else list(value)
            scalar = isinstance(value, int)
            field, kind = ("value_int", ir.AttributeType.INT) if scalar else ("value_ints", ir.AttributeType.INTS)
            self.constants[name] = self.op("Constant", **{field: ir.RefAttr(field, name, kind)}, name=f"{name}_")
        return self.constants[name]

    def table(self, values: Array) -> ir.Value:
        """What each byte holds: ``[radix ** digits, digits]`` of ``values [radix]``."""
        radix = len(values)
        digits = np.arange(radix ** DIGITS[radix])[:, None] // radix ** np.arange(DIGITS[radix]) % radix
        return self.op("Constant", value=ir.tensor(values[digits]), name="table")

    def plane(self, i: int, table: ir.Value | None) -> ir.Value:
        """Plane ``i``, each byte looked up in ``table`` or, without one, taken as it is; in the view's shape."""
        radices, plane = planes(self.count), self.input("packed")
        if table is None and len(radices) == 1:
            return plane
        if len(radices) > 1:
            ends = list(accumulate(math.ceil(self.numel / DIGITS[radix]) for radix in radices))
            begin = self.attribute(f"plane{i}", (ends[i - 1],)) if i else self.ints(0)
            plane = self.op("Slice", plane, begin, self.attribute(f"plane{i + 1}", (ends[i],)), name="plane")
        if table is not None:
            plane = self.op("Gather", table, self.cast(plane, INT32), name="digits")
            if self.cut:
                flat = self.op("Reshape", plane, self.ints(-1))
                plane = self.op("Slice", flat, self.ints(0), self.attribute("numel", (self.numel,)))
        view = self.attribute("shape" if self.frame.way == "plain" else "view", self.frame.view)
        return self.op("Reshape", plane, view, name="codes")

    def codes(self, tables: Sequence[npt.NDArray[np.uint8 | np.int8]], to: ir.DataType) -> ir.Value:
        """The sum over the planes of what their digits stand for, in the view's shape.

        Where the terms have no bits in common the sum is a BitwiseOr of bytes: half the time and memory of Add, which
        ONNX Runtime has for bytes since 1.23 only.
        """
        parts = [self.plane(i, self.table(table) if len(table) != 256 else None) for i, table in enumerate(tables)]
        apart = all((a[:, None] & b == 0).all() for i, a in enumerate(tables) for b in tables[:i])
        if apart and self.opset >= 18:
            return self.cast(reduce(lambda a, b: self.op("BitwiseOr", a, b), parts), to)
        return reduce(lambda a, b: self.op("Add", a, b), [self.cast(part, to) for part in parts])

    def row_starts(self) -> ir.Value:
        """int32 ``[*place]``: where each row's levels start in the flat table."""
        end = self.attribute("entries", self.frame.rows.g * self.count)
        starts = self.cast(self.op("Range", self.number(0), end, self.number(self.count)), ir.DataType.INT32)
        return self.op("Reshape", starts, self.attribute("place", self.frame.place))

    def per_row(self, value: ir.Value) -> ir.Value:
        """One number per row, made to broadcast against the view."""
        if self.frame.way != "ragged":
            return value
        position = self.op("Range", self.number(0), self.attribute("length", self.frame.rows.length), self.number(1))
        group = self.op("Div", position, self.attribute("group", self.frame.rows.width))
        shape, perm = self.frame.spread
        spread = self.op("Gather", value, group, axis=1)
        self.attributes["perm"] = list(perm)
        by_channel = self.op("Reshape", spread, self.attribute("spread", shape))
        return self.op("Transpose", by_channel, perm=ir.RefAttr("perm", "perm", ir.AttributeType.INTS))

    def finish(self, name: str, result: ir.Value, arrays: dict[str, Array], also: ir.Value | None = None) -> Lowered:
        """The function of inputs ``arrays`` and output ``result``, and ``also`` if it has a second one."""
        name += "Cut" if self.cut else ""
        if self.frame.way != "plain":
            name += self.frame.way.capitalize()
            result = self.op("Reshape", result, self.attribute("shape", self.frame.shape))
        result.name = "weight"
        outputs = [result] if also is None else [result, also]
        graph = ir.Graph(
            [self.inputs[key] for key in arrays], outputs, nodes=self.tape.nodes, opset_imports={"": self.opset}
        )
        kinds = {int: ir.AttributeType.INT, list: ir.AttributeType.INTS}
        declared = [ir.Attr(key, kinds[type(value)], None) for key, value in self.attributes.items()]
        function = ir.Function(DOMAIN, name, graph=graph, attributes=declared)
        return Lowered(arrays, function, self.attributes, self.frame.shape)
