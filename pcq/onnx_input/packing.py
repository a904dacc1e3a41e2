"""Put packed weights into someone else's graph, and prove the file against that very graph.

The reference is the model as it came, each quantized weight's numbers replaced where they are stored, by following the
chain to the layer backwards: it shares nothing with the rewiring but the codes. ONNX Runtime runs both, with and
without graph optimisations; on the same level outputs may differ by 1e-4 of their scale.
"""

import importlib.metadata
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx.checker
import onnx_ir as ir
import onnxruntime as ort
from torch import Tensor

from pcq.atomic import scratch
from pcq.errors import CheckFailed, PcqError, first_line
from pcq.export import scheme, verify, writing
from pcq.export.body import DOMAIN, Lowered
from pcq.export.frame import can_transpose
from pcq.export.lowering import lower
from pcq.onnx_input.graph import AGAIN, OPSET, Opened, open_graph, read, seed, values
from pcq.onnx_input.inventory import Inventory, Operand, Weight, oriented, take_inventory
from pcq.onnx_input.trials import QUIET, Trial, find_trials
from pcq.progress import Progress, silent
from pcq.qtensor import QuantizedTensor

Array = npt.NDArray[np.generic]

HALF_TOLERANCE = 4e-3
"""Where layers read weights in float16, eight roundings of that type: ONNX Runtime has few such kernels on the CPU, and
which of the casts around each node it leaves out, and so what is rounded, differs where a weight is unpacked."""


@dataclass(frozen=True)
class Rewritten:
    """What was written and how it was proved.

    Attributes:
        path, data_path: the file, and its external data if it needs any.
        nbytes, predicted: the size of both, and what was predicted.
        agreements: the runs beside the model with the dequantized weights in float.
        drift: how far the outputs are from those of the float model on the trials, ``|y - y0| / |y0|``.
        opset, ir_version: the file's.
        target_ort: the oldest ONNX Runtime known to load these, or None.
        ort_version: the ONNX Runtime that it was tried in.
    """

    path: Path
    data_path: Path | None
    nbytes: int
    predicted: int
    agreements: tuple[verify.Agreement, ...]
    drift: float
    opset: int
    ir_version: int
    target_ort: str | None
    ort_version: str


def find_inputs(opened: Opened, samples: Sequence[Trial] = ()) -> list[Trial]:
    """What to run the model on: ``samples`` and random inputs. On these a graph that was raised is compared with the
    file itself, for everything else is compared with the graph.

    Raises:
        PcqError: no inputs are known that the model runs on, or raising its operator set changes what it computes.
    """
    trials = [*samples]
    try:
        trials += find_trials(opened.path, opened.model)
    except PcqError:
        if not trials:
            raise
    if opened.opset >= OPSET:
        return trials
    with scratch() as folder:
        before = _run(verify.open_session(str(_seeded(opened.path, folder)), optimised=False), trials)
        raised, model = folder / "raised.onnx", open_graph(opened.path).model
        seed(model)
        writing.save(model, raised, 1_500_000_000)
        after = _run(verify.open_session(str(raised), optimised=False), trials)
    pairs = [pair for now, then in zip(after, before, strict=True) for pair in zip(now, then, strict=True)]
    error = max((_error(ours, theirs) for ours, theirs in pairs), default=0.0)
    if not error <= verify.TOLERANCE:
        raise PcqError(
            f"raised from operator set {opened.opset} to {OPSET} it computes something else: outputs differ by "
            f"{error:.2g} of their scale from the file's own", where=str(opened.path),
            allowed=f"up to {verify.TOLERANCE:g}", todo=AGAIN,
        )  # fmt: skip
    return trials


def write_packed(
    opened: Opened,
    inventory: Inventory,
    quantized: Mapping[str, QuantizedTensor],
    out: Path,
    trials: Sequence[Trial],
    *,
    changed: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
    external_above: int = writing.EXTERNAL_ABOVE,
    progress: Progress = silent,
) -> Rewritten:
    """Write ``opened`` with the weights ``quantized`` packed in it, and prove the file. ``opened.model`` is used up.

    Args:
        opened: the model.
        inventory: its weights.
        quantized: codes by weight name, in torch's orientation.
        out: the file.
        trials: from :func:`find_inputs`: what to run both on.
        changed: new numbers of biases, by the initializer's name.
        metadata: more for the file's metadata, each under ``pcq.<key>``.
        external_above: bytes of initializers beyond which they get a file of their own.
        progress: called at each stage.

    Raises:
        PcqError: nothing can be written there.
        CheckFailed: the file is not right; nothing was written.
    """
    with writing.draft(out):  # to say so now rather than after the work
        pass
    predicted = predict(opened, inventory, quantized)
    read = (operand.chain.dtype for name in quantized for operand in inventory.weights[name].operands)
    tolerance = verify.TOLERANCE if all(dtype == ir.DataType.FLOAT for dtype in read) else HALF_TOLERANCE
    model, weights = opened.model, inventory.weights
    _change(model, changed or {})
    schemes = {}
    for done, (name, weight) in enumerate(quantized.items()):
        progress("pack", done, len(quantized))
        lowered, transposed = substitute(model, weights[name], weight)
        schemes[name] = scheme.describe(weight, lowered.function.name, transposed)
    entries = {"version": importlib.metadata.version("pcq"), **(metadata or {})}
    model.metadata_props.update({f"pcq.{key}": value for key, value in entries.items()})
    model.metadata_props[scheme.KEY] = scheme.to_json(schemes)
    with writing.draft(out) as path:
        progress("write", 0, 1)
        data = writing.save(model, path, external_above)
        _check_form(path, opened.path)
        file = verify.check_codes(path, quantized)
        verify.check_size(file, predicted)
        verify.check_unpacking(path, quantized, progress)
        agreements, drift = _check_outputs(
            path,
            reference(open_graph(opened.path), quantized, changed),
            opened.path,
            quantized,
            trials,
            tolerance,
            progress,
        )
        data = writing.commit(path, data, out)
    return Rewritten(
        out, data, file.file_bytes, predicted, agreements, drift, model.opset_imports[""], model.ir_version,
        opened.target_ort, ort.__version__,
    )  # fmt: skip


def substitute(model: ir.Model, weight: Weight, quantized: QuantizedTensor) -> tuple[Lowered, bool]:
    """Put the unpacking of ``quantized`` in the place of ``weight``: at the head of the main graph, whose values every
    subgraph sees. Returns what was put there, and whether it is stored transposed.

    Raises:
        PcqError: the weight cannot be packed.
    """
    name, operands = weight.parameter.name, weight.operands
    transposed = all(operand.view == "transposed" for operand in operands) and can_transpose(quantized.rows)
    try:
        lowered = lower(quantized, model.opset_imports[""], transposed)
    except PcqError as error:
        raise PcqError(error.what, where=name, allowed=error.allowed, todo=error.todo) from error
    made: list[ir.Node] = []
    inputs = []
    for part, array in lowered.arrays.items():
        value = ir.Value(name=f"{name}/{part}", const_value=ir.tensor(array, name=f"{name}/{part}"))
        model.graph.register_initializer(value)
        inputs.append(value)
    model.functions.setdefault(lowered.function.identifier(), lowered.function)
    model.opset_imports[DOMAIN] = 1

    def node(kind: str, reads: Sequence[ir.Value], output: str, shape: tuple[int, ...], dtype: ir.DataType,
             attributes: Mapping[str, int | list[int]], domain: str = "") -> ir.Value:  # fmt: skip
        value = ir.Value(name=output, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        given = ir.convenience.convert_attributes(attributes)
        made.append(ir.Node(domain, kind, reads, given, outputs=[value], name=f"{name}/unpack" if domain else output))
        return value

    stored = node(
        lowered.function.name, inputs, f"{name}/transposed" if transposed else name, lowered.shape, ir.DataType.FLOAT,
        lowered.attributes, DOMAIN,
    )  # fmt: skip
    forms = [(operand.view, operand.shape, operand.chain.casts) for operand in operands]
    views: dict[tuple[str, tuple[int, ...], tuple[ir.DataType, ...]], ir.Value] = {}
    for view, shape, casts in dict.fromkeys(forms):
        value = stored
        if (view == "transposed") != transposed:
            perm: dict[str, int | list[int]] = {"perm": [1, 0]}
            value = node("Transpose", [value], f"{name}/turned", lowered.shape[::-1], ir.DataType.FLOAT, perm)
        if view == "flat":
            sizes = node("Constant", [], f"{name}/shape", (len(shape),), ir.DataType.INT64, {"value_ints": list(shape)})
            value = node("Reshape", [value, sizes], f"{name}/shaped", shape, ir.DataType.FLOAT, {})
        for dtype in casts:
            value = node("Cast", [value], f"{value.name}/{dtype.name.lower()}", shape, dtype, {"to": int(dtype)})
        views[view, shape, casts] = value
    model.graph.insert_before(model.graph[0], made)
    for operand, form in zip(operands, forms, strict=True):
        ir.convenience.replace_all_uses_with(operand.chain.value, views[form], replace_graph_outputs=True)
    for operand in operands:
        _drop(model, operand)
    return lowered, transposed


def _drop(model: ir.Model, operand: Operand) -> None:
    """Forget the nodes of a chain that nothing reads any more, and its root."""
    for node in reversed(operand.chain.nodes):
        if node.graph is not None and not any(list(output.uses()) for output in node.outputs):
            node.graph.remove(node, safe=True)
    root = operand.chain.root
    if list(root.uses()) or root.is_graph_output():
        return
    for graph in model.graphs():
        if root.name is not None and graph.initializers.get(root.name) is root:
            graph.initializers.pop(root.name)
            if root in graph.inputs:
                graph.inputs.remove(root)
    producer = root.producer()
    if producer is not None and producer.graph is not None:
        producer.graph.remove(producer, safe=True)


def predict(opened: Opened, inventory: Inventory, quantized: Mapping[str, QuantizedTensor]) -> int:
    """The size of the file: the input's, without the tensors and nodes that go, with what comes."""
    size, functions = opened.file_bytes - opened.dropped, {}
    for name, weight in quantized.items():
        operands = inventory.weights[name].operands
        roots = {id(operand.chain.root): operand.chain.tensor for operand in operands}
        size -= sum(tensor.nbytes for tensor in roots.values())
        gone = {node for operand in operands for node in operand.chain.nodes}
        size -= sum(ir.serde.serialize_node(node).ByteSize() for node in gone)
        blank = quantized[name].rows.shape
        size += weight.nbytes + 5 * len(name) + 170 + 8 * len(blank)  # the call, its inputs' names, headers
        size += len(scheme.to_json({name: scheme.describe(weight, "Symmetric16Cut", False)}))
        functions[(type(weight.grid), weight.grid.count, weight.rows.group is None)] = 2200
    return size + sum(functions.values()) + 512


def _change(model: ir.Model, changed: Mapping[str, Tensor]) -> None:
    for name, tensor in changed.items():
        model.graph.initializers[name].const_value = ir.tensor(tensor.numpy(), name=name)


def reference(
    opened: Opened,
    quantized: Mapping[str, QuantizedTensor],
    changed: Mapping[str, Tensor] | None = None,
    lazy: bool = True,
) -> ir.Model:
    """The model with the dequantized numbers where the weights are stored, new biases, seeds for what it draws at
    random, and nothing else changed.

    ``lazy`` dequantizes each weight when it is written; the graph must not be changed before.
    """
    _change(opened.model, changed or {})
    seed(opened.model)
    inventory = take_inventory(opened)
    for name, codes in quantized.items():
        for operand in inventory.weights[name].operands:
            chain = operand.chain
            shape = tuple(chain.tensor.shape.numpy())
            casts = any(node.op_type == "Cast" for node in chain.nodes)
            dtype = ir.DataType.FLOAT if casts else chain.tensor.dtype
            numbers = _numbers(operand, codes, shape, dtype)
            later = ir.LazyTensor(numbers, dtype=dtype, shape=ir.Shape(shape), name=chain.root.name)
            tensor: ir.TensorProtocol = later if lazy else numbers()
            producer = chain.root.producer()
            if producer is None:
                chain.root.const_value, chain.root.type = tensor, ir.TensorType(dtype)
            else:
                producer.attributes["value"] = ir.AttrTensor("value", tensor)
                chain.root.type = ir.TensorType(dtype)
    return opened.model


def _numbers(
    operand: Operand, codes: QuantizedTensor, shape: tuple[int, ...], dtype: ir.DataType
) -> Callable[[], ir.TensorProtocol]:
    """Dequantized numbers in the order in which the root is stored."""

    def evaluate() -> ir.TensorProtocol:
        places = oriented(operand.chain.places(), operand.view)
        stored = operand.chain.tensor.numpy().astype(np.float32).reshape(-1).copy()
        stored[places.reshape(-1)] = codes.dequantize().numpy().reshape(-1)
        return ir.tensor(stored.reshape(shape).astype(dtype.numpy()), name=operand.chain.root.name)

    return evaluate


def _check_form(path: Path, original: Path) -> None:
    """The ONNX checker, if it lets the input pass."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # it has several kinds, and fails on operators that are not ONNX's own
        try:
            onnx.checker.check_model(str(original), full_check=True)
        except Exception:
            return
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        raise CheckFailed(f"the ONNX checker refuses it: {first}", where="check") from error


def _check_outputs(
    path: Path,
    right_model: ir.Model,
    original: Path,
    quantized: Mapping[str, QuantizedTensor],
    trials: Sequence[Trial],
    tolerance: float,
    progress: Progress,
) -> tuple[tuple[verify.Agreement, ...], float]:
    """Run the file beside the reference on both levels of optimisation, and beside the input; look at what is left."""
    agreements: list[verify.Agreement] = []
    packed: list[list[Array]] = []
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        right = Path(folder) / "reference.onnx"
        writing.save(right_model, right, 1_500_000_000)
        ours = _seeded(path, Path(folder))
        alike = {(value.name or "").removesuffix("/packed") for value in values(right_model)}  # not packed by pcq
        for optimised in (True, False):
            dump = Path(folder) / "optimised.onnx" if optimised else None
            progress("check outputs", int(not optimised), 2)
            theirs = _run(verify.open_session(str(right), optimised=optimised), trials)
            packed = _run(verify.open_session(str(ours), optimised=optimised, dump=dump), trials)
            for trial, mine, others in zip(trials, packed, theirs, strict=True):
                error = max((_error(a, b) for a, b in zip(mine, others, strict=True)), default=0.0)
                agreements.append(verify.Agreement(trial.kind, trial.batch, optimised, error))
                if not error <= tolerance:
                    raise CheckFailed(
                        f"outputs differ by {error:.2g} of their scale from those of the model with these weights in "
                        f"float, on {trial.kind} inputs {'with' if optimised else 'without'} graph optimisations",
                        where="check", allowed=f"up to {tolerance:g}",
                    )  # fmt: skip
            if dump is not None:
                large = {name for name, weight in quantized.items() if 4 * weight.numel > verify.FOLDING_LIMIT}
                verify.check_folded(dump, large | (alike - quantized.keys()))
        before = _run(verify.open_session(str(_seeded(original, Path(folder))), optimised=False), trials)
    progress("check outputs", 2, 2)
    return tuple(agreements), max((_drift(a, b) for a, b in zip(packed, before, strict=True)), default=0.0)


def _seeded(path: Path, folder: Path) -> Path:
    """The file; of one that draws random numbers a copy in ``folder`` that draws the same in every session."""
    model = read(path)
    if not seed(model):
        return path
    copy = folder / f"seeded-{path.name}"
    writing.save(model, copy, 1_500_000_000)
    return copy


def _run(session: ort.InferenceSession, trials: Sequence[Trial]) -> list[list[Array]]:
    try:
        return [session.run(None, dict(trial.feed), QUIET) for trial in trials]
    except Exception as error:  # onnxruntime's exceptions share no class of their own
        first = first_line(error)
        raise PcqError(f"ONNX Runtime does not run it on these inputs: {first}", where="--sample") from error


def _error(ours: object, theirs: object) -> float:
    """Largest difference of an output relative to its largest number; equal places must be finite."""
    if not isinstance(ours, np.ndarray) or not isinstance(theirs, np.ndarray):
        return 0.0 if repr(ours) == repr(theirs) else float("inf")
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("inf")
    if not np.issubdtype(ours.dtype, np.floating):
        return 0.0 if np.array_equal(ours, theirs) else float("inf")
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    difference = float(np.abs(a[finite] - b[finite]).max(initial=0.0))
    scale = float(np.abs(b[finite]).max(initial=0.0))
    return difference / scale if scale else (float("inf") if difference else 0.0)


def _drift(ours: Sequence[object], theirs: Sequence[object]) -> float:
    """``|y - y0| / |y0|`` over the finite numbers of all float outputs of one run; where shapes changed, infinity."""
    difference = scale = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and np.issubdtype(b.dtype, np.floating):
            if a.shape != b.shape:
                return float("inf")
            both = np.isfinite(a) & np.isfinite(b)
            difference += float(np.square(a[both].astype(np.float64) - b[both]).sum())
            scale += float(np.square(b[both].astype(np.float64)).sum())
    return float((difference / scale) ** 0.5) if scale else 0.0
