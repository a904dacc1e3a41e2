"""Proof that a packed ONNX file is right, made on the file as it was written. Whatever is off is a CheckFailed."""

import tempfile
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx.checker
import onnxruntime as ort
import torch
from torch import Tensor

from pcq.data.inputs import of_tokens
from pcq.errors import CheckFailed, PcqError, first_line
from pcq.export.body import DOMAIN
from pcq.export.reading import PackedFile, open_packed
from pcq.grids import Affine, Grid
from pcq.progress import Progress, silent
from pcq.qtensor import QuantizedTensor

TOLERANCE = 1e-4
"""Largest error of an output, relative to the largest absolute value of that output in torch."""

SIZE_TOLERANCE, SIZE_SLACK = 0.05, 16384
"""A file may differ from its predicted size by 5 % and 16 KiB; its packed weights not by a byte."""

ROUNDING = 1e-6
"""Largest error of a weight relative to the largest one, where unpacking it rounds."""

FARTHEST = 0.5
"""Relative L2 distance from torch beyond which a file that rounds activations is refused."""

FOLDING_LIMIT = 2**30
"""ONNX Runtime from 1.27 on folds no constant of more bytes than this: such a weight is unpacked in every run."""


@dataclass(frozen=True)
class Agreement:
    """One run beside torch.

    Attributes:
        inputs: ``random`` or ``sample``.
        batch: samples in it.
        optimised: with ONNX Runtime's graph optimisations.
        error: largest absolute error of any output, relative to that output's largest absolute value in torch.
    """

    inputs: str
    batch: int
    optimised: bool
    error: float


@dataclass(frozen=True)
class Rounded:
    """How far activations rounded to int8 in MatMulNBits move the outputs away from torch's, in the worst trial.

    Attributes:
        relative_l2: ``|y - y0| / |y0|`` over all outputs.
        error: as in :class:`Agreement`.
    """

    relative_l2: float
    error: float


@dataclass(frozen=True)
class Trial:
    """Inputs to run both sides on, in the graph's order; ``mask``: which of them is a mask of tokens, if any."""

    inputs: str
    values: tuple[Tensor, ...]
    mask: int | None = None

    @property
    def batch(self) -> int:
        return self.values[0].shape[0] if self.values[0].ndim else 1


def prove(
    path: Path,
    weights: Mapping[str, QuantizedTensor],
    predicted: int,
    reference: Callable[[Sequence[Tensor]], list[Tensor]],
    trials: Sequence[Trial],
    progress: Progress = silent,
    nbytes: Mapping[str, int] | None = None,
) -> tuple[PackedFile, tuple[Agreement, ...]]:
    """All checks of this module, the cheap ones first. MatMulNBits is checked in float32, whatever the file allows.

    Args:
        path: the file.
        weights: what has to be packed in it.
        predicted: its size.
        reference: what it has to compute: inputs -> outputs, both in the graph's order.
        trials: what to run both on.
        nbytes: what each weight takes in the file; default: as packed.

    Raises:
        CheckFailed: the file is not right.
    """
    progress("check codes", 0, 1)
    check_form(path)
    file = check_codes(path, weights, nbytes)
    check_size(file, predicted)
    with in_float32(path) as exact:
        multiplied = [name for name, scheme in file.schemes.items() if scheme.layout == "matmulnbits"]
        halves = {name for name in multiplied if getattr(weights[name].grid, "halves", 1) == 2}
        check_unpacking(exact, weights, progress, halves)
        kept = {name: scheme.layout for name, scheme in file.schemes.items() if scheme.layout in STAY_PACKED}
        return file, check_outputs(exact, reference, trials, weights, progress, kept)


STAY_PACKED = {"low-memory": "DequantizeLinear", "matmulnbits": "MatMulNBits"}
"""Layouts whose codes stay packed in memory, and the operator that reads them."""


def rounds(path: Path) -> bool:
    """Whether the file lets ONNX Runtime round activations to int8."""
    nodes = onnx.load_model(path, load_external_data=False).graph.node
    return any(_level(node) is not None and _level(node).i != 1 for node in nodes)  # type: ignore[union-attr]


def _level(node: onnx.NodeProto) -> onnx.AttributeProto | None:
    return next((one for one in node.attribute if one.name == "accuracy_level"), None)


@contextmanager
def in_float32(path: Path) -> Iterator[Path]:
    """The file, or beside it a copy whose MatMulNBits computes in float32."""
    if not rounds(path):
        yield path
        return
    model = onnx.load_model(path, load_external_data=False)
    for node in model.graph.node:
        level = _level(node)
        if level is not None:
            level.i = 1
    copy = path.with_name("float32.onnx")
    onnx.save_model(model, copy)
    try:
        yield copy
    finally:
        copy.unlink()


def rounded(path: Path, reference: Callable[[Sequence[Tensor]], list[Tensor]], trials: Sequence[Trial]) -> Rounded:
    """Run the file as it is.

    Raises:
        CheckFailed: its outputs have little to do with torch's.
    """
    session, worst, error = open_session(str(path), optimised=True), 0.0, 0.0
    for trial in trials:
        expected = [value.detach() for value in reference(trial.values)]
        feed = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), trial.values, strict=True)}
        got = session.run(None, feed)
        pairs = [(a.astype(np.float64), b.numpy().astype(np.float64)) for a, b in zip(got, expected, strict=True)]
        off = sum(float(np.square(a - b).sum()) for a, b in pairs)
        worst = max(worst, (off / max(sum(float(np.square(b).sum()) for _, b in pairs), 1e-30)) ** 0.5)
        error = max(error, _error(session, trial, expected))
    if not worst <= FARTHEST:
        raise CheckFailed(f"MatMulNBits in int8 moves the outputs {worst:.2g} away from torch's (relative L2)",
                          where="check", allowed=f"up to {FARTHEST:g}", todo="Give --accuracy-level 1")  # fmt: skip
    return Rounded(worst, error)


def check_form(path: Path) -> None:
    """The ONNX checker with full shape inference. (It says nothing about whether ONNX Runtime has the kernels.)"""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckFailed(f"the ONNX checker refuses it: {first_line(error)}", where="check") from error


def check_codes(
    path: Path, weights: Mapping[str, QuantizedTensor], nbytes: Mapping[str, int] | None = None
) -> PackedFile:
    """Read the file back: the codes, levels and rows of every weight are those that were to be written."""
    file = open_packed(path)
    if file.weights.keys() != weights.keys():
        raise CheckFailed(f"weights {sorted(file.weights.keys() ^ weights.keys())} are missing or extra", where="check")
    for name, weight in weights.items():
        read = file.weights[name]
        if not torch.equal(read.codes, weight.codes) or not _same(read.grid, weight.grid) or read.rows != weight.rows:
            raise CheckFailed("the file holds other codes or levels", where=name)
        wanted = weight.nbytes if nbytes is None else nbytes[name]
        if file.weight_bytes[name] != wanted:
            raise CheckFailed(f"takes {file.weight_bytes[name]} bytes instead of {wanted}", where=name)
    return file


def check_size(file: PackedFile, predicted: int) -> None:
    """The file is as large as was predicted before anything was packed."""
    if abs(file.file_bytes - predicted) > SIZE_TOLERANCE * predicted + SIZE_SLACK:
        raise CheckFailed(f"the file takes {file.file_bytes} bytes where {predicted} were predicted", where="check")


def check_unpacking(
    path: Path, weights: Mapping[str, QuantizedTensor], progress: Progress = silent, rounding: Container[str] = ()
) -> None:
    """ONNX Runtime's unpacking of every weight gives the very bits of ``dequantize()``; one weight at a time.

    ``rounding``: weights of which it is float arithmetic that rounds: MatMulNBits with zero points between two codes.
    """
    calls = unpack_calls(path)
    for done, (name, turned, run) in enumerate(calls):
        progress("check unpacking", done, len(calls))
        (got,) = run()
        wanted = weights[name].dequantize()
        wanted = wanted.t() if turned else wanted
        if name in rounding:
            right = bool(np.abs(got - wanted.numpy()).max() <= ROUNDING * wanted.abs().max())
        else:
            right = np.array_equal(got.view(np.int32), wanted.contiguous().numpy().view(np.int32))
        if not right:
            raise CheckFailed("ONNX Runtime unpacks other weights than were packed", where=name)
    progress("check unpacking", len(calls), len(calls))


def unpack_calls(path: Path) -> list[tuple[str, bool, Callable[[], list[np.ndarray]]]]:
    """Calls of unpacking functions, and each MatMulNBits: the weight, whether it gives the transpose, what runs it
    alone."""
    model = onnx.load_model(path, load_external_data=False)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}

    def run(node: onnx.NodeProto) -> list[np.ndarray]:
        single = onnx.ModelProto(ir_version=model.ir_version)
        single.opset_import.extend(model.opset_import)
        single.functions.extend(function for function in model.functions if function.name == node.op_type)
        single.graph.name = "unpack"
        single.graph.node.append(node)
        single.graph.output.extend(onnx.helper.make_empty_tensor_value_info(output) for output in node.output)
        single.graph.initializer.extend(initializers[key] for key in node.input)
        onnx.external_data_helper.load_external_data_for_model(single, str(path.parent))
        outputs: list[np.ndarray] = open_session(single.SerializeToString(), optimised=True).run(None, {})
        return outputs

    def multiply(node: onnx.NodeProto) -> list[np.ndarray]:
        """``W.T``, as the product of the unit matrix: each sum has one term that is not zero."""
        inputs = next(one.i for one in node.attribute if one.name == "K")
        alone = onnx.NodeProto()
        alone.CopyFrom(node)
        alone.input[0] = "unit"
        single = onnx.ModelProto(ir_version=model.ir_version)
        single.opset_import.extend(model.opset_import)
        single.graph.name = "multiply"
        single.graph.node.append(alone)
        single.graph.input.append(onnx.helper.make_tensor_value_info("unit", onnx.TensorProto.FLOAT, ["n", inputs]))
        single.graph.output.append(onnx.helper.make_empty_tensor_value_info(alone.output[0]))
        single.graph.initializer.extend(initializers[key] for key in alone.input[1:])
        onnx.external_data_helper.load_external_data_for_model(single, str(path.parent))
        session, unit = open_session(single.SerializeToString(), optimised=True), np.eye(inputs, dtype=np.float32)
        return [np.concatenate([session.run(None, {"unit": unit[i : i + 256]})[0] for i in range(0, inputs, 256)])]

    found: list[tuple[str, bool, Callable[[], list[np.ndarray]]]] = []
    for node in model.graph.node:
        name = node.name.rsplit("/", 1)[0]
        if node.domain == DOMAIN:
            found.append((name, node.output[0].endswith("/transposed"), partial(run, node)))
        elif node.op_type == STAY_PACKED["matmulnbits"]:
            found.append((node.input[1].removesuffix("/packed"), True, partial(multiply, node)))
    return found


def drawn(where: str) -> PcqError:
    """Of a network that puts out something else in every run, so that nothing can be compared with it."""
    todo = "Take randomness out of its forward pass, or make an input of what it draws"
    return PcqError("the network puts out something else in every run", where=where, todo=todo)


def check_outputs(
    path: Path,
    reference: Callable[[Sequence[Tensor]], list[Tensor]],
    trials: Sequence[Trial],
    weights: Mapping[str, QuantizedTensor],
    progress: Progress = silent,
    packed: Mapping[str, str] | None = None,
) -> tuple[Agreement, ...]:
    """Run the file with and without graph optimisations beside the reference; look at what the optimiser left.

    Of tokens those are compared that no mask hides: what a network puts out for others, which may have nothing to look
    at, is a matter of rounding. ``packed``: weights that have to stay packed in memory -> their layouts.
    """
    agreements: list[Agreement] = []
    total = 2 * len(trials)
    expected = [[value.detach() for value in reference(trial.values)] for trial in trials]
    for trial, outputs in zip(trials, expected, strict=True):
        seen = [of_tokens(value, trial.values, trial.mask) for value in outputs]
        if not all(torch.isfinite(value).all() for value in seen if value.is_floating_point()):
            raise CheckFailed(f"torch's own outputs are not finite on {trial.inputs} inputs", where="check")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for optimised in (True, False):
            dump = Path(folder) / "optimised.onnx" if optimised else None
            session = open_session(str(path), optimised=optimised, dump=dump)
            for trial, outputs in zip(trials, expected, strict=True):
                progress("check outputs", len(agreements), total)
                error = _error(session, trial, outputs)
                agreements.append(Agreement(trial.inputs, trial.batch, optimised, error))
                if not error <= TOLERANCE:
                    if not _off(reference(trial.values), trial, outputs) <= TOLERANCE:
                        raise drawn("export")
                    raise CheckFailed(
                        f"outputs differ from torch by {error:.2g} of their scale at batch {trial.batch} on "
                        f"{trial.inputs} inputs {'with' if optimised else 'without'} graph optimisations",
                        where="check", allowed=f"up to {TOLERANCE:g}",
                    )  # fmt: skip
            del session
            if dump is not None:
                large = {name for name, weight in weights.items() if 4 * weight.numel > FOLDING_LIMIT}
                check_folded(dump, large | (packed or {}).keys())
                check_packed(dump, packed or {})
    progress("check outputs", total, total)
    return tuple(agreements)


def check_folded(dump: Path, too_large: set[str]) -> None:
    """Nothing is left of the unpacking in the graph that ONNX Runtime made of the file: it runs at float speed."""
    graph = onnx.load_model(dump, load_external_data=False)
    called = [node.name.removesuffix("/unpack") for node in graph.graph.node if node.domain == DOMAIN]
    stored = [tensor.name for tensor in graph.graph.initializer]
    left = [*called, *(name.removesuffix("/packed") for name in stored if name.endswith("/packed"))]
    for name in left:
        if name not in too_large:
            raise CheckFailed("ONNX Runtime would unpack this weight in every run", where=name)


def check_packed(dump: Path, packed: Mapping[str, str]) -> None:
    """These weights are still packed in the graph that ONNX Runtime made of the file, and read as they should be."""
    graph = onnx.load_model(dump, load_external_data=False).graph
    readers = {key: node.op_type for node in graph.node for key in node.input if key.endswith("/packed")}
    for name, layout in packed.items():
        reader = readers.get(f"{name}/packed")
        if reader != STAY_PACKED[layout]:
            raise CheckFailed(f"ONNX Runtime does not keep this weight packed for {STAY_PACKED[layout]}", where=name,
                              todo=f"found {reader or 'floats'}")  # fmt: skip


def _error(session: ort.InferenceSession, trial: Trial, expected: Sequence[Tensor]) -> float:
    feed = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), trial.values, strict=True)}
    return _off([torch.from_numpy(each) for each in session.run(None, feed)], trial, expected)


def _off(got: Sequence[Tensor], trial: Trial, expected: Sequence[Tensor]) -> float:
    """The largest difference from what is expected, relative to that output's largest value."""
    if len(got) != len(expected):
        raise CheckFailed(f"the file has {len(got)} outputs, torch {len(expected)}", where="check")
    worst = 0.0
    for ours, theirs in zip(got, expected, strict=True):
        if ours.shape != theirs.shape:
            has, gives = (tuple(each.shape) for each in (ours, theirs))
            raise CheckFailed(f"an output has shape {has}, torch gives {gives}", where="check")
        ours, theirs = (of_tokens(each, trial.values, trial.mask) for each in (ours, theirs))
        if not theirs.numel():
            continue
        right = theirs.numpy().astype(np.float64)
        error = float(np.abs(ours.numpy().astype(np.float64) - right).max())
        if np.isnan(error):
            return float("nan")
        scale = float(np.abs(right).max()) if theirs.is_floating_point() else 0.0
        worst = max(worst, error / scale if scale else (float("inf") if error else 0.0))
    return worst


def open_session(model: str | bytes, optimised: bool, dump: Path | None = None) -> ort.InferenceSession:
    """A session on the CPU.

    Raises:
        CheckFailed: ONNX Runtime does not load it.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    if dump is not None:
        options.optimized_model_filepath = str(dump)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no class of their own
        raise CheckFailed(f"ONNX Runtime does not load it: {first_line(error)}", where="check") from error


def _same(a: Grid, b: Grid) -> bool:
    """The very numbers, in the same form."""
    if isinstance(a, Affine) or isinstance(b, Affine):
        if not (isinstance(a, Affine) and isinstance(b, Affine)) or a.count != b.count:
            return False
        return _equal(a.scale, b.scale) and _equal(a.zero_point, b.zero_point)
    return _equal(a.table, b.table) and _equal(a.scale, b.scale)


def _equal(a: Tensor | float | None, b: Tensor | float | None) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
