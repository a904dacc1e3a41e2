"""Which tensors of a graph are weights of layers, and in which orientation torch would hold them.

    Conv, ConvTranspose             as they are
    Gemm, MatMul                    ``[out, in]``; a MatMul and a Gemm without transB hold the transpose
    Gather along axis 0             ``[entries, width]``: an embedding
    LSTM, GRU, RNN                  ``[directions * gates * hidden, width]``, or one for each direction

A weight may lie behind Identity, Transpose, Reshape, Squeeze, Unsqueeze, Flatten, Cast, Slice and Concat, in a
Constant, in a branch of an If or the body of a Loop, or be read by several layers; a recurrent layer's directions may
be weights of their own. What stays float has a reason.
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from pcq.export import reading
from pcq.onnx_input.chains import Chain, chain_to, constant_ints, stored_in, users
from pcq.onnx_input.graph import Opened, constants, free, nodes, values
from pcq.rules import Parameter
from pcq.sources.source import Entry, Source

View = Literal["same", "transposed", "flat"]
"""How a layer's operand relates to the weight as torch holds it; ``flat``: its leading dimensions are joined."""

NORMS = {"BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization"}
RECURRENT = ("LSTM", "GRU", "RNN")
SMALL = 64
"""Constants of fewer numbers than this are not listed: shapes, epsilons."""

PARTS = {*reading.PARTS, "transposed", "turned", "shape", "shaped", "float", "float16", "bfloat16", "double"}
"""What values are called behind the name of the weight that they are made of when it is packed."""


@dataclass(frozen=True)
class Operand:
    """One value that holds the weight where layers read it."""

    chain: Chain
    view: View

    @property
    def shape(self) -> tuple[int, ...]:
        return self.chain.shape


@dataclass(frozen=True)
class Weight:
    """A weight of one or several layers: all operands have the same numbers in torch's orientation."""

    parameter: Parameter
    operands: tuple[Operand, ...]

    def read(self) -> Tensor:
        """float32, in torch's orientation; contiguous."""
        return torch.from_numpy(canonical(self.operands[0]))


@dataclass(frozen=True)
class Inventory:
    """Attributes:
    weights: by name, in the order in which the graph computes.
    others: every other tensor of some size, with the reason why it stays float.
    source: all of them, to be read one at a time.
    """

    weights: dict[str, Weight]
    others: tuple[Parameter, ...]
    source: Source

    @property
    def parameters(self) -> list[Parameter]:
        """What a plan is made of."""
        return [*(weight.parameter for weight in self.weights.values()), *self.others]


def take_inventory(opened: Opened) -> Inventory:
    """Find the weights of a graph."""
    model = opened.model
    sites: dict[ir.Value, tuple[str, int, View]] = {}
    reasons: dict[ir.Value, str] = {}
    chains: dict[ir.Value, Chain] = {}
    for node in nodes(model):
        for index, operand in _operands(node):
            if (chain := chain_to(operand)) is None:
                continue
            found = _role(node, index, chain)
            if isinstance(found, str):
                reasons.setdefault(chain.root, found)
            else:
                sites.setdefault(operand, found)
                chains.setdefault(operand, chain)
    by_root: dict[ir.Value, list[ir.Value]] = {}
    for operand, chain in chains.items():
        by_root.setdefault(chain.root, []).append(operand)
    taken = {value.name for value in values(model)}
    occupied = {weight for name in taken for weight in _weights_of(name or "")}
    weights: dict[str, Weight] = {}
    twins: dict[tuple[tuple[int, ...], str, int], list[str]] = {}
    for root, operands in by_root.items():
        problem = _problem(root, [chains[operand] for operand in operands], sites)
        views = [Operand(chains[operand], sites[operand][2]) for operand in operands]
        if problem is None and len(views) > 1:
            places = [oriented(view.chain.places(), view.view) for view in views]
            if any(not np.array_equal(places[0], other) for other in places[1:]):
                problem = "layers read it in different arrangements"
        kinds = {sites[operand][:2] for operand in operands}
        kind, groups = next((k for k in kinds if k[0] == "embedding"), sites[operands[0]][:2])
        if problem is None and len(kinds - {("embedding", 1)}) > 1:
            problem = "layers of different kinds read it"
        if problem is not None:
            reasons[root] = problem
            continue
        shape, dtype = oriented_shape(views[0].shape, views[0].view), _torch_dtype(views[0].chain.tensor.dtype)
        name = root.name or ""
        name = free(name, taken | occupied) if name in occupied else name
        weight = Weight(Parameter(name, shape, dtype, kind, groups), tuple(views))
        alike = twins.setdefault((shape, kind, _mark(views[0])), [])
        twin = next((n for n in alike if _equal(weights[n], weight)), None)
        if twin is None:
            weights[name] = weight
            alike.append(name)
        else:
            weights[twin] = Weight(weights[twin].parameter, (*weights[twin].operands, *views))
    packed = {operand.chain.root for weight in weights.values() for operand in weight.operands}
    others = tuple(_others(model, packed, reasons))
    return Inventory(weights, others, _source(opened, weights, others))


def _operands(node: ir.Node) -> Iterator[tuple[int, ir.Value]]:
    """What a layer reads, and as which input; for the weights of a recurrent layer that joins its directions, each."""
    for index, operand in enumerate(node.inputs):
        if operand is None:
            continue
        joined = operand.producer() if node.op_type in RECURRENT and index in (1, 2) else None
        parts = [operand]
        if joined is not None and joined.op_type == "Concat" and chain_to(operand) is None:
            parts = [part for part in joined.inputs if part is not None]
        yield from ((index, part) for part in parts)


def _weights_of(value: str) -> Iterator[str]:
    """The names of weights of which packing might make a value of this name."""
    while value.rpartition("/")[2] in PARTS:
        value = value.rpartition("/")[0]
        yield value


def canonical(operand: Operand) -> npt.NDArray[np.float32]:
    """The numbers of a weight in torch's orientation, float32, contiguous."""
    return np.ascontiguousarray(oriented(operand.chain.numbers(), operand.view))


def oriented(array: Any, view: View) -> Any:
    """What a layer reads -> torch's orientation."""
    if view == "transposed":
        return array.T
    return array.reshape(-1, array.shape[-1]) if view == "flat" else array


def oriented_shape(shape: tuple[int, ...], view: View) -> tuple[int, ...]:
    """The shape that :func:`oriented` gives."""
    if view == "transposed":
        return shape[::-1]
    return (math.prod(shape[:-1]), shape[-1]) if view == "flat" else shape


def _role(node: ir.Node, index: int, chain: Chain) -> tuple[str, int, View] | str:
    """What the layer does with its operand: kind, groups, view; or why the operand is not a weight to quantize."""
    ndim = len(chain.shape)
    kind = node.op_type

    def flag(name: str) -> int:
        return node.attributes[name].as_int() if name in node.attributes else 0

    if kind in ("Conv", "FusedConv", "ConvTranspose") and index == 1:
        if ndim not in (3, 4, 5):
            return f"a convolution's with {ndim} dimensions"
        groups = flag("group") or 1
        return f"conv{'_transpose' if kind == 'ConvTranspose' else ''}{ndim - 2}d", groups, "same"
    if kind in ("Gemm", "FusedGemm", "MatMul", "FusedMatMul") and index in (0, 1):
        if ndim != 2:
            return f"a {ndim}-dimensional operand of {kind}"
        turned = bool(flag("transA" if index == 0 else "transB"))
        return "linear", 1, "same" if turned == (index == 1) else "transposed"
    if kind == "Gather" and index == 0:
        if ndim != 2 or flag("axis") != 0:
            return "not gathered by rows"
        indices = node.inputs[1]
        if indices is None or constant_ints(indices) is not None or stored_in(indices) is not None:
            return "parts of it are taken out by constants"
        return "embedding", 1, "same"
    if kind in RECURRENT and index in (1, 2) and ndim == 3:
        return "linear", 1, "flat"
    if kind == "Attention" and node.domain == "com.microsoft" and index == 1 and ndim == 2:
        return "linear", 1, "transposed"
    if kind in NORMS or (kind in ("SkipLayerNormalization", "EmbedLayerNormalization") and ndim == 1):
        return "norm"
    if index == 2 and kind in ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm"):
        return "bias"
    if kind in RECURRENT or (kind == "Add" and ndim == 1):
        return "bias"
    return f"an operand of {kind}"


def _problem(root: ir.Value, chains: list[Chain], sites: dict[ir.Value, tuple[str, int, View]]) -> str | None:
    """Why a constant that layers read cannot be taken out of the graph, or None."""
    if 0 in chains[0].shape:
        return "it holds no numbers"
    along = {node for chain in chains for node in chain.nodes}
    values = {root, *(output for node in along for output in node.outputs)}
    ends = {chain.value for chain in chains}
    for value in values:
        if value.is_graph_output():
            return "an output of the graph"
        if value in ends:
            continue
        strangers = sorted({node.op_type for node, _ in users(value) if node not in along})
        if strangers:
            return f"also an operand of {', '.join(strangers)}"
    if any(chain.repeats() for chain in chains):
        return "layers read parts of it several times"
    if any(dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16) for dtype in (chain.dtype for chain in chains)):
        return f"layers read it as {chains[0].dtype.name.lower()}"
    return None


def _mark(operand: Operand) -> int:
    """Equal for equal weights, and mostly not for others: so that few have to be compared number by number."""
    return zlib.crc32(np.ascontiguousarray(oriented(operand.chain.numbers(), operand.view)[:1]).data.cast("B"))


def _equal(a: Weight, b: Weight) -> bool:
    return bool(np.array_equal(canonical(a.operands[0]), canonical(b.operands[0])))


def _torch_dtype(dtype: ir.DataType) -> str:
    names = {ir.DataType.FLOAT: "float32", ir.DataType.DOUBLE: "float64"}
    return names.get(dtype, dtype.name.lower())


def _others(model: ir.Model, taken: set[ir.Value], reasons: dict[ir.Value, str]) -> Iterator[Parameter]:
    """Every tensor that is no weight, under a name of its own, and why."""
    seen: set[str] = set()
    for value, tensor in constants(model):
        shape, name = tuple(tensor.shape.numpy()), value.name or ""
        dtype = _torch_dtype(tensor.dtype)
        if value in taken or math.prod(shape) < SMALL or name in seen or not hasattr(torch, dtype):
            continue
        seen.add(name)
        floats = tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
        reason = reasons.get(value, "no layer reads it") if floats else "integers"
        kind = reason if reason in ("bias", "norm") else "other" if floats else "buffer"
        yield Parameter(name, shape, dtype, kind, why=reason)
    for function in model.functions.values():
        for node in function:
            if node.op_type == "Constant" and "value" in node.attributes:
                tensor = node.attributes["value"].as_tensor()
                name, dtype = f"{function.name}/{node.outputs[0].name}", _torch_dtype(tensor.dtype)
                if tensor.size >= SMALL and hasattr(torch, dtype):
                    yield Parameter(name, tuple(tensor.shape.numpy()), dtype, "other", why="in the body of a function")


def _source(opened: Opened, weights: dict[str, Weight], others: tuple[Parameter, ...]) -> Source:
    """The weights as torch would hold them, in their own dtype."""

    def reader(weight: Weight) -> Tensor:
        return weight.read().to(getattr(torch, weight.parameter.dtype))

    stored = {value.name or "": tensor for value, tensor in constants(opened.model)}

    def other(name: str) -> Tensor:
        return torch.from_numpy(np.array(stored[name].numpy()))

    entries = {
        name: Entry(weight.parameter.shape, weight.parameter.dtype, lambda weight=weight: reader(weight))  # type: ignore[misc]
        for name, weight in weights.items()
    }
    entries |= {
        p.name: Entry(p.shape, p.dtype, lambda name=p.name: other(name))  # type: ignore[misc]
        for p in others
    }
    return Source(opened.path, entries, opened.notes)
