"""Where weights of an ONNX graph act, in the terms that calibration reasons in: patches times matrix."""

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir
import torch.nn.functional as F
from torch import Tensor

from pcq.calibrate.layers import Convolution, Layer
from pcq.onnx_input.chains import stored_in, users
from pcq.onnx_input.inventory import Inventory


@dataclass(frozen=True)
class Site:
    """One weight at work.

    Attributes:
        layer: as calibration knows it; its bias is named only where nothing else reads that tensor.
        x: the value that enters.
        pads: zeros around each spatial dimension (begin, end), to be added first; ``same``: as many as keep
            ``ceil(size / stride)`` positions, an odd one at the end (``same lower``: at the beginning).
        turned: the operand is read transposed (Gemm with transA).
    """

    layer: Layer
    x: str
    pads: tuple[tuple[int, int], ...] | str
    turned: bool

    def entering(self, x: Tensor) -> Tensor:
        """What the layer's patches are cut from."""
        if self.turned:
            return x.t()
        geometry = self.layer.geometry
        if geometry is None or geometry.transposed:
            return x
        pads = self.pads
        if isinstance(pads, str):
            pads = tuple(
                _same(size, k, s, d, pads == "same lower")
                for size, k, s, d in zip(x.shape[2:], geometry.kernel, geometry.stride, geometry.dilation, strict=True)
            )
        return F.pad(x, [number for pair in reversed(pads) for number in pair])


def _same(size: int, kernel: int, stride: int, dilation: int, lower: bool) -> tuple[int, int]:
    total = max(0, (-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size)
    less, more = total // 2, total - total // 2
    return (more, less) if lower else (less, more)


def find_sites(model: ir.Model, inventory: Inventory, names: Iterable[str]) -> tuple[list[Site], dict[str, str]]:
    """The sites of weights in the order in which the graph computes, and for the rest name -> why there is none."""
    order = {node: index for index, node in enumerate(model.graph)}
    sites: list[Site] = []
    refused: dict[str, str] = {}
    for name in names:
        operands = inventory.weights[name].operands
        along = {node for operand in operands for node in operand.chain.nodes}
        ends = {operand.chain.value for operand in operands}
        read = [use for value in ends for use in users(value) if use[0] not in along]
        if len(read) != 1:
            refused[name] = f"{len(read)} nodes read it"
            continue
        ((node, index),) = read
        if node not in order:
            refused[name] = "it is in a subgraph, whose values nobody sees"
            continue
        found = _site(node, index, order[node], name, inventory.weights[name].parameter.shape)
        if isinstance(found, str):
            refused[name] = found
        else:
            sites.append(found)
    return sorted(sites, key=lambda site: site.layer.op), refused


def _site(node: ir.Node, index: int, at: int, name: str, shape: tuple[int, ...]) -> Site | str:
    kind, x = node.op_type, node.inputs[0]
    if kind not in ("Conv", "ConvTranspose", "Gemm", "MatMul") or index != 1 or x is None or x.name is None:
        return f"calibration does not know {kind}" + ("'s first operand" if index == 0 and kind != "Gather" else "")
    if kind in ("Gemm", "MatMul"):
        turned = kind == "Gemm" and bool(_ints(node, "transA", [0])[0])
        alone = kind == "MatMul" or all(_number(node, flag) == 1.0 for flag in ("alpha", "beta"))
        bias = (_own_bias(node, 2, shape[0]) if kind == "Gemm" else _added(node, shape[0])) if alone else None
        return Site(Layer(name, at, 0, 0, bias, None, None), x.name, (), turned)
    d = len(shape) - 2
    ones, zeros = [1] * d, [0] * (2 * d)
    stride, dilation = _ints(node, "strides", ones), _ints(node, "dilations", ones)
    pads, extra = _ints(node, "pads", zeros), _ints(node, "output_padding", [0] * d)
    auto = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    groups = _ints(node, "group", [1])[0]
    begin, end = tuple(pads[:d]), tuple(pads[d:])
    around: tuple[tuple[int, int], ...] | str = tuple(zip(begin, end, strict=True))
    transposed = kind == "ConvTranspose"
    if transposed:
        if auto not in ("NOTSET", "VALID") or "output_shape" in node.attributes:
            return "the output's shape settles its padding"
        padding = begin
        extra = [e + a - b for e, a, b in zip(extra, begin, end, strict=True)]
    else:
        padding = (0,) * d
        around = {"SAME_UPPER": "same", "SAME_LOWER": "same lower"}.get(auto, around)
    channels = shape[1] * groups if transposed else shape[0]
    geometry = Convolution(shape[2:], tuple(stride), padding, tuple(dilation), transposed, tuple(extra), groups)
    return Site(Layer(name, at, 0, 0, _own_bias(node, 2, channels), None, geometry), x.name, around, False)


def _own_bias(node: ir.Node, index: int, channels: int) -> str | None:
    """The float32 initializer of the main graph that this node alone adds, one number a channel."""
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is None or not value.is_initializer() or value.name is None or value.is_graph_input():
        return None
    tensor = stored_in(value)
    fits = tensor is not None and tensor.dtype == ir.DataType.FLOAT and tuple(tensor.shape.numpy()) == (channels,)
    return value.name if fits and len(list(users(value))) == 1 and not value.is_graph_output() else None


def _added(node: ir.Node, channels: int) -> str | None:
    """The bias that an Add right behind a MatMul adds."""
    read = list(users(node.outputs[0]))
    if len(read) != 1 or read[0][0].op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    return _own_bias(read[0][0], 1 - read[0][1], channels)


def _ints(node: ir.Node, name: str, default: list[int]) -> list[int]:
    if name not in node.attributes:
        return default
    attribute = node.attributes[name]
    return [attribute.as_int()] if attribute.type == ir.AttributeType.INT else list(attribute.as_ints())


def _number(node: ir.Node, name: str) -> float:
    return node.attributes[name].as_float() if name in node.attributes else 1.0
