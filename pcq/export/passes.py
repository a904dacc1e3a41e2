"""Passes on an onnx_ir graph: pack, then optimise, then fill in. Nothing here knows torch modules.

Weights are found by value, never by name alone: torch names a tied weight after whichever name it met last, and a graph
from elsewhere may hold it transposed or in a Constant. While the graph is optimised each packed weight is an opaque
node without inputs, so no rule can fold, merge or rename what is behind it.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer

from pcq.errors import PcqError
from pcq.export.body import DOMAIN, Lowered
from pcq.export.editing import int_attribute
from pcq.export.frame import can_transpose
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
class Packed:
    """A weight whose place in the graph has been taken by a placeholder.

    Attributes:
        name: the parameter.
        lowered: what comes into its place.
        transposed: whether it is stored transposed.
        opset: the operator set that it is lowered for.
    """

    name: str
    lowered: Lowered
    transposed: bool
    opset: int


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


def pack(model: ir.Model, name: str, weight: QuantizedTensor, held: list[Held]) -> Packed | None:
    """Put one placeholder in the place of all values that hold ``weight``; None if nothing uses them.

    A matrix that is only ever used through Transpose, as MatMul uses a Linear weight, is stored transposed and the
    Transpose goes: it would cost 4 bytes a weight and time at load.

    Raises:
        PcqError: the weight cannot be packed.
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
    try:
        lowered = lower(weight, model.opset_imports[""], transposed)
    except PcqError as error:
        raise PcqError(error.what, where=name, allowed=error.allowed, todo=error.todo) from error
    nodes = [_node(name, PLACEHOLDER, (), {"name": name}, lowered, transposed)]
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
    return Packed(name, lowered, transposed, model.opset_imports[""])


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


def needs(model: ir.Model, weights: Mapping[str, QuantizedTensor], packed: Sequence[Packed]) -> list[Need]:
    """What has to be laid out, and what reads it in the optimised graph; weights that nothing uses are left out."""
    by_name = {one.name: one for one in packed}
    found = []
    for node in placeholders(model):
        name = node.attributes["name"].as_string()
        value, weight = node.outputs[0], weights[name]
        readers = [_reader(use.node, use.idx) for use in value.uses()]
        if value.is_graph_output():
            readers.append("an output of the graph")
        found.append(Need(name, weight.grid, weight.rows, by_name[name].transposed, tuple(dict.fromkeys(readers))))
    return found


def placeholders(model: ir.Model) -> list[ir.Node]:
    """Of weights that the graph uses."""
    return [node for node in model.graph if node.domain == DOMAIN and node.op_type == PLACEHOLDER]


def _reader(node: ir.Node, index: int) -> str:
    """``Conv``, ``ConvTranspose``, ``MatMul`` and ``Gemm`` where the weight is what a layer multiplies by."""
    plain = index == 1 and node.domain == ""
    if plain and node.op_type == "Gemm":
        ones = all(node.attributes[key].as_float() == 1 for key in ("alpha", "beta") if key in node.attributes)
        plain = ones and int_attribute(node, "transB", 0) == 1 and int_attribute(node, "transA", 0) == 0
    return node.op_type if plain else f"{node.op_type} in another way"


def lay_out(model: ir.Model, weights: Mapping[str, QuantizedTensor], packed: list[Packed], plan: Plan) -> list[Packed]:
    """Give each placeholder its layout, and the graph the operator set that they need.

    MatMulNBits comes into the graph at once; the others are left to :func:`fill`.
    """
    model.opset_imports[""] = plan.opset
    choices = {choice.name: choice for choice in plan.choices}
    nodes = {node.attributes["name"].as_string(): node for node in placeholders(model)}
    rest = []
    for one in packed:
        choice, weight = choices.get(one.name), weights[one.name]
        if choice is None or choice.stored is None:
            lowered = one.lowered if plan.opset == one.opset else lower(weight, plan.opset, one.transposed)
            rest.append(replace(one, lowered=lowered, opset=plan.opset))
        elif choice.layout == "matmulnbits":
            multiply(model, nodes[one.name], one.name, blocks(weight, choice.stored, plan.level))
        else:
            lowering = lower_native if choice.layout == "native" else lower_dequantize
            lowered = lowering(weight, choice.stored, plan.opset, one.transposed)
            rest.append(replace(one, lowered=lowered, opset=plan.opset))
    return rest


def fill(model: ir.Model, packed: list[Packed]) -> list[Packed]:
    """Put the unpacking calls, their functions and initializers into the place of the placeholders.

    Returns:
        What was filled in: without weights that the optimised graph no longer uses.
    """
    by_name = {one.name: one for one in packed}
    filled = []
    for node in list(model.graph):
        if node.domain != DOMAIN or node.op_type != PLACEHOLDER:
            continue
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
        call = _node(one.name, function.name, inputs, one.lowered.attributes, one.lowered, one.transposed)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [call], node.outputs, call.outputs)
        filled.append(one)
    return filled


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
    lowered: Lowered,
    transposed: bool,
) -> ir.Node:
    output = ir.Value(
        name=f"{name}/transposed" if transposed else name,
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(lowered.shape),
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
