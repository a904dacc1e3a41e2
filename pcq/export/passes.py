"""Passes on an onnx_ir graph: pack, then optimise, then fill in. Nothing here knows torch modules.

Weights are found by value, never by name alone: torch names a tied weight after whichever name it met last, and a graph
from elsewhere may hold it transposed or in a Constant. While the graph is optimised each packed weight is an opaque
node without inputs, so no rule can fold, merge or rename what is behind it.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer

from pcq.errors import PcqError
from pcq.export.body import DOMAIN, Lowered
from pcq.export.editing import add_op, bias_of, bypass, multiplies, reader_kind
from pcq.export.frame import Frame, can_transpose
from pcq.export.layouts import Need, Plan
from pcq.export.lowering import lower
from pcq.export.nbits import blocks, multiply
from pcq.export.typed import lower_dequantize, lower_native
from pcq.qtensor import QuantizedTensor

PLACEHOLDER = "Weight"


@dataclass(frozen=True)
class Held:
    """A value of the graph that holds a weight, as it is or transposed."""

    value: ir.Value
    transposed: bool


@dataclass(frozen=True)
class Placed:
    """A weight whose place in the graph a placeholder has taken; ``transposed``: it will be stored transposed."""

    name: str
    transposed: bool


@dataclass(frozen=True)
class Packed(Placed):
    """One that ``lowered`` comes into the place of."""

    lowered: Lowered


def find(model: ir.Model, weights: Mapping[str, QuantizedTensor]) -> dict[str, list[Held]]:
    """Where each weight is in the graph: initializers and Constants, by value, also transposed.

    Of weights with equal values, each gets the initializers of its own name, and the first all others; a weight that
    is nowhere has an empty list.
    """
    by_value: dict[tuple[tuple[int, ...], bytes], list[str]] = {}
    for name, weight in weights.items():
        by_value.setdefault(_fingerprint(weight.dequantize().numpy()), []).append(name)
    shapes = {shape for shape, _ in by_value}
    found: dict[str, list[Held]] = {name: [] for name in weights}
    for value, tensor in _constants(model):
        shape = tuple(tensor.shape.numpy())
        if tensor.dtype != ir.DataType.FLOAT or not {shape, shape[::-1]} & shapes:
            continue
        array = tensor.numpy()
        names = by_value.get(_fingerprint(array))
        transposed = names is None and len(shape) == 2
        if transposed:
            names = by_value.get(_fingerprint(array.T))
        if names:
            name = value.name if value.name in names else names[0]
            found[name].append(Held(value, transposed))
    return found


def pack(model: ir.Model, name: str, weight: QuantizedTensor, held: list[Held]) -> Placed | None:
    """Put one placeholder in the place of all values that hold ``weight``; None if nothing uses them.

    A matrix that is only ever used through Transpose, as MatMul uses a Linear weight, is stored transposed and the
    Transpose goes: it would cost 4 bytes a weight and time at load.
    """
    straight: list[ir.Value] = []
    flipped: list[ir.Value] = []
    for one in held:
        nodes = [use.node for use in one.value.uses()]
        as_is, other = (flipped, straight) if one.transposed else (straight, flipped)
        other += [node.outputs[0] for node in nodes if _flips(node)]
        if one.value.is_graph_output() or not all(_flips(node) for node in nodes):
            as_is.append(one.value)
    _drop(held)
    if not straight and not flipped:
        return None
    transposed = not straight and can_transpose(weight.rows)
    nodes = [_node(name, PLACEHOLDER, (), {"name": name}, Frame(weight.rows, transposed).shape, transposed)]
    as_is, other = (flipped, straight) if transposed else (straight, flipped)
    ir.convenience.replace_all_uses_with(as_is, [nodes[0].outputs[0]] * len(as_is), replace_graph_outputs=True)
    if other:
        turn = ir.Node("", "Transpose", nodes[0].outputs, {"perm": ir.AttrInt64s("perm", (1, 0))}.values())
        nodes.append(turn)
        ir.convenience.replace_all_uses_with(other, [turn.outputs[0]] * len(other), replace_graph_outputs=True)
    first = next((node for node in model.graph if node.domain != DOMAIN), None)
    assert first is not None, name
    model.graph.insert_before(first, nodes)
    model.opset_imports[DOMAIN] = 1
    return Placed(name, transposed)


def split_products(model: ir.Model) -> None:
    """A Gemm of a packed matrix ``[in, out]`` becomes MatMul and Add, which int8 has; ONNX Runtime joins them again."""
    for holder in placeholders(model):
        for use in list(holder.outputs[0].uses()):
            node, bias, x = use.node, bias_of(use.node), use.node.inputs[0]
            if x is None or not multiplies(node, use.idx, turned=False):
                continue
            product = add_op(model.graph, node, "MatMul", (x, holder.outputs[0]), f"{node.name}/product")
            if bias is not None:
                product = add_op(model.graph, node, "Add", (product, bias), f"{node.name}/sum")
            product.type, product.shape = node.outputs[0].type, node.outputs[0].shape
            bypass(model.graph, node, product)


def optimise(model: ir.Model) -> None:
    """Fold constants, fuse, drop what is unused, clear torch's traces. Calls stay calls."""
    optimizer.optimize_ir(model, inline=False)
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    for graph in model.graphs():
        graph.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
        for node in graph:
            for value in node.outputs:
                value.metadata_props.clear()


def needs(model: ir.Model, weights: Mapping[str, QuantizedTensor], placed: Sequence[Placed]) -> list[Need]:
    """What has to be laid out, and what reads it in the optimised graph; weights that nothing uses are left out."""
    by_name = {one.name: one for one in placed}
    found = []
    for node in placeholders(model):
        name = node.attributes["name"].as_string()
        value, weight = node.outputs[0], weights[name]
        readers = [reader_kind(use.node, use.idx) for use in value.uses()]
        if value.is_graph_output():
            readers.append("an output of the graph")
        found.append(Need(name, weight.grid, weight.rows, by_name[name].transposed, tuple(dict.fromkeys(readers))))
    return found


def placeholders(model: ir.Model) -> list[ir.Node]:
    """Of weights that the graph uses."""
    return [node for node in model.graph if node.domain == DOMAIN and node.op_type == PLACEHOLDER]


def lay_out(
    model: ir.Model, weights: Mapping[str, QuantizedTensor], placed: Sequence[Placed], plan: Plan
) -> list[Packed]:
    """Give each placeholder that is left its layout, and the graph the operator set that they need.

    MatMulNBits comes into the graph at once; the others are left to :func:`fill`.

    Raises:
        PcqError: a weight cannot be packed.
    """
    model.opset_imports[""] = plan.opset
    by_name = {one.name: one for one in placed}
    nodes = {node.attributes["name"].as_string(): node for node in placeholders(model)}
    packed = []
    for choice in plan.choices:
        one, weight = by_name[choice.name], weights[choice.name]
        if choice.layout == "matmulnbits":
            assert choice.stored is not None
            multiply(model, nodes[one.name], one.name, blocks(weight, choice.stored, plan.level))
            continue
        if choice.stored is None:
            try:
                lowered = lower(weight, plan.opset, one.transposed)
            except PcqError as error:
                raise PcqError(error.what, where=one.name, allowed=error.allowed, todo=error.todo) from error
        else:
            lowering = lower_native if choice.layout == "native" else lower_dequantize
            lowered = lowering(weight, choice.stored, plan.opset, one.transposed)
        packed.append(Packed(one.name, one.transposed, lowered))
    return packed


def fill(model: ir.Model, packed: Sequence[Packed]) -> None:
    """Put the unpacking calls, their functions and initializers into the place of the placeholders."""
    by_name = {one.name: one for one in packed}
    for node in placeholders(model):
        one = by_name[node.attributes["name"].as_string()]
        inputs = []
        for part, array in one.lowered.arrays.items():
            name = f"{one.name}/{part}"
            value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
            value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(array.dtype)), ir.Shape(array.shape)
            model.graph.register_initializer(value)
            inputs.append(value)
        function = one.lowered.function
        model.functions.setdefault(function.identifier(), function)
        call = _node(one.name, function.name, inputs, one.lowered.attributes, one.lowered.shape, one.transposed)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [call], node.outputs, call.outputs)


def distinct_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, small equal ones counted once: optimising merges them."""
    sizes: dict[object, int] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None, name
        small = tensor.size <= 1024
        sizes[(tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()) if small else name] = tensor.nbytes
    return int(sum(sizes.values()))


def structure_bytes(model: ir.Model, packed: list[Packed]) -> int:
    """What the file takes beside the data of initializers: predicted on the optimised graph, before :func:`fill`."""
    graph = model.graph
    values = [value for node in graph for value in node.outputs if value.type is not None]
    nodes = sum(ir.to_proto(node).ByteSize() + 4 for node in graph)
    infos = sum(ir.to_proto(value).ByteSize() + 4 for value in (*values, *graph.inputs, *graph.outputs))
    inputs = [f"{one.name}/{part}" for one in packed for part in one.lowered.arrays]
    headers = sum(len(name) + 14 for name in (*graph.initializers, *inputs))
    calls = sum(len(name) + 2 for name in inputs) + sum(24 + 3 * len(one.lowered.shape) for one in packed)
    functions = {one.lowered.function.name: one.lowered.function for one in packed}.values()
    bodies = sum(ir.to_proto(function).ByteSize() + 4 for function in functions)
    return int(nodes + infos + headers + calls + bodies + 256)


def finish(model: ir.Model, ir_version: int, producer_version: str, metadata: Mapping[str, str]) -> None:
    """Name the IR version and the producer, and write down what a reader needs to know."""
    model.ir_version = ir_version
    for value in model.graph.initializers.values():
        value.type = value.shape = None  # they are the tensor's own; here they would be written a second time
    model.producer_name, model.producer_version = DOMAIN, producer_version
    model.metadata_props.update(metadata)


def _node(
    name: str,
    kind: str,
    inputs: Sequence[ir.Value],
    attributes: Mapping[str, int | list[int] | str],
    shape: tuple[int, ...],
    transposed: bool,
) -> ir.Node:
    output = ir.Value(
        name=f"{name}/transposed" if transposed else name,
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(shape),
    )
    given = ir.convenience.convert_attributes(attributes)
    return ir.Node(DOMAIN, kind, inputs, given, outputs=[output], name=f"{name}/unpack")


def _drop(held: list[Held]) -> None:
    """Forget the initializers (uses of Constants end with the Constants, which optimising drops)."""
    for one in held:
        graph = one.value.graph
        if graph is not None and one.value.name is not None and one.value.name in graph.initializers:
            graph.initializers.pop(one.value.name)


def _flips(node: ir.Node) -> bool:
    """Whether the node is the transpose of a matrix."""
    perm = node.attributes.get("perm")
    return node.op_type == "Transpose" and node.domain == "" and (perm is None or tuple(perm.as_ints()) == (1, 0))


def _constants(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    for graph in model.graphs():
        for value in list(graph.initializers.values()):
            if value.const_value is not None:
                yield value, value.const_value
        for node in graph:
            if node.op_type == "Constant" and node.domain == "" and "value" in node.attributes:
                yield node.outputs[0], node.attributes["value"].as_tensor()


def _fingerprint(array: npt.NDArray[np.float32]) -> tuple[tuple[int, ...], bytes]:
    """Equal for equal numbers; -0 equals 0."""
    return array.shape, hashlib.blake2b(np.ascontiguousarray(array + np.float32(0)).data).digest()
