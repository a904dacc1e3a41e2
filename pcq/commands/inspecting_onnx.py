"""What an ONNX file is: packed by pcq, packed and unpacked since, quantized by another tool, or float."""

import json
import math
from collections import Counter
from pathlib import Path

import onnx

from pcq.atomic import scratch
from pcq.commands.views import FileView, TensorView, float_view, quantized_view
from pcq.errors import CheckFailed, PcqError, first_line
from pcq.export import is_packed, open_packed
from pcq.export.layouts import LOADING
from pcq.export.reading import PackedFile, file_bytes
from pcq.export.scheme import FOLDED, KEY, SATURATING, USUAL, Scheme, from_json, usual_sizes
from pcq.export.verify import STAY_PACKED
from pcq.packing import DIGITS
from pcq.words import dimensions

INT8 = {
    "QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention", "NhwcQLinearConv", "QLinearAdd", "QLinearConcat",
    "QLinearGlobalAveragePool", "QLinearAveragePool", "QLinearMul", "QLinearLeakyRelu", "QLinearSigmoid",
}  # fmt: skip
"""Operators of ONNX Runtime that compute in 8-bit integers."""

MULTIPLYING = {
    "Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulNBits",
}  # fmt: skip
"""Operators that multiply by weights in float."""


SAID = {KEY, SATURATING, FOLDED, USUAL}
"""Metadata that is told in words."""


def inspect_onnx(path: Path) -> FileView:
    """Say what an ONNX file is.

    Raises:
        PcqError: it cannot be opened or is not ONNX.
        CheckFailed: packed weights are damaged.
    """
    if not is_packed(path):
        return _plain(path)
    model = onnx.load_model(path, load_external_data=False)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if KEY in metadata:
        schemes = from_json(metadata[KEY], str(path))
        stored = {tensor.name for tensor in model.graph.initializer}
        gone = [name for name in schemes if f"{name}/packed" not in stored]
        if gone:
            return _inflated(path, model, schemes, gone)
    return _packed(path, open_packed(path))


def _packed(path: Path, packed: PackedFile) -> FileView:
    numel = {name: weight.numel for name, weight in packed.weights.items()}
    layouts = {name: scheme.layout for name, scheme in packed.schemes.items()}
    resident = packed.float_bytes + sum(
        packed.weight_bytes[name] if layout in STAY_PACKED else 4 * numel[name] for name, layout in layouts.items()
    )
    loading = sum(LOADING[layout] * numel[name] for name, layout in layouts.items())
    facts = [
        ("opset", str(packed.opset)),
        ("IR version", str(packed.ir_version)),
        ("unpacking functions", ", ".join(packed.functions)),
        ("bits per packed weight", f"{packed.bits_per_weight:.3f}"),
        ("other tensors", f"{packed.float_bytes:,} bytes"),
        *runs(path, resident, loading),
        *_saturating(packed.metadata),
        *_folded(packed.metadata),
        *_usual(packed.metadata),
        *((key, value) for key, value in packed.metadata.items() if key not in SAID and len(value) < 200),
    ]
    rows = tuple(
        quantized_view(name, tensor, f"{tensor.grid.count} levels ({_layout(packed.schemes[name])})")
        for name, tensor in packed.weights.items()
    )
    return FileView(path, "packed ONNX", tuple(facts), rows, packed.file_bytes)


def _saturating(metadata: dict[str, str]) -> list[tuple[str, str]]:
    """Which layers of a file with int8 activations give other results on x86 processors without VNNI."""
    if metadata.get("pcq.mode") != "int8":
        return []
    names = json.loads(metadata.get(SATURATING, "null"))
    said = "not recorded" if names is None else ", ".join(names) or "none: it computes the same integers everywhere"
    return [("layers that saturate on x86 without VNNI", said)]


def _folded(metadata: dict[str, str]) -> list[tuple[str, str]]:
    """How many BatchNorms of the network are part of scales and biases in this file."""
    names = json.loads(metadata.get(FOLDED, "[]"))
    return [("BatchNorm folded into scales", f"behind {len(names)} of the layers")] if names else []


def _usual(metadata: dict[str, str]) -> list[tuple[str, str]]:
    """The sizes that it was exported with, where it takes any."""
    said = ", ".join(f"{name} {dimensions(sizes)}" for name, sizes in usual_sizes(metadata).items())
    return [("sizes are open; exported with", said)] if said else []


def _layout(scheme: Scheme) -> str:
    """``5 to a byte`` for trits, ``4 + 8 to a byte`` for two planes, or the layout; and how the matrix lies."""
    if scheme.layout != "exact":
        return f"{scheme.layout}, {scheme.bits} bits{', stored transposed' if scheme.transposed else ''}"
    digits = " + ".join(str(DIGITS[radix]) for radix in scheme.planes)
    return f"{digits} to a byte{', stored transposed' if scheme.transposed else ''}"


def runs(path: Path, resident: int, loading: int) -> list[tuple[str, str]]:
    """What ONNX Runtime makes of the file: nodes that multiply in int8 and in float, and the memory to expect.

    ``resident`` and ``loading`` are bytes of weights in float32 and what loading takes beside them; where int8 nodes
    are, weights take less: the optimised graph tells.
    """
    from pcq.export.verify import open_session

    try:
        with scratch() as folder:
            dump = folder / "optimised.onnx"
            open_session(str(path), optimised=True, dump=dump)
            graph = onnx.load_model(dump, load_external_data=False).graph
            held = sum(item.stat().st_size for item in folder.iterdir())
    except CheckFailed as error:
        return [("runs", error.what)]
    except Exception as error:  # a dump that protobuf cannot hold, or no place for it
        return [("runs", f"not looked at: {first_line(error)[:120]}")]
    counts = Counter(node.op_type for node in graph.node)
    whole = {kind: count for kind, count in counts.items() if kind in INT8}
    floats = {kind: count for kind, count in counts.items() if kind in MULTIPLYING}
    said = ", ".join(f"{count} {kind}" for kind, count in sorted(whole.items())) or "none"
    facts = [
        ("nodes that run in int8", said),
        ("nodes that multiply in float", ", ".join(f"{n} {kind}" for kind, n in sorted(floats.items())) or "none"),
        ("weights in memory, predicted", f"{held if whole else resident:,} bytes"),
    ]
    if loading:
        facts.append(("while loading, besides", f"about {loading:,} bytes for a moment"))
    return facts


def _inflated(path: Path, model: onnx.ModelProto, schemes: dict[str, Scheme], gone: list[str]) -> FileView:
    """A packed file that a graph optimiser has unpacked."""
    was = sum(_stored(schemes[name]) for name in gone)
    now = sum(4 * math.prod(schemes[name].shape) for name in gone)
    tool = f"{model.producer_name} {model.producer_version}".strip() or "not recorded"
    facts = [
        ("re-inflated", f"{len(gone)} of {len(schemes)} packed weights are floats now, such as {gone[0]}"),
        ("these weights took", f"about {was:,} bytes packed, and take {now:,} as floats"),
        (
            "what does that",
            "graph optimisers: onnxsim, onnxslim, onnxscript's optimize(), ONNX Runtime's own saved graphs",
        ),
        ("what to do", "Export it again, and run no optimiser on it: packing is the last step"),
        ("last written by", tool),
        *((entry.key, entry.value) for entry in model.metadata_props if entry.key != KEY and len(entry.value) < 200),
    ]
    kinds = onnx.TensorProto.DataType
    rows = tuple(
        TensorView(
            tensor.name, tuple(tensor.dims), kinds.Name(tensor.data_type).lower(), 8 * _itemsize(tensor),
            math.prod(tensor.dims) * _itemsize(tensor),
        )
        for tensor in model.graph.initializer
    )  # fmt: skip
    return FileView(path, "packed ONNX that was re-inflated", tuple(facts), rows, file_bytes(path))


def _stored(scheme: Scheme) -> int:
    """Bytes of the codes alone."""
    numel = math.prod(scheme.shape)
    if scheme.layout != "exact":
        return -(-numel * scheme.bits // 8)
    return sum(-(-numel // DIGITS[radix]) for radix in scheme.planes)


def _itemsize(tensor: onnx.TensorProto) -> int:
    return int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _plain(path: Path) -> FileView:
    """What `pcq quantize` finds in an ONNX model that pcq did not pack: weights, then what it would leave float."""
    from pcq import onnx_input

    try:
        opened = onnx_input.open_graph(path)
    except PcqError as error:
        if "quantized already" not in error.what:
            raise
        return _quantized(path, error.what)
    inventory = onnx_input.take_inventory(opened)
    graph = opened.model.graph
    facts = [
        ("opset", str(opened.opset)),
        ("IR version", str(opened.ir_version)),
        ("inputs", ", ".join(f"{value.name} {value.shape}" for value in graph.inputs)),
        ("outputs", ", ".join(f"{value.name} {value.shape}" for value in graph.outputs)),
        *((f"note {i + 1}", f"`pcq quantize` would do this: {note}") for i, note in enumerate(opened.notes)),
    ]
    views = [float_view(each.name, each.shape, each.dtype) for each in inventory.parameters]
    words = [each.why or each.kind for each in inventory.parameters]
    named = tuple(
        TensorView(view.name, view.shape, f"{view.form}, {said}", view.bits, view.nbytes)
        for view, said in zip(views, words, strict=True)
    )
    return FileView(path, "float ONNX", tuple(facts), named, opened.file_bytes)


def _quantized(path: Path, found: str) -> FileView:
    """A graph that another tool quantized."""
    model = onnx.load_model(path, load_external_data=False)
    kinds = onnx.TensorProto.DataType
    rows = tuple(
        TensorView(
            tensor.name, tuple(tensor.dims), kinds.Name(tensor.data_type).lower(), 8 * _itemsize(tensor),
            math.prod(tensor.dims) * _itemsize(tensor),
        )
        for tensor in model.graph.initializer
    )  # fmt: skip
    resident = sum(row.nbytes for row in rows)
    facts = [("found", found), *runs(path, resident, 0)]
    return FileView(path, "ONNX that another tool quantized", tuple(facts), rows, file_bytes(path))
