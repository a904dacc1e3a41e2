"""Proof that a packed ONNX file is right, made on the file as it was written. Whatever is off is a CheckFailed."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx.checker
import onnxruntime as ort
import torch
from torch import Tensor

from pcq.errors import CheckFailed
from pcq.export.body import DOMAIN
from pcq.export.reading import PackedFile, open_packed
from pcq.grids import Affine, Grid
from pcq.progress import Progress, silent
from pcq.qtensor import QuantizedTensor

TOLERANCE = 1e-4
"""Largest error of an output, relative to the largest absolute value of that output in torch."""

SIZE_TOLERANCE, SIZE_SLACK = 0.05, 16384
"""A file may differ from its predicted size by 5 % and 16 KiB; its packed weights not by a byte."""

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
class Trial:
    """Inputs to run both sides on, in the graph's order."""

    inputs: str
    values: tuple[Tensor, ...]

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
) -> tuple[PackedFile, tuple[Agreement, ...]]:
    """All checks of this module, the cheap ones first.

    Args:
        path: the file.
        weights: what has to be packed in it.
        predicted: its size.
        reference: what it has to compute: inputs -> outputs, both in the graph's order.
        trials: what to run both on.

    Raises:
        CheckFailed: the file is not right.
    """
    progress("check codes", 0, 1)
    check_form(path)
    file = check_codes(path, weights)
    check_size(file, predicted)
    check_unpacking(path, weights, progress)
    return file, check_outputs(path, reference, trials, weights, progress)


def check_form(path: Path) -> None:
    """The ONNX checker with full shape inference. (It says nothing about whether ONNX Runtime has the kernels.)"""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckFailed(f"the ONNX checker refuses it: {_first_line(error)}", where="check") from error


def check_codes(path: Path, weights: Mapping[str, QuantizedTensor]) -> PackedFile:
    """Read the file back: the codes, levels and rows of every weight are those that were to be written."""
    file = open_packed(path)
    if file.weights.keys() != weights.keys():
        raise CheckFailed(f"weights {sorted(file.weights.keys() ^ weights.keys())} are missing or extra", where="check")
    for name, weight in weights.items():
        read = file.weights[name]
        if not torch.equal(read.codes, weight.codes) or not _same(read.grid, weight.grid) or read.rows != weight.rows:
            raise CheckFailed("the file holds other codes or levels", where=name)
        if file.weight_bytes[name] != weight.nbytes:
            raise CheckFailed(f"takes {file.weight_bytes[name]} bytes instead of {weight.nbytes}", where=name)
    return file


def check_size(file: PackedFile, predicted: int) -> None:
    """The file is as large as was predicted before anything was packed."""
    if abs(file.file_bytes - predicted) > SIZE_TOLERANCE * predicted + SIZE_SLACK:
        raise CheckFailed(f"the file takes {file.file_bytes} bytes where {predicted} were predicted", where="check")


def check_unpacking(path: Path, weights: Mapping[str, QuantizedTensor], progress: Progress = silent) -> None:
    """ONNX Runtime's unpacking of every weight gives the very bits of ``dequantize()``; one weight at a time."""
    calls = unpack_calls(path)
    for done, (name, turned, run) in enumerate(calls):
        progress("check unpacking", done, len(calls))
        (got,) = run()
        wanted = weights[name].dequantize()
        wanted = wanted.t() if turned else wanted
        if not np.array_equal(got.view(np.int32), wanted.contiguous().numpy().view(np.int32)):
            raise CheckFailed("ONNX Runtime unpacks other weights than were packed", where=name)
    progress("check unpacking", len(calls), len(calls))


def unpack_calls(path: Path) -> list[tuple[str, bool, Callable[[], list[np.ndarray]]]]:
    """Each call of an unpacking function: its weight, whether it gives the transpose, and what runs it alone."""
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

    calls = [node for node in model.graph.node if node.domain == DOMAIN]
    return [(node.name.rsplit("/", 1)[0], node.output[0].endswith("/transposed"), partial(run, node)) for node in calls]


def check_outputs(
    path: Path,
    reference: Callable[[Sequence[Tensor]], list[Tensor]],
    trials: Sequence[Trial],
    weights: Mapping[str, QuantizedTensor],
    progress: Progress = silent,
) -> tuple[Agreement, ...]:
    """Run the file with and without graph optimisations beside the reference; look at what the optimiser left."""
    agreements: list[Agreement] = []
    total = 2 * len(trials)
    expected = [[value.detach() for value in reference(trial.values)] for trial in trials]
    for trial, outputs in zip(trials, expected, strict=True):
        if not all(torch.isfinite(value).all() for value in outputs if value.is_floating_point()):
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
                    raise CheckFailed(
                        f"outputs differ from torch by {error:.2g} of their scale at batch {trial.batch} on "
                        f"{trial.inputs} inputs {'with' if optimised else 'without'} graph optimisations",
                        where="check", allowed=f"up to {TOLERANCE:g}",
                    )  # fmt: skip
            del session
            if dump is not None:
                check_folded(dump, {name for name, weight in weights.items() if 4 * weight.numel > FOLDING_LIMIT})
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


def _error(session: ort.InferenceSession, trial: Trial, expected: Sequence[Tensor]) -> float:
    feed = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), trial.values, strict=True)}
    got = session.run(None, feed)
    if len(got) != len(expected):
        raise CheckFailed(f"the file has {len(got)} outputs, torch {len(expected)}", where="check")
    worst = 0.0
    for ours, theirs in zip(got, expected, strict=True):
        if ours.shape != tuple(theirs.shape):
            raise CheckFailed(f"an output has shape {ours.shape}, torch gives {tuple(theirs.shape)}", where="check")
        if not theirs.numel():
            continue
        right = theirs.numpy().astype(np.float64)
        error = float(np.abs(ours.astype(np.float64) - right).max())
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
    options.log_severity_level = 3
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
        raise CheckFailed(f"ONNX Runtime does not load it: {_first_line(error)}", where="check") from error


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


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
