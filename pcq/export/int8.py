"""Int8 activations: a packed float graph in, the same graph with its layers on ONNX Runtime's int8 kernels out.

Convolutions and Gemm run *static*: QuantizeLinear and DequantizeLinear stand around them, BatchNorm is folded into the
scales of their integers, and ONNX Runtime fuses each into QLinearConv or QGemm. Between them, sums, maximum pooling and
moves stay in uint8 too. MatMul with a weight runs *dynamic*: DynamicQuantizeLinear and MatMulInteger, which it fuses.

Gemm is given zero points of its weight, without which ONNX Runtime does not fuse it. Where a layer is left in float
between two tensors of codes, a Max with the least float stands behind it: newer ONNX Runtimes would quantize its
weights, unasked.

A tensor that a static layer, or an operation between static layers, computes is quantized where it is made, and
everything reads its codes; any other tensor is quantized for the static layers that read it.

x86 processors without VNNI add pairs of products in 16 bits and saturate there. Integers up to 64 cannot (``SAFE``),
nor can depthwise layers, which have a kernel of their own; what enters any other static layer has 7 bits instead of 8,
unless every target is known to have VNNI. Dynamic layers always see 8 bits. A Clip in front of such a
layer clips codes: of floats, ONNX Runtime would leave it there, and the layer before it in float.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pcq.activations import FULL, HALF, Names, Range, sums
from pcq.export import norms
from pcq.export.body import DOMAIN
from pcq.export.editing import (
    add_op,
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
    typed_value,
)
from pcq.export.integers import Channels, Integers, integers, large, lower_int8
from pcq.qtensor import QuantizedTensor

Activations = Literal["static", "dynamic"]
SAME = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")
"""Operations whose output has the codes of their input."""


@dataclass(frozen=True)
class Site:
    """A node that can run in int8: ``node`` multiplies by the packed ``weight``.

    ``saturates``: with inputs of 8 bits it can, on x86 without VNNI.
    """

    name: str
    node: ir.Node
    weight: str
    transposed: bool
    form: Integers
    activations: Activations
    saturates: bool


@dataclass(frozen=True)
class Found:
    """Nodes that can run in int8, in the graph's order; and of weights that cannot, why."""

    sites: tuple[Site, ...]
    left: dict[str, str]


def find_sites(model: ir.Model, weights: Mapping[str, QuantizedTensor]) -> Found:
    """Where packed weights meet operations that have int8 kernels."""
    sites, left = [], {}
    order = {node: i for i, node in enumerate(model.graph)}
    for call in [node for node in model.graph if node.domain == DOMAIN]:
        value = call.outputs[0]
        name = (value.name or "").removesuffix("/transposed")
        form = integers(weights[name])
        for use in value.uses():
            node, transposed = use.node, (value.name or "").endswith("/transposed")
            kind = _activations(node, use.idx, transposed or weights[name].rows.axis == 1)
            if isinstance(form, str):
                left[name] = form
            elif node not in order:
                left[name] = f"{node.op_type} in a branch or a loop stays float"
            elif kind is None:
                left[name] = f"{node.op_type} has no int8 kernel that serves"
            else:
                shape = weights[name].rows.shape
                alone = shape[1] == 1 and int_attribute(node, "group", 1) == shape[0] and len(shape) <= 4
                depthwise = node.op_type == "Conv" and alone
                saturates = not depthwise and large(weights[name].grid)
                sites.append(Site(node.name or name, node, name, transposed, form, kind, saturates))
    return Found(tuple(sorted(sites, key=lambda site: order[site.node])), left)


def _activations(node: ir.Node, index: int, by_column: bool) -> Activations | None:
    """``by_column``: what it multiplies by is ``[in, out]``."""
    kind = reader_kind(node, index)
    if kind == "Conv" or (kind == "Gemm" and not by_column):
        return "static" if is_constant(node, 2) is not False else None
    return "dynamic" if kind == "MatMul" and by_column else None


@dataclass(frozen=True)
class Placement:
    """Which tensors are quantized.

    Attributes:
        sites: the nodes that run in int8.
        whole: tensors quantized where they are made, for all readers.
        partly: tensors quantized for int8 readers only -> those readers.
        same: a tensor of ``whole`` -> the tensor whose codes it has.
        names: of the tensors that have ranges of their own, as ``pcq.activations`` gives them.
    """

    sites: tuple[Site, ...]
    whole: tuple[ir.Value, ...]
    partly: dict[ir.Value, tuple[ir.Node, ...]]
    same: dict[ir.Value, ir.Value]
    names: dict[ir.Value, str]

    def observed(self, vnni: bool) -> dict[str, int]:
        """Tensors whose ranges are needed, for these sites and any fewer -> the last of their codes."""
        values = dict.fromkeys([*self.whole, *self.partly])
        entering = [site.node.inputs[0] for site in self.sites if site.saturates and site.activations == "static"]
        halved = set() if vnni else {self.same.get(value, value) for value in entering if value is not None}
        return {value.name or "": HALF if self.same.get(value, value) in halved else FULL for value in values}

    def touches(self, site: Site, values: Container[ir.Value]) -> bool:
        """Whether a static site reads one of these tensors, or makes one."""
        return site.activations == "static" and (site.node.inputs[0] in values or _end(site.node) in values)


def place(model: ir.Model, sites: Sequence[Site]) -> Placement:
    """Decide it for the chosen sites."""
    static = {site.node: site.weight for site in sites if site.activations == "static"}
    give, names = Names(), {}
    whole: dict[ir.Value, None] = {}
    partly: dict[ir.Value, list[ir.Node]] = {}
    same: dict[ir.Value, ir.Value] = {}
    for node in model.graph:
        kind = node.op_type if node.domain == "" else ""
        inputs = [value for value in node.inputs if value is not None]
        if node in static:
            if inputs[0] not in whole:
                if inputs[0] not in partly:
                    names[inputs[0]] = give.of(static[node], "input")
                partly.setdefault(inputs[0], []).append(node)
            if kind == "Conv":
                whole[_end(node)] = None
                names[_end(node)] = give.of(static[node], "output")
        elif kind in ("Add", "Concat") and len(inputs) > 1 and all(value in whole for value in inputs):
            whole[_end(node)] = None
            named = [names[same.get(value, value)] for value in inputs]
            names[_end(node)] = give.combined("sum" if kind == "Add" else "concat", named)
        elif kind in SAME and inputs and inputs[0] in whole:
            whole[node.outputs[0]] = None
            same[node.outputs[0]] = same.get(inputs[0], inputs[0])
    return Placement(tuple(sites), tuple(whole), {value: tuple(nodes) for value, nodes in partly.items()}, same, names)


def _end(node: ir.Node) -> ir.Value:
    """The output of a node after the BatchNorm and the Relu or Clip that ONNX Runtime fuses into it."""
    value = node.outputs[0]
    if (norm := _norm(node)) is not None:
        value = norm.outputs[0]
    after = only_reader(value)
    return after.outputs[0] if after is not None and after.op_type in ("Relu", "Clip") and after.domain == "" else value


def _norm(node: ir.Node) -> ir.Node | None:
    return norms.behind(node) if node.op_type == "Conv" else None


@dataclass(frozen=True)
class Converted:
    """What :func:`convert` put into the graph: for each weight the form and the channels of its integers."""

    forms: dict[str, tuple[Integers, Channels]]


def convert(
    model: ir.Model, weights: Mapping[str, QuantizedTensor], placement: Placement, ranges: Mapping[str, Range]
) -> Converted:
    """Rewrite ``model`` in place. Codes and scales of every weight stay in the file as they are."""
    graph, forms = model.graph, {}
    dynamic: dict[ir.Value, tuple[ir.Value, ...]] = {}
    clipped: dict[ir.Value, tuple[int, int]] = {}
    span = {value: ranges[(placement.same.get(value, value)).name or ""] for value in placement.whole}
    span |= {value: ranges[value.name or ""] for value in placement.partly if value not in span}
    codes_of = {value: _parameters(graph, placement.same.get(value, value), span[value]) for value in span}
    for i, site in enumerate(placement.sites):
        source = site.node.inputs[0]
        assert source is not None
        x_scale = float(span[source].scale) if site.activations == "static" else None
        channels, bias = _channels(site, weights[site.weight], x_scale)
        key = site.weight if site.weight not in forms else f"{site.weight}/{i}"
        forms[key] = (site.form, channels)
        lowered = lower_int8(weights[site.weight], site.form, channels, model.opset_imports[""], site.transposed)
        model.functions.setdefault(lowered.function.identifier(), lowered.function)
        parts = [initializer(graph, f"{site.weight if part in _STORED else key}/{part}", array)
                 for part, array in lowered.arrays.items()]  # fmt: skip
        suffix = "/transposed" if site.transposed else ""
        q = typed_value(f"{key}/int8{suffix}", ir.DataType.INT8, lowered.shape)
        rows = max(weights[site.weight].rows.g, channels.gain.size)
        s = typed_value(f"{key}/int8_scale", ir.DataType.FLOAT, (rows,))
        call = ir.Node(DOMAIN, lowered.function.name, parts, ir.convenience.convert_attributes(lowered.attributes),
                       outputs=[q, s], name=f"{key}/unpack8")  # fmt: skip
        graph.insert_before(graph[0], call)
        if site.activations == "dynamic":
            _multiply_dynamic(graph, site, key, q, s, dynamic)
            continue
        zeros = [] if site.node.op_type == "Conv" else [initializer(graph, f"zeros{rows}", np.zeros(rows, np.int8))]
        w = add_op(graph, site.node, "DequantizeLinear", (q, s, *zeros), f"{key}/dequantized", axis=0)
        norm = _norm(site.node)
        site.node.replace_input_with(1, w)
        if bias is not None:
            assert x_scale is not None
            steps = add_op(graph, site.node, "Mul", (s, codes_of[source][0]), f"{key}/bias_scale")
            whole = initializer(graph, f"{key}/bias", bias)
            b = add_op(graph, site.node, "DequantizeLinear", (whole, steps), f"{key}/bias_dequantized", axis=0)
            set_bias(site.node, b)
        if norm is not None:
            _bypass(graph, norm, site.node, span, codes_of)
        after = only_reader(site.node.outputs[0])
        if after is not None and (bounds := _outlasting(after, span)):
            _bypass(graph, after, site.node, span, codes_of)
            clipped[site.node.outputs[0]] = bounds
    for value, parameters in codes_of.items():
        only = None if value not in placement.partly else set(placement.partly[value])
        _quantize(graph, value, parameters, only, clipped.get(value))
    sweep(model)
    return Converted(forms)


def _outlasting(after: ir.Node, span: Mapping[ir.Value, Range]) -> tuple[int, int] | None:
    """The codes of the bounds of a Clip behind a layer that ONNX Runtime would leave in float, and the layer with it.

    It drops a Clip only where no code lies outside of it; where seven bits do, half of the eight are outside. Rounding
    is monotonous, so clipping codes gives the codes of what was clipped.
    """
    known = is_constant(after, 2) and is_constant(after, 1) is not False
    if after.op_type != "Clip" or after.domain or after.outputs[0] not in span or not known:
        return None
    found = span[after.outputs[0]]
    bounds = [value for value in after.inputs[1:] if value is not None]
    low, high = (numbers(value).astype(np.float32).reshape(-1)[0] for value in (bounds[0], bounds[-1]))
    zero = int(found.zero_point)
    if (FULL - zero) * found.scale <= high + found.scale / 2:
        return None
    least = 0 if len(bounds) < 2 else int(np.rint(low / found.scale)) + zero
    return max(0, least), int(np.rint(high / found.scale)) + zero


def _bypass(
    graph: ir.Graph,
    node: ir.Node,
    layer: ir.Node,
    span: dict[ir.Value, Range],
    codes_of: dict[ir.Value, tuple[ir.Value, ir.Value]],
) -> None:
    """Take ``node`` out from behind the layer, whose output then has its name, range and codes."""
    old, new = node.outputs[0], layer.outputs[0]
    bypass(graph, node, new)
    if old in span:
        span[new], codes_of[new] = span.pop(old), codes_of.pop(old)


_STORED = ("packed", "scale", "zero_point")


def _channels(
    site: Site, weight: QuantizedTensor, x_scale: float | None
) -> tuple[Channels, npt.NDArray[np.int32] | None]:
    """The gain of each channel with its BatchNorm folded in, and the bias in units of ``x_scale * s``."""
    node, count = site.node, weight.rows.shape[0]
    factor, bias = np.ones(count), np.zeros(count)
    given = bias_of(node)
    if x_scale is None:
        return Channels(np.full(1, 1 / site.form.unit, np.float32)), None
    if given is not None:
        bias = bias + numbers(given)
    norm = _norm(node)
    if norm is not None:
        done = norms.as_map(norm, bias)
        factor, bias = done.factor, done.shift
    scale = np.broadcast_to(weight.grid.scale.numpy(), (count,))  # type: ignore[union-attr]
    found = sums(scale, site.form.unit, factor, bias, np.float32(x_scale))
    flip = np.where(found.lost, 0, np.sign(factor)).astype(np.int8)
    channels = Channels(found.gain)
    if (flip != 1).any():
        floor = np.where(found.lost, found.step, 0).astype(np.float32)
        channels = Channels(np.where(found.lost, 0, found.gain).astype(np.float32), flip, floor)
    if given is None and norm is None:
        return channels, None
    return channels, found.added.astype(np.int32)


def _multiply_dynamic(
    graph: ir.Graph, site: Site, key: str, q: ir.Value, s: ir.Value, known: dict[ir.Value, tuple[ir.Value, ...]]
) -> None:
    """``x @ w`` with x quantized anew in every run, by one scale and zero point."""
    node, x = site.node, site.node.inputs[0]
    assert x is not None
    if x not in known:
        prefix = f"{x.name}/dynamic"  # others may read it by a range that was observed
        outputs = [ir.Value(name=f"{prefix}/{part}") for part in ("codes", "scale", "zero")]
        quantize = ir.Node("", "DynamicQuantizeLinear", [x], outputs=outputs, name=f"{prefix}/quantize")
        producer = x.producer()
        if producer is None:
            graph.insert_before(graph[0], quantize)
        else:
            graph.insert_after(producer, quantize)
        known[x] = tuple(outputs)
    codes, scale, zero = known[x]
    product = add_op(graph, node, "MatMulInteger", (codes, q, zero), f"{key}/product")
    floats = add_op(graph, node, "Cast", (product,), f"{key}/product_float", to=int(ir.DataType.FLOAT))
    steps = add_op(graph, node, "Mul", (scale, s), f"{key}/steps")
    result = ir.Node("", "Mul", [floats, steps], name=f"{key}/scaled")
    old = node.outputs[0]
    result.outputs[0].type, result.outputs[0].shape = old.type, old.shape
    graph.insert_before(node, result)
    name, old.name = old.name, f"{old.name}/float"
    ir.convenience.replace_all_uses_with([old], result.outputs, replace_graph_outputs=True)
    result.outputs[0].name = name
    graph.remove(node, safe=True)


def _quantize(
    graph: ir.Graph,
    value: ir.Value,
    parameters: tuple[ir.Value, ir.Value],
    only: set[ir.Node] | None,
    bounds: tuple[int, int] | None = None,
) -> None:
    """Let readers (those in ``only``) read the codes of ``value``, none outside of ``bounds``, dequantized."""
    readers = [use for use in value.uses() if only is None or use.node in only]
    name = value.name
    source, shield = value, []
    if only is not None and value.producer() is not None:
        least = initializer(graph, "least_float", np.asarray(np.finfo(np.float32).min))
        shield = [ir.Node("", "Max", [value, least], name=f"{name}/shield")]
        source = shield[0].outputs[0]
        source.name, source.type, source.shape = f"{name}/shielded", value.type, value.shape
    codes = ir.Value(name=f"{name}/codes")
    floats = ir.Value(name=f"{name}/dequantized", type=value.type, shape=value.shape)
    nodes = [
        *shield,
        ir.Node("", "QuantizeLinear", [source, *parameters], outputs=[codes], name=f"{name}/quantize"),
        ir.Node("", "DequantizeLinear", [codes, *parameters], outputs=[floats], name=f"{name}/dequantize"),
    ]
    if bounds is not None:
        least, most = (initializer(graph, f"code{code}", np.asarray(code, np.uint8)) for code in bounds)
        clip = ir.Node("", "Clip", [codes, least, most], name=f"{name}/clip")
        clip.outputs[0].name = f"{name}/clipped"
        nodes[-1].replace_input_with(0, clip.outputs[0])
        nodes.insert(-1, clip)
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], nodes)
    else:
        graph.insert_after(producer, nodes)
    for use in readers:
        use.node.replace_input_with(use.idx, floats)
    if only is None and value.is_graph_output():
        graph.outputs[list(graph.outputs).index(value)] = floats
        value.name, floats.name = f"{name}/float", name


def _parameters(graph: ir.Graph, value: ir.Value, span: Range) -> tuple[ir.Value, ir.Value]:
    """Scale and zero point of a tensor's codes; of tensors with the same codes, the same."""
    names = f"{value.name}/codes_scale", f"{value.name}/codes_zero_point"
    if names[0] in graph.initializers:
        return graph.initializers[names[0]], graph.initializers[names[1]]
    return (
        initializer(graph, names[0], np.asarray(span.scale)),
        initializer(graph, names[1], np.asarray(span.zero_point)),
    )
