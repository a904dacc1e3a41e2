"""MatMulNBits, ONNX Runtime's own operator: a matrix of 2-, 4- or 8-bit integers that stays packed in memory.

It computes ``x @ W.T`` with ``W [N, K]`` cut along K into blocks, each with a scale and a zero point of its own. A row
of pcq is one block or holds several: then its scale is repeated in each.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from pcq.export.frame import Array
from pcq.export.layouts import Level
from pcq.export.stored import Stored
from pcq.grids import Affine
from pcq.qtensor import QuantizedTensor

CONTRIB, OPERATOR = "com.microsoft", "MatMulNBits"


@dataclass(frozen=True)
class Blocks:
    """What MatMulNBits takes: initializers by the last part of their names, and the attributes."""

    arrays: dict[str, Array]
    attributes: dict[str, int]


def blocks(weight: QuantizedTensor, stored: Stored, level: Level) -> Blocks:
    """A matrix ``[N, K]`` in blocks."""
    grid, rows, block = weight.grid, weight.rows, stored.block
    assert isinstance(grid, Affine), grid
    assert block is not None, stored
    outputs, inputs = rows.shape
    count = -(-inputs // block)
    codes = F.pad(weight.codes.to(torch.int16) - stored.offset, (0, count * block - inputs))
    arrays: dict[str, Array] = {"packed": _pack(codes.reshape(outputs, count, block), stored.bits)}

    def spread(per_row: Tensor) -> Tensor:
        """``[g] -> [N, blocks]``."""
        return per_row.reshape(-1, rows.groups).expand(outputs, count).contiguous()

    arrays["scale"] = spread(grid.scale).reshape(-1).numpy()
    if isinstance(grid.zero_point, Tensor) and grid.halves == 2:
        arrays["zero_point"] = spread(grid.zero_point.float()).reshape(-1).numpy()
    elif isinstance(grid.zero_point, Tensor) or (stored.zero == int(stored.zero or 0) and stored.zero != _half(stored)):
        zero = grid.zero_point if isinstance(grid.zero_point, Tensor) else torch.full((rows.g,), stored.zero or 0)
        each = spread(zero.to(torch.int16))
        padded = F.pad(each, (0, -count % (8 // stored.bits)))
        arrays["zero_point"] = _pack(padded[:, None], stored.bits).reshape(-1)
    elif stored.zero != _half(stored):
        arrays["zero_point"] = np.full(outputs * count, stored.zero, np.float32)
    attributes = {"K": inputs, "N": outputs, "bits": stored.bits, "block_size": block, "accuracy_level": level}
    return Blocks(arrays, attributes)


def _half(stored: Stored) -> int:
    return int(2 ** (stored.bits - 1))


def _pack(integers: Tensor, bits: int) -> Array:
    """``[..., n] -> uint8 [..., n * bits / 8]``, least significant first."""
    digits = integers.reshape(*integers.shape[:-1], -1, 8 // bits).to(torch.int32)
    shifts = torch.arange(0, 8, bits, dtype=torch.int32)
    packed: Array = (digits << shifts).sum(-1).to(torch.uint8).numpy()
    return packed


def multiply(model: ir.Model, placeholder: ir.Node, name: str, made: Blocks) -> None:
    """Put MatMulNBits in the place of every MatMul and Gemm that multiplies by the placeholder's output."""
    graph = model.graph
    model.opset_imports[CONTRIB] = 1
    inputs = []
    for part, array in made.arrays.items():
        value = ir.Value(name=f"{name}/{part}", const_value=ir.tensor(array, name=f"{name}/{part}"))
        value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(array.dtype)), ir.Shape(array.shape)
        graph.register_initializer(value)
        inputs.append(value)
    for i, use in enumerate(list(placeholder.outputs[0].uses())):
        node, suffix = use.node, f"/{i}" if i else ""
        old, bias = node.outputs[0], node.inputs[2] if len(node.inputs) > 2 else None
        given = ir.convenience.convert_attributes(made.attributes)
        product = ir.Node(CONTRIB, OPERATOR, [node.inputs[0], *inputs], given, name=f"{name}/multiply{suffix}")
        nodes = [product]
        if bias is not None:
            assert old.type is not None, name
            assert old.shape is not None, name
            product.outputs[0].name = f"{name}/product{suffix}"
            product.outputs[0].type, product.outputs[0].shape = old.type, old.shape
            nodes.append(ir.Node("", "Add", [product.outputs[0], bias], name=f"{name}/bias{suffix}"))
        new = nodes[-1].outputs[0]
        new.type, new.shape = old.type, old.shape
        graph.insert_before(node, nodes)
        kept, old.name = old.name, f"{old.name}/float"
        ir.convenience.replace_all_uses_with([old], [new], replace_graph_outputs=True)
        new.name = kept
        graph.remove(node, safe=True)
    graph.remove(placeholder, safe=True)
