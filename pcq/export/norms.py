"""BatchNorm behind a packed layer, folded into the scales of the layer's weight and its bias.

In use BatchNorm multiplies each channel by ``f = gamma / sqrt(var + epsilon)`` and adds a number, so with
``w = scale * (code - zero_point)``

    BatchNorm(w x + bias) = (scale * f) * (code - zero_point) x + (beta + (bias - mean) * f)

The codes stay as they are. Instead of four numbers for each channel the file has one, and ONNX Runtime is spared the
same folding when a session is made, which it does in floats: BatchNorm is a sixth of a ternary MobileNetV2.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from pcq.export.editing import (
    bias_of,
    bypass,
    initializer,
    int_attribute,
    is_constant,
    numbers,
    only_reader,
    reader_kind,
    set_bias,
    sweep,
)
from pcq.export.passes import placeholders
from pcq.grids import Affine, Codebook, Grid
from pcq.qtensor import QuantizedTensor
from pcq.rows import Rows

CHANNELS = {"Conv": 0, "Gemm": 0, "ConvTranspose": 1}
"""Operators that BatchNorm may follow -> the axis of their weight that has the output channels."""


@dataclass(frozen=True)
class Map:
    """What a BatchNorm does to what has gone through a layer without a bias: ``x * factor + shift``, both float64
    ``[C]``."""

    factor: npt.NDArray[np.float64]
    shift: npt.NDArray[np.float64]


def behind(node: ir.Node) -> ir.Node | None:
    """The BatchNorm that alone reads a layer's output, if its numbers are known."""
    after = only_reader(node.outputs[0])
    if after is None or after.op_type != "BatchNormalization" or after.domain or after.inputs[0] is not node.outputs[0]:
        return None
    known = all(is_constant(after, i) for i in range(1, 5)) and int_attribute(after, "training_mode", 0) == 0
    return after if known else None


def as_map(norm: ir.Node, bias: npt.NDArray[np.float64] | float) -> Map:
    """What ``norm`` does behind a layer of this bias."""
    gamma, beta, mean, var = (numbers(value) for value in norm.inputs[1:] if value is not None)
    epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    factor = gamma / np.sqrt(var + epsilon)
    return Map(factor, beta + (bias - mean) * factor)


def fold(model: ir.Model, weights: Mapping[str, QuantizedTensor]) -> dict[str, QuantizedTensor]:
    """Take every BatchNorm that can be folded out of ``model``, in which placeholders stand for the weights.

    Returns:
        The weights to pack instead, by parameter name. A weight that others read too, or whose levels cannot be
        mirrored where a factor is negative, keeps its BatchNorm.
    """
    folded = {}
    for placeholder in placeholders(model):
        name, value = placeholder.attributes["name"].as_string(), placeholder.outputs[0]
        layer = only_reader(value)
        kind = "" if layer is None else reader_kind(layer, next(iter(value.uses())).idx)
        if layer is None or kind not in CHANNELS or is_constant(layer, 2) is False:
            continue
        norm = behind(layer)
        if norm is None:
            continue
        given = bias_of(layer)
        done = as_map(norm, 0.0 if given is None else numbers(given))
        weight = scaled(weights[name], done.factor, CHANNELS[kind])
        if weight is None or not np.isfinite(done.shift).all():
            continue
        folded[name] = weight
        if given is not None and only_reader(given) is layer:
            model.graph.initializers.pop(given.name or "", None)
        own = f"{name.removesuffix('weight')}bias"
        bias = f"{name}/bias" if own in model.graph.initializers else own
        set_bias(layer, initializer(model.graph, bias, done.shift.astype(np.float32)))
        bypass(model.graph, norm, layer.outputs[0])
    sweep(model)
    return folded


def scaled(weight: QuantizedTensor, factor: npt.NDArray[np.float64], axis: int = 0) -> QuantizedTensor | None:
    """``weight`` with each output channel times a factor ``[C]``; None where its levels allow no such thing.

    Codes change only where a factor is negative: there they are counted from the other end, as scales are not negative.
    """
    rows, grid, codes = weight.rows, weight.grid, weight.codes
    if rows.axis is None and rows.group is None and axis == 0:
        rows = replace(rows, axis=0)
        grid = grid.map(lambda each: each.expand(rows.g, *each.shape[1:]))
    if rows.axis != axis or rows.channels != len(factor):
        return None
    each = torch.from_numpy(factor).repeat_interleave(rows.groups)
    if bool((each < 0).any()):
        turned = _mirrored(codes, grid, rows, each < 0)
        if turned is None:
            return None
        codes, grid = turned
    size = each.abs()
    if isinstance(grid, Affine):
        grid = replace(grid, scale=_times(grid.scale, size))
    elif grid.scale is None and grid.table.shape[0] == rows.g:
        grid = Codebook(_times(grid.table, size[:, None]))
    else:
        grid = Codebook(grid.table, size.float() if grid.scale is None else _times(grid.scale, size))
    finite = torch.isfinite(grid.levels()).all()
    return QuantizedTensor(codes, grid, rows) if finite else None


def _times(values: Tensor, factor: Tensor) -> Tensor:
    return (values.double() * factor).float()


def _mirrored(codes: Tensor, grid: Grid, rows: Rows, where: Tensor) -> tuple[Tensor, Grid] | None:
    """The same weights times -1 in some rows."""
    last = grid.count - 1
    chosen = rows.merge(where[:, None].expand(rows.g, rows.width).contiguous())
    if isinstance(grid, Codebook):
        if grid.table.shape[0] == rows.g:
            grid = replace(grid, table=torch.where(where[:, None], -grid.table.flip(1), grid.table))
        elif not torch.equal(grid.table, -grid.table.flip(1)):
            return None
    elif isinstance(grid.zero_point, Tensor):
        zero = torch.where(where, last - grid.zero_point.float(), grid.zero_point.float())
        if bool((zero < 0).any()):
            return None
        grid = replace(grid, zero_point=zero.to(grid.zero_point.dtype))
    elif grid.zero_point * 2 != last:
        last = int(grid.zero_point * 2)
        if not 0 <= last - int(codes[chosen].min()) < grid.count or last < int(codes[chosen].max()):
            return None
    return torch.where(chosen, last - codes.int(), codes.int()).to(torch.uint8), grid
