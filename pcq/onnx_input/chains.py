"""From what a layer reads back to where it is stored, through nodes that only rearrange or cast."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[np.generic]

REARRANGING = {"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast", "Slice", "Concat"}
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class Chain:
    """How a stored constant becomes the value that a layer reads.

    Attributes:
        root: the initializer, or the output of the Constant.
        tensor: what is stored there.
        nodes: what is in between, in the order of computing; Concat may join parts that Slices took.
        value: what the layer reads: the root, or the output of the last node.
    """

    root: ir.Value
    tensor: ir.TensorProtocol
    nodes: tuple[ir.Node, ...]
    value: ir.Value

    def places(self) -> npt.NDArray[np.int64]:
        """For every number that the layer reads its place in the stored tensor; int64 in the value's shape."""
        shape = tuple(self.tensor.shape.numpy())
        return np.asarray(self._follow(np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what the layer reads."""
        return tuple(self._follow(np.empty(tuple(self.tensor.shape.numpy()), np.bool_)).shape)

    def numbers(self) -> npt.NDArray[np.float32]:
        """What the layer reads, as float32 whatever the casts say."""
        return np.asarray(self._follow(self.tensor.numpy().astype(np.float32)))

    def repeats(self) -> bool:
        """Whether the layer reads a stored number twice."""
        if not any(node.op_type == "Slice" for node in self.nodes):
            return False
        places = self.places()
        return len(np.unique(places)) != places.size

    @property
    def dtype(self) -> ir.DataType:
        """Of what the layer reads."""
        return self.casts[-1] if self.casts else ir.DataType.FLOAT

    @property
    def casts(self) -> tuple[ir.DataType, ...]:
        """What numbers in float32 are cast to in turn before the layer reads them."""
        casts = [ir.DataType(node.attributes["to"].as_int()) for node in self.nodes if node.op_type == "Cast"]
        passed = [ir.DataType.FLOAT, *(casts or [self.tensor.dtype])]
        return tuple(after for before, after in pairwise(passed) if after != before)

    def _follow(self, stored: Any) -> Any:
        known = {self.root: stored}
        for node in self.nodes:
            known[node.outputs[0]] = _apply(node, [known[value] for value in node.inputs if value in known])
        return known[self.value]


def chain_to(value: ir.Value) -> Chain | None:
    """The chain that ends in ``value``; None where it does not begin with one stored float tensor."""
    roots: dict[ir.Value, ir.TensorProtocol] = {}
    nodes: dict[ir.Node, None] = {}
    if not _trace(value, roots, nodes) or len(roots) != 1:
        return None
    ((root, stored),) = roots.items()
    casts = [ir.DataType(node.attributes["to"].as_int()) for node in nodes if node.op_type == "Cast"]
    if stored.dtype not in FLOATS or any(dtype not in FLOATS for dtype in casts):
        return None
    return Chain(root, stored, tuple(nodes), value)


def _trace(value: ir.Value, roots: dict[ir.Value, ir.TensorProtocol], nodes: dict[ir.Node, None]) -> bool:
    """Collect what ``value`` is made of, inputs before outputs; False where it is not made of constants alone."""
    if (stored := stored_in(value)) is not None:
        roots[value] = stored
        return True
    node = value.producer()
    if node is None or node.op_type not in REARRANGING or node.domain not in ("", "ai.onnx") or not node.inputs:
        return False
    parts = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    if any(other is not None and constant_ints(other) is None for other in node.inputs[len(parts) :]):
        return False
    if not all(part is not None and _trace(part, roots, nodes) for part in parts):
        return False
    nodes[node] = None
    return True


def stored_in(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or a Constant."""
    if value.const_value is not None and value.is_initializer():
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    return node.attributes["value"].as_tensor() if "value" in node.attributes else None


def constant_ints(value: ir.Value | None) -> list[int] | None:
    """A constant list of integers, such as a shape; None where it is computed."""
    if value is None:
        return None
    tensor = stored_in(value)
    if tensor is not None and tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32):
        return [int(number) for number in tensor.numpy().reshape(-1)]
    node = value.producer()
    if node is not None and node.op_type == "Constant" and "value_ints" in node.attributes:
        return list(node.attributes["value_ints"].as_ints())
    return None


def _apply(node: ir.Node, arrays: list[Any]) -> Any:
    array = arrays[0]
    match node.op_type:
        case "Transpose":
            perm = node.attributes.get("perm")
            return array.transpose(None if perm is None else tuple(perm.as_ints()))
        case "Reshape":
            sizes = list(_ints(node, "shape", 1) or [])
            keep = "allowzero" not in node.attributes or not node.attributes["allowzero"].as_int()
            return array.reshape([array.shape[i] if size == 0 and keep else size for i, size in enumerate(sizes)])
        case "Squeeze":
            axes = _ints(node, "axes", 1)
            return array.squeeze(None if axes is None else tuple(axes))
        case "Unsqueeze":
            return np.expand_dims(array, tuple(_ints(node, "axes", 1) or ()))
        case "Flatten":
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
            return array.reshape(int(np.prod(array.shape[:axis])), -1)
        case "Concat":
            return np.concatenate(arrays, node.attributes["axis"].as_int())
        case "Slice":
            starts, ends = _ints(node, "starts", 1) or [], _ints(node, "ends", 2) or []
            axes = _ints(node, "axes", 3) or list(range(len(starts)))
            steps = _ints(node, "steps", 4) or [1] * len(starts)
            cut = [slice(None)] * array.ndim
            for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
                last = None if step < 0 and end < -array.shape[axis] else end
                cut[axis] = slice(start, last, step)
            return array[tuple(cut)]
    return array


def _ints(node: ir.Node, name: str, index: int) -> list[int] | None:
    """An attribute, or an input since it is one."""
    if name in node.attributes:
        return list(node.attributes[name].as_ints())
    given = node.inputs[index] if len(node.inputs) > index else None
    return None if given is None else constant_ints(given)


def users(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Nodes that read a value, and as which input."""
    for use in value.uses():
        yield use.node, use.idx
