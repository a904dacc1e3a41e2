"""Reading and editing the nodes of an ONNX graph."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[np.generic]


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value, if it is the only reader."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def reader_kind(node: ir.Node, index: int) -> str:
    """``Conv``, ``ConvTranspose``, ``MatMul`` and ``Gemm`` where this input is what a layer multiplies by."""
    plain = index == 1 and node.domain == ""
    if plain and node.op_type == "Gemm":
        plain = multiplies(node, index, turned=True)
    return node.op_type if plain else f"{node.op_type} in another way"


def multiplies(node: ir.Node, index: int, *, turned: bool) -> bool:
    """Whether a Gemm multiplies by this input, or ``turned``: by its transpose, with no factors."""
    ones = all(node.attributes[key].as_float() == 1 for key in ("alpha", "beta") if key in node.attributes)
    turns = int_attribute(node, "transA", 0), int_attribute(node, "transB", 0)
    return node.op_type == "Gemm" and node.domain == "" and index == 1 and ones and turns == (0, int(turned))


def bias_of(layer: ir.Node) -> ir.Value | None:
    """The third input of a layer."""
    return layer.inputs[2] if len(layer.inputs) > 2 else None


def set_bias(layer: ir.Node, value: ir.Value) -> None:
    """Give a layer its third input."""
    if len(layer.inputs) < 3:
        layer.resize_inputs(3)
    layer.replace_input_with(2, value)


def bypass(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Take a node of one output out: ``value`` takes its place, and its name."""
    old = node.outputs[0]
    name, old.name = old.name, f"{old.name}/before"
    value.name = name
    ir.convenience.replace_all_uses_with([old], [value], replace_graph_outputs=True)
    graph.remove(node, safe=True)


def sweep(model: ir.Model) -> None:
    """Drop what nothing reads any more."""
    for node in reversed(list(model.graph)):
        if all(not list(value.uses()) and not value.is_graph_output() for value in node.outputs):
            model.graph.remove(node, safe=True)
    for name, value in list(model.graph.initializers.items()):
        if not list(value.uses()) and not value.is_graph_output():
            model.graph.initializers.pop(name)
    called = {node.op_identifier() for node in model.graph}
    for identifier in list(model.functions):
        if identifier not in called:
            del model.functions[identifier]


def add_op(
    graph: ir.Graph, before: ir.Node, kind: str, inputs: Sequence[ir.Value], name: str, **attributes: int
) -> ir.Value:
    """A new node in front of ``before``; its output."""
    node = ir.Node("", kind, inputs, ir.convenience.convert_attributes(attributes), name=name)
    node.outputs[0].name = name
    graph.insert_before(before, node)
    return node.outputs[0]


def initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """The graph's initializer of this name, made of ``array`` where there is none."""
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def typed_value(name: str, kind: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    """A value whose type is known."""
    return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))


def is_constant(node: ir.Node, index: int) -> bool | None:
    """Whether an input is a known tensor; None: there is no such input."""
    value = node.inputs[index] if len(node.inputs) > index else None
    return None if value is None else value.const_value is not None


def numbers(value: ir.Value) -> npt.NDArray[np.float64]:
    """A known tensor in double precision."""
    assert value.const_value is not None, value.name
    return value.const_value.numpy().astype(np.float64)


def int_attribute(node: ir.Node, key: str, default: int) -> int:
    """An attribute of a node."""
    return node.attributes[key].as_int() if key in node.attributes else default
