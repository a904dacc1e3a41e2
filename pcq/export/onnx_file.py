"""Export: trace, pack, optimise, write, prove; only a file that passed everything gets its name."""

import importlib.metadata
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from pcq.data.inputs import hides_tokens, named_mask, resized
from pcq.errors import PcqError, did_you_mean, raise_all
from pcq.export import norms, passes, scheme, verify, writing
from pcq.export.facts import Target, target
from pcq.export.layouts import Aim, Choice, Layout, Level, Plan, plan, refuse, smallest
from pcq.export.nbits import OPERATOR
from pcq.export.tracing import Example, Traced, hushed, tensors_of, trace
from pcq.progress import Progress, silent
from pcq.qtensor import QuantizedTensor


@dataclass(frozen=True)
class OnnxTensor:
    """One packed weight in the file: ``function`` unpacks it or multiplies by it; ``nbytes`` with scales, zero points
    and levels; why it has its ``layout``."""

    name: str
    shape: tuple[int, ...]
    function: str
    transposed: bool
    nbytes: int
    bits: float
    layout: Layout = "exact"
    reason: str = ""


@dataclass(frozen=True)
class OnnxReport:
    """What was written and how it was proved.

    Attributes:
        path: the file.
        data_path: its external data, for models above 2 GB.
        nbytes: the size of the file, with its external data.
        predicted: the size that was predicted before packing.
        float_bytes: what all initializers take in the unpacked network.
        bits_per_weight: of the packed weights, with scales, zero points and levels, measured on the file.
        tensors: the packed weights.
        unused: quantized weights that the network's forward does not use; they are not in the file.
        shared: weights equal to another one, which stands for both: name -> the other's name.
        folded: weights whose scales have taken in the BatchNorm behind them.
        agreements: the runs beside torch.
        dynamic_batch: whether the file takes any number of samples.
        dynamic_length: whether it takes samples of other sizes, such as tokens of any length; it was tried on some.
        opset, ir_version, target_ort: what the file is written for.
        ort_version: the ONNX Runtime it was tried in.
        resident: predicted bytes of all tensors in memory while the network runs.
        transient: predicted bytes that a run takes for a moment to unpack its largest weight.
        loading: predicted bytes that loading takes for a moment.
        load: how long loading takes, in words.
        level4: where MatMulNBits may round activations to int8: how far the outputs are from torch's, ``|y - y0| /
            |y0|`` and as ``error``, in this ONNX Runtime; ``agreements`` are then of the same file in float32.
        seconds: in all.
    """

    path: Path
    data_path: Path | None
    nbytes: int
    predicted: int
    float_bytes: int
    bits_per_weight: float
    tensors: tuple[OnnxTensor, ...]
    unused: tuple[str, ...]
    shared: dict[str, str]
    agreements: tuple[verify.Agreement, ...]
    dynamic_batch: bool
    dynamic_length: bool
    opset: int
    ir_version: int
    target_ort: str
    ort_version: str
    seconds: float
    resident: int = 0
    transient: int = 0
    loading: int = 0
    load: str = ""
    level4: verify.Rounded | None = None
    folded: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """The largest error of all runs, relative to the outputs' scale."""
        return max(agreement.error for agreement in self.agreements)


def write_onnx(
    network: nn.Module | ExportedProgram,
    weights: Mapping[str, QuantizedTensor],
    example: Example | None,
    out: Path | str,
    *,
    metadata: Mapping[str, str] | None = None,
    tied: Mapping[str, str] | None = None,
    samples: Sequence[Sequence[Tensor]] = (),
    target_ort: str = "1.17",
    layout: Layout = "exact",
    aim: Aim | None = None,
    level: Level = 4,
    fold: bool = True,
    external_above: int = writing.EXTERNAL_ABOVE,
    progress: Progress = silent,
) -> OnnxReport:
    """Write ``network`` as ONNX with ``weights`` packed, and prove the file.

    Args:
        network: in eval mode, holding the dequantized weights in float32.
        weights: by parameter name.
        example: one tensor for each input, positional or by name; None: the exported program's own. Every input whose
            first dimension is as long as the first input's is taken to be batched.
        out: the file.
        metadata: more for the file's metadata, each under ``pcq.<key>``, such as ``recipe``.
        tied: names that stand for another parameter; recorded in the metadata.
        samples: real inputs to compare on besides random ones, each one tensor per input.
        target_ort: the oldest ONNX Runtime that has to run the file.
        layout: how weights lie in the file where that serves; see :mod:`pcq.export.layouts`.
        aim: choose a layout for each weight instead, for ``size``, ``speed`` or ``ram``.
        level: accuracy level of MatMulNBits in layout ``matmulnbits``: 1 computes in float32, 4 with activations
            rounded to int8 where a runtime can.
        fold: take BatchNorm behind a packed weight into its scales and a bias (:mod:`pcq.export.norms`); the file then
            holds those scales. Leave it out for a file that :func:`pcq.export.write_int8` is to read.
        external_above: bytes of initializers beyond which they get a file of their own beside ``out``.
        progress: called at each stage.

    Raises:
        PcqError: the network, the weights or the target are not usable.
        CheckFailed: the file is not right; nothing was written.
    """
    start, out = time.perf_counter(), Path(out)
    goal = target(target_ort)
    with writing.draft(out):  # to say so now rather than after the work
        pass
    _check_weights(network, weights)
    refuse(weights, goal, layout, level)
    progress("trace", 0, 1)
    traced = trace(network, example, goal.opset)
    wanted = _Wanted(goal, layout, aim, level, fold)
    packing = _pack(traced, weights, wanted, {**(metadata or {})}, dict(tied or {}), progress)
    kept = packing.weights
    trials = _trials(traced, samples)
    with writing.draft(out) as path:
        progress("write", 0, 1)
        data = writing.save(traced.model, path, external_above)
        file, agreements = verify.prove(path, kept, packing.predicted, traced.run, trials, progress, packing.nbytes)
        level4 = verify.rounded(path, traced.run, trials) if verify.rounds(path) else None
        data = writing.commit(path, data, out)
    return OnnxReport(
        path=out, data_path=data, nbytes=file.file_bytes, predicted=packing.predicted,
        float_bytes=packing.float_bytes, bits_per_weight=file.bits_per_weight,
        tensors=tuple(
            OnnxTensor(name, weight.rows.shape, file.schemes[name].function, file.schemes[name].transposed,
                       file.weight_bytes[name], 8 * file.weight_bytes[name] / weight.numel,
                       packing.choices[name].layout, packing.choices[name].reason)
            for name, weight in kept.items()
        ),
        unused=packing.unused, shared=packing.shared, agreements=agreements, dynamic_batch=any(traced.batched),
        dynamic_length=any(traced.others),
        opset=file.opset, ir_version=file.ir_version, target_ort=goal.ort, ort_version=onnxruntime.__version__,
        seconds=time.perf_counter() - start, resident=packing.plan.resident + file.float_bytes,
        transient=packing.plan.transient, loading=packing.plan.loading, load=packing.plan.load, level4=level4,
        folded=packing.folded,
    )  # fmt: skip


def _check_weights(network: nn.Module | ExportedProgram, weights: Mapping[str, QuantizedTensor]) -> None:
    """Every weight is a parameter of the network, in float32, and has the values that its codes stand for."""
    problems, tensors = [], tensors_of(network)
    program = isinstance(network, ExportedProgram | torch.fx.GraphModule)
    wide = "Export the program again from model.float()" if program else "Call .float()"
    if not weights:
        problems.append(PcqError("there are no quantized weights", where="export", todo="Quantize the network first"))
    for name, weight in weights.items():
        tensor = tensors.get(name)
        if tensor is None:
            hint = did_you_mean(name, tensors)
            problems.append(PcqError("the network has no such parameter", where=name, todo=hint))
        elif tensor.dtype != torch.float32:
            kind = str(tensor.dtype).removeprefix("torch.")
            problems.append(PcqError(f"the network holds it in {kind}", where=name, allowed="float32", todo=wide))
        elif tuple(tensor.shape) != weight.rows.shape:
            problems.append(
                PcqError(
                    f"has shape {list(tensor.shape)} in the network and {list(weight.rows.shape)} in its codes",
                    where=name,
                )
            )
        elif not torch.equal(tensor.detach(), weight.dequantize()):
            problems.append(PcqError("the network holds other values than the codes stand for", where=name,
                                     todo="Load the dequantized weights into it first"))  # fmt: skip
    raise_all(problems)


@dataclass(frozen=True)
class _Wanted:
    goal: Target
    layout: Layout
    aim: Aim | None
    level: Level
    fold: bool


@dataclass(frozen=True)
class _Packing:
    weights: dict[str, QuantizedTensor]
    folded: tuple[str, ...]
    unused: tuple[str, ...]
    shared: dict[str, str]
    predicted: int
    float_bytes: int
    plan: Plan

    @property
    def choices(self) -> dict[str, Choice]:
        return {choice.name: choice for choice in self.plan.choices}

    @property
    def nbytes(self) -> dict[str, int]:
        return {choice.name: choice.nbytes for choice in self.plan.choices}


def _pack(
    traced: Traced,
    weights: Mapping[str, QuantizedTensor],
    wanted: _Wanted,
    metadata: dict[str, str],
    tied: dict[str, str],
    progress: Progress,
) -> _Packing:
    """Pack the weights into ``traced.model``, optimise it, and predict the file's size from the unpacked graph."""
    model = traced.model
    float_bytes = sum(_size(value) for value in model.graph.initializers.values())
    found = passes.find(model, weights)
    shared, unused = {}, []
    for name, held in found.items():
        if held:
            continue
        twin = next((other for other in found if found[other] and _equal_values(weights[name], weights[other])), None)
        if name not in traced.used:
            unused.append(name)
        elif twin is not None:
            shared[name] = twin
        else:
            raise PcqError("torch changed this weight while exporting, so it cannot be packed", where=name,
                           todo="Keep it in float: a rule with `keep`")  # fmt: skip
    placed: list[passes.Placed] = []
    for name, held in found.items():
        progress("pack", len(placed), len(weights))
        one = passes.pack(model, name, weights[name], held) if held else None
        if one is not None:
            placed.append(one)
    progress("optimise", 0, 1)
    passes.split_products(model)
    with hushed():
        passes.optimise(model)
    folded = norms.fold(model, weights) if wanted.fold else {}
    weights, left = {**weights, **folded}, passes.distinct_bytes(model)
    needs = passes.needs(model, weights, placed)
    names = tuple(need.name for need in needs)
    unused += [name for name in weights if name not in names and name not in shared and name not in unused]
    entries = {"version": importlib.metadata.version("pcq"), **metadata}
    if tied or shared:
        entries["tied"] = json.dumps({**tied, **shared})
    if wanted.aim is not None or wanted.layout != "exact":
        entries["mode"] = wanted.layout if wanted.aim is None else f"optimized for {wanted.aim}"
    said = {f"pcq.{key}": value for key, value in entries.items()}
    if folded:
        said[scheme.FOLDED] = json.dumps([*folded])
    if usual := _usual(traced):
        said[scheme.USUAL] = json.dumps(usual)

    def laid_out(made: Plan) -> tuple[list[passes.Packed], dict[str, str], int]:
        """The packed weights of a plan, the file's metadata, and its size."""
        packed = passes.lay_out(model, weights, placed, made)
        properties = {**said, scheme.KEY: scheme.to_json(_schemes(weights, packed, made))}
        described = sum(len(key) + len(value.encode()) + 12 for key, value in properties.items())
        return packed, properties, left + made.nbytes + passes.structure_bytes(model, packed) + described

    if wanted.aim == "size":
        made = smallest(needs, wanted.goal, lambda one: laid_out(one)[-1])
    else:
        made = plan(needs, wanted.goal, wanted.layout, wanted.aim, wanted.level)
    packed, properties, predicted = laid_out(made)
    passes.fill(model, packed)
    passes.finish(model, made.ir_version, entries["version"], properties)
    return _Packing(
        {name: weights[name] for name in names}, tuple(folded), tuple(unused), shared, predicted, float_bytes, made
    )


def _schemes(
    weights: Mapping[str, QuantizedTensor], packed: Sequence[passes.Packed], made: Plan
) -> dict[str, scheme.Scheme]:
    """What the file says of each weight; one that is not among ``packed`` is read by MatMulNBits."""
    filled = {one.name: one for one in packed}
    return {
        choice.name: scheme.describe(
            weights[choice.name],
            filled[choice.name].lowered.function.name if choice.name in filled else OPERATOR,
            choice.name in filled and filled[choice.name].transposed,
            choice.layout,
            choice.stored,
        )
        for choice in made.choices
    }


def _equal_values(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    return a.rows.shape == b.rows.shape and torch.equal(a.dequantize(), b.dequantize())


def _size(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes


def _usual(traced: Traced) -> dict[str, list[int]]:
    """A sample's sizes in the example, by input, of those that take other sizes as well."""
    inputs = zip(traced.model.graph.inputs, traced.example, strict=True)
    return {
        value.name or "": [*example.shape[1:]]
        for value, example in inputs
        if value.shape is not None and not all(isinstance(size, int) for size in value.shape[1:])
    }


def _trials(traced: Traced, samples: Sequence[Sequence[Tensor]]) -> list[verify.Trial]:
    """Random inputs at two batch sizes (one, if it is fixed), of two sizes if these are open, and samples."""
    any_ = any(traced.batched)
    batches: list[int | None] = [traced.smallest_batch, traced.smallest_batch + 2] if any_ else [None]
    batches += [None] * (not any_ and any(traced.others))
    generator = torch.Generator().manual_seed(0)
    names = [value.name or "" for value in traced.model.graph.inputs]
    examples = [traced.example, resized(names, traced.example, traced.others)]
    trials = [
        verify.Trial("random", tuple(
            _random(leaf, batch if moves else None, generator, whole=hides_tokens(name))
            for name, leaf, moves in zip(names, example, traced.batched, strict=True)
        ), named_mask(names, example))
        for batch, example in zip(batches, examples, strict=False)
    ]  # fmt: skip
    if None in batches:  # as many as it takes
        samples = [[x[: len(one)] for x, one in zip(sample, traced.example, strict=True)] for sample in samples]
    return trials + [verify.Trial("sample", tuple(sample), named_mask(names, sample)) for sample in samples]


def _random(example: Tensor, batch: int | None, generator: torch.Generator, whole: bool) -> Tensor:
    """Normal numbers, or for integers and booleans the example's own values in random places.

    ``whole``: the example's own samples. A mask in random places may leave a causal network nothing to look at, and
    what it puts out there is no more than a matter of rounding.
    """
    shape = example.shape if batch is None else (batch, *example.shape[1:])
    if example.is_floating_point():
        return torch.randn(shape, generator=generator, dtype=example.dtype)
    if whole and example.ndim:
        return example if batch is None else example[torch.randint(len(example), (batch,), generator=generator)]
    flat = example.reshape(-1)
    return flat[torch.randint(flat.numel(), tuple(shape), generator=generator)]
