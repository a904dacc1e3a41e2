"""Open an ONNX file whose weights are to be packed: what cannot be is refused, what is too old is raised.

An unpacking function needs operator set 12 (``Constant.value_ints``) and IR version 8 (model-local functions); a newer
model keeps what it has. External data stays on disk until a tensor is asked for.
"""

from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import onnx
import onnx.defs
import onnx.version_converter
import onnx_ir as ir

from pcq.errors import PcqError
from pcq.export.facts import LOCAL_FUNCTION_IR, oldest
from pcq.export.reading import load, not_onnx
from pcq.export.scheme import KEY

OPSET = 12
"""The first operator set that the unpacking functions can be written in."""

QUANTIZED = {
    "DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "MatMulInteger",
    "ConvInteger", "MatMulNBits", "MatMulBnb4", "GatherBlockQuantized", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat", "QAttention", "QGemm", "QLinearAdd", "QLinearGlobalAveragePool",
}  # fmt: skip
"""Operators of graphs whose weights or activations are integers already."""

WIDENED = {
    11: {"Gemm"},
    12: {"ArgMax", "ArgMin", "Clip", "Constant", "GatherND", "Max", "MaxPool", "Min", "Pow", "ReduceMax", "ReduceMin"},
}
"""Operators whose new version at this operator set only takes more types or has attributes with the old default."""

OLD_RESIZE = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
"""What Resize and Upsample did up to operator set 10; the converter leaves Resize the defaults of 11."""

DRAWING = {
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout",
}  # fmt: skip
"""Operators that draw random numbers."""

AGAIN = "Export the model again with operator set 13 or later"
"""What to do about a model that cannot be raised."""


TRACES = ("pkg.torch.", "pkg.onnxscript.")
NAMESPACE = "namespace"
"""Keys of what torch's exporter says of nodes and values."""


@dataclass(frozen=True)
class Opened:
    """A graph that is ready to be worked on.

    Attributes:
        path: the file.
        model: the graph; raised where it had to be.
        file_bytes: the file and its external data.
        dropped: bytes of them that were left out on opening.
        opset, ir_version: what the file itself has.
        notes: what was done to it, one sentence each.
    """

    path: Path
    model: ir.Model
    file_bytes: int
    opset: int
    ir_version: int
    notes: tuple[str, ...]
    dropped: int = 0

    @property
    def target_ort(self) -> str | None:
        """The oldest ONNX Runtime that is known to load the model's operator set and IR version."""
        return oldest(self.model.opset_imports[""], self.model.ir_version)


def open_graph(path: Path) -> Opened:
    """Open ``path``.

    Raises:
        PcqError: no ONNX file, one that is quantized or packed already, one whose tensors cannot be read, or one that
            cannot be raised.
    """
    model = read(path)
    if "" not in model.opset_imports or not model.ir_version:
        if "ai.onnx" not in model.opset_imports:
            raise PcqError("is not an ONNX model: it imports no operator set", where=str(path))
        model.opset_imports[""] = model.opset_imports.pop("ai.onnx")
    _refuse_quantized(path, model)
    size = path.stat().st_size + external_bytes(path, model)
    opset, version, notes = model.opset_imports[""], model.ir_version, []
    if opset < OPSET:
        model = _raised(path, model, opset)
        notes.append(f"Raised the operator set from {opset} to {OPSET}: packed weights need it.")
    if version < LOCAL_FUNCTION_IR:
        model.ir_version = LOCAL_FUNCTION_IR
        notes.append(f"Raised the IR version from {version} to {LOCAL_FUNCTION_IR}: packed weights need it.")
    if version < 4:  # there they had to be listed, and could not be changed by the caller
        inputs = [value for value in model.graph.inputs if value.name in model.graph.initializers]
        for value in inputs:
            model.graph.inputs.remove(value)
        notes += unlisted(len(inputs))
    if dropped := _untraced(model):
        notes.append(f"Left out {dropped:,} bytes of torch's about where each node comes from: lines of source code.")
    _name_apart(model)
    return Opened(path, model, size, opset, version, tuple(notes), dropped)


def _untraced(model: ir.Model) -> int:
    """Drop what torch's exporter says of each node and value for debugging, often more than packed weights take.

    Returns how many bytes.
    """
    dropped = 0
    for said in (*(node.metadata_props for node in nodes(model)), *(value.metadata_props for value in values(model))):
        for key in [key for key in said if key.startswith(TRACES) or key == NAMESPACE]:
            dropped += len(key) + len(said.pop(key).encode()) + 8
    return dropped


def unlisted(count: int) -> list[str]:
    """The note about weights that the model had among its inputs, if there are such."""
    return [f"Weights that are no longer listed as inputs: {count}."] if count else []


def read(path: Path) -> ir.Model:
    """The model as it is in the file.

    Raises:
        PcqError: it cannot be read, is no ONNX file, or has sparse tensors.
    """
    proto = load(path)
    _refuse_sparse(path, proto)
    try:
        model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, path.parent)
    except Exception as error:  # onnx_ir wraps what it meets
        raise not_onnx(path) from error
    return model


def constants(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Every initializer and every tensor Constant of the graph and of its subgraphs, in the graph's order."""
    for graph in model.graphs():
        for value in list(graph.initializers.values()):
            if value.const_value is not None:
                yield value, value.const_value
        for node in graph:
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx") and "value" in node.attributes:
                yield node.outputs[0], node.attributes["value"].as_tensor()


def values(model: ir.Model) -> Iterator[ir.Value]:
    """Every value of the graph and of its subgraphs, once."""
    for graph in model.graphs():
        made = (output for node in graph for output in node.outputs)
        yield from dict.fromkeys([*graph.inputs, *graph.initializers.values(), *made])


def free(name: str, taken: Container[str | None]) -> str:
    """The first of ``name_2``, ``name_3``, ... that is not taken."""
    return next(other for i in count(2) if (other := f"{name}_{i}") not in taken)


def nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node of the graph and of its subgraphs, a subgraph's after the node that holds it."""
    yield from model.graph.all_nodes()


def seed(model: ir.Model) -> bool:
    """Give each node that draws random numbers a seed, if it has none, so that models which draw alike draw the same
    numbers; whether there are such nodes."""
    bodies = (node for function in model.functions.values() for node in function)
    found = [node for each in (nodes(model), bodies) for node in each if _draws(node)]
    for number, node in enumerate(found):
        whole = node.op_type == "Dropout"
        node.attributes.setdefault("seed", ir.AttrInt64("seed", number) if whole else ir.AttrFloat32("seed", number))
    return bool(found)


def _draws(node: ir.Node) -> bool:
    training = node.op_type != "Dropout" or len(node.inputs) > 2
    return node.op_type in DRAWING and node.domain in ("", "ai.onnx") and training


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for _, tensor in constants(model):
        yield tensor


def external_bytes(path: Path, model: ir.Model) -> int:
    """Bytes of the files that its external data is in.

    Raises:
        PcqError: one of them is missing, or too short.
    """
    needed: dict[Path, int] = {}
    for tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            end = (tensor.offset or 0) + tensor.nbytes
            needed[Path(tensor.path)] = max(end, needed.get(Path(tensor.path), 0))
    for place, end in needed.items():
        if not place.is_file():
            raise PcqError(f"its external data is missing: {place}", where=str(path), todo="Put it beside the model")
        if (size := place.stat().st_size) < end:
            raise PcqError(f"its external data is cut off: {place} has {size:,} bytes of {end:,}", where=str(path),
                           todo="Copy it beside the model anew")  # fmt: skip
    return sum(place.stat().st_size for place in needed)


def _refuse_sparse(path: Path, model: onnx.ModelProto) -> None:
    graphs, found = [model.graph], []
    for graph in graphs:
        found += [tensor.values.name for tensor in graph.sparse_initializer]
        graphs += [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    if found:
        raise PcqError(
            f"{len(found)} of its tensors are stored as sparse ones, such as '{found[0]}'", where=str(path),
            allowed="dense tensors", todo="Store all initializers as dense ones",
        )  # fmt: skip


def _name_apart(model: ir.Model) -> None:
    """A name of its own for each constant: branches of an If may use the same ones."""
    taken = Counter(value.name for value in values(model))
    for value, _ in reversed([*constants(model)]):
        if taken[value.name] > 1 and not (value.is_graph_input() or value.is_graph_output()):
            taken[value.name] -= 1
            value.name = free(value.name or "", taken)
            taken[value.name] = 1


def _refuse_quantized(path: Path, model: ir.Model) -> None:
    if KEY in model.metadata_props:
        raise PcqError("pcq has packed this file already", where=str(path), todo="Give the float model it was made of")
    bodies = (node for function in model.functions.values() for node in function)
    found = Counter(node.op_type for each in (nodes(model), bodies) for node in each if node.op_type in QUANTIZED)
    if found:
        listed = ", ".join(f"{number} {kind}" for kind, number in found.most_common(4))
        raise PcqError(
            f"this model is quantized already ({listed})", where=str(path),
            todo="Give the float model it was made of: packing integers that other tools chose would keep their "
            "errors and add nothing",
        )  # fmt: skip


def _raised(path: Path, model: ir.Model, opset: int) -> ir.Model:
    """The model in operator set 12: renumbered where no operator changed its meaning, else converted."""
    changed = {
        node.op_type for node in nodes(model) if node.domain in ("", "ai.onnx") and _changes(node.op_type, opset)
    }
    if not changed:
        model.opset_imports[""] = OPSET
        return model
    try:
        proto = onnx.load_model(path)
        converted = onnx.version_converter.convert_version(proto, OPSET)
        del converted.metadata_props[:]
        converted.metadata_props.extend(proto.metadata_props)
        raised = ir.from_proto(converted)
    except Exception as error:  # the converter's C++ exceptions share no class
        raise PcqError(
            f"its operator set {opset} is too old, and {', '.join(sorted(changed))} could not be converted to {OPSET}",
            where=str(path), todo=AGAIN,
        ) from error  # fmt: skip
    for node in nodes(raised):
        if opset < 11 and node.op_type == "Resize" and node.domain in ("", "ai.onnx"):
            node.attributes.update({name: ir.AttrString(name, value) for name, value in OLD_RESIZE.items()})
    return raised


def _changes(kind: str, opset: int) -> bool:
    """Whether an operator means something else in operator set 12 than in ``opset``."""
    try:
        now = onnx.defs.get_schema(kind, OPSET).since_version
        then = onnx.defs.get_schema(kind, opset).since_version
    except onnx.defs.SchemaError:
        return True
    return now != then and not all(kind in WIDENED.get(v, ()) for v in range(then + 1, now + 1) if _has(kind, v))


def _has(kind: str, version: int) -> bool:
    return bool(onnx.defs.get_schema(kind, version).since_version == version)
