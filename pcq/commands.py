"""What the command line does, as plain Python: each command is one call with a typed, frozen result.

``quantize(model, recipe)`` is ``run(plan(model, recipe))``: planning reads names and shapes only, running writes one
artifact.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pcq import checkpoint, models, sources
from pcq.errors import CheckFailed, PcqError, did_you_mean
from pcq.plan import Plan, Quantized, make_plan
from pcq.progress import Progress, silent
from pcq.qtensor import QuantizedTensor
from pcq.recipe import Recipe, load_recipe, shipped_recipes

if TYPE_CHECKING:
    from pcq.export import OnnxReport
    from pcq.scores import Scores

ONNX_SUFFIX = ".onnx"


@dataclass(frozen=True)
class Planned:
    """A quantization that is ready to run; nothing has been computed or written yet.

    Attributes:
        model: the file or folder the weights come from.
        source: the opened weights.
        recipe: the resolved recipe.
        plan: what will happen to each tensor, and why.
        arch: the architecture spec, if it was given or recognised.
        notes: what was found and done on the way, one sentence each.
    """

    model: Path
    source: sources.Source
    recipe: Recipe
    plan: Plan
    arch: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class LedgerRow:
    """One quantized weight: its levels in words, what it costs and what it loses.

    ``bits`` are stored bits per weight including scales and tables, ``sqnr`` is
    ``10 log10(sum w^2 / sum (w - dequantized)^2)`` in dB (``inf`` when exact).
    """

    name: str
    shape: tuple[int, ...]
    levels: str
    rows: int
    bits: float
    sqnr: float
    nbytes: int


@dataclass(frozen=True)
class QuantizeResult:
    """What :func:`run` wrote.

    Attributes:
        path: the artifact.
        planned: what was asked for.
        ledger: one row for each quantized weight.
        bytes_before: bytes of all tensors of the input.
        bytes_after: size of the artifact on disk.
        predicted: the size that was predicted before anything ran; equal to ``bytes_after``, or the run failed.
        bits: stored bits per quantized weight, scales and tables included.
        seconds: compute and writing, without imports.
    """

    path: Path
    planned: Planned
    ledger: tuple[LedgerRow, ...]
    bytes_before: int
    bytes_after: int
    predicted: int
    bits: float
    seconds: float


def plan(
    model: str | Path,
    recipe: str | Path | Recipe,
    *,
    arch: str | None = None,
    overrides: Sequence[str] = (),
    allow_globals: Sequence[str] = (),
    unsafe_pickle: bool = False,
) -> Planned:
    """Open ``model``, read ``recipe``, and settle what happens to each tensor, without reading the weights' values.

    Args:
        model: a checkpoint in any form of the README's table.
        recipe: a recipe file, the name of a shipped one, or a loaded one.
        arch: the architecture, such as ``torchvision:resnet18``; needed only where it is not recognised and a later
            step runs the network.
        overrides: ``path=value`` changes of the recipe, such as ``rules.0.levels.bits=4``.
        allow_globals: ``package.Class`` names that a pickled model may load.
        unsafe_pickle: load a pickle that can execute code. Only for files you trust.

    Raises:
        PcqError: the model, the recipe or the architecture is not usable; the message says what to do.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    source = sources.open_source(Path(model), allow_globals=allow_globals, unsafe_pickle=unsafe_pickle)
    notes = list(source.notes)
    shapes = {name: source.shape(name) for name in source.names}
    dtypes = {name: source.dtype(name) for name in source.names}
    module, spec = _architecture(source, shapes, arch, notes)
    if module is not None:  # `first` and `last` mean the network's order, not the file's
        ordered = [name for name in module.state_dict() if name in shapes]
        shapes = {name: shapes[name] for name in dict.fromkeys([*ordered, *shapes])}
    parameters = models.inventory(shapes, dtypes, module, source.tied)
    made = make_plan(loaded, parameters)
    return Planned(Path(model), source, loaded, made, spec, (*notes, *made.notes))


def _architecture(
    source: sources.Source, shapes: dict[str, tuple[int, ...]], arch: str | None, notes: list[str]
) -> tuple[nn.Module | None, str | None]:
    """The network without weights, where it is known, and its spec; what was recognised goes into ``notes``."""
    given = arch or source.arch
    if given:
        spec = models.complete(given, shapes)
        module = _skeleton(spec)
        models.check_shapes(module, shapes, spec)
        return module, spec
    if source.make_module is not None:
        return source.module(), None
    try:
        recognised = models.recognise(shapes)
    except models.Ambiguous as error:
        notes.append(f"The architecture is open: {error}")
        return None, None
    if recognised is None:
        notes.append("The architecture was not recognised; eval and export will need --arch.")
        return None, None
    notes.append(f"Recognised: {recognised.sentence}.")
    return _skeleton(recognised.arch), recognised.arch


def _skeleton(spec: str) -> nn.Module:
    """The network without memory for its weights, where it can be built so."""
    if not spec.startswith(("torchvision:", "timm:", "hf:")):
        return models.build(spec)
    try:
        with torch.device("meta"):
            return models.build(spec)
    except NotImplementedError:  # a constructor that reads values while it builds
        return models.build(spec)


def run(
    planned: Planned, out: str | Path | None = None, *, force: bool = False, progress: Progress = silent
) -> QuantizeResult:
    """Quantize as planned and write the artifact, one tensor at a time; nothing is left behind unless all went well.

    Args:
        planned: from :func:`plan`.
        out: the artifact's path; default ``<model>.<recipe>.safetensors`` beside the model.
        force: replace a file at ``out`` that pcq did not write.
        progress: called after each tensor.

    Raises:
        PcqError: a weight holds NaN or infinity, or ``out`` cannot be written.
        CheckFailed: the file on disk is not what was predicted.
    """
    path = Path(out) if out is not None else default_path(planned.model, planned.recipe.name)
    checkpoint.refuse_overwrite(path, inputs=[planned.model], force=force)
    start = time.perf_counter()
    source = planned.source
    header = checkpoint.make_header(planned.plan, arch=planned.arch, recipe=planned.recipe.to_json(), source=source)
    predicted = checkpoint.predicted_size(header)
    ledger: list[LedgerRow] = []

    def tensors() -> Iterator[tuple[str, QuantizedTensor | Tensor]]:
        for done in checkpoint.quantize_source(source, planned.plan, progress):
            if isinstance(done.entry, Quantized):
                ledger.append(ledger_row(done))
            yield done.name, done.value

    checkpoint.write_artifact(path, header, tensors())
    size = path.stat().st_size
    if size != predicted:
        path.unlink()
        raise CheckFailed(f"the artifact took {size:,} bytes where {predicted:,} were predicted", where=str(path))
    weights = sum(math.prod(row.shape) for row in ledger)
    bits = 8 * sum(row.nbytes for row in ledger) / weights if weights else 0.0
    seconds = time.perf_counter() - start
    return QuantizeResult(path, planned, tuple(ledger), source.nbytes, size, predicted, bits, seconds)


def ledger_row(done: checkpoint.Done) -> LedgerRow:
    """What one weight costs and loses."""
    entry, value = done.entry, done.value
    assert isinstance(entry, Quantized), entry
    assert isinstance(value, QuantizedTensor), entry
    lossy = done.noise > 0 and done.signal > 0
    return LedgerRow(
        done.name,
        entry.parameter.shape,
        entry.text,
        entry.rows.g,
        8 * value.nbytes / value.numel,
        10 * math.log10(done.signal / done.noise) if lossy else math.inf,
        value.nbytes,
    )


def default_path(model: Path, recipe: str) -> Path:
    """``model.pt`` with recipe ``ternary`` -> ``model.ternary.safetensors`` beside it."""
    name = model.name
    for suffix in (".json", ".index", ".safetensors", ".pt2", ".pt", ".pth", ".bin", ".ckpt"):
        name = name.removesuffix(suffix)
    return model.parent / f"{name or 'model'}.{recipe}.safetensors"


def quantize(
    model: str | Path,
    recipe: str | Path | Recipe,
    *,
    out: str | Path | None = None,
    arch: str | None = None,
    overrides: Sequence[str] = (),
    allow_globals: Sequence[str] = (),
    unsafe_pickle: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> QuantizeResult:
    """One-shot quantization of a checkpoint to an artifact: :func:`plan`, then :func:`run`, with their arguments."""
    planned = plan(
        model, recipe, arch=arch, overrides=overrides, allow_globals=allow_globals, unsafe_pickle=unsafe_pickle
    )
    return run(planned, out, force=force, progress=progress)


@dataclass(frozen=True)
class ExportResult:
    """What :func:`export_onnx` wrote: the ONNX file, and the proof it passed (see ``pcq.export``)."""

    path: Path
    artifact: Path
    arch: str
    report: "OnnxReport"


def export_onnx(
    artifact: str | Path,
    out: str | Path | None = None,
    *,
    arch: str | None = None,
    input_shape: Sequence[int] | None = None,
    target_ort: str = "1.17",
    force: bool = False,
    progress: Progress = silent,
) -> ExportResult:
    """Turn an artifact into ONNX whose weights stay packed, and prove that the file computes what torch computes.

    Args:
        artifact: a file that :func:`quantize` wrote.
        out: the ONNX file; default: the artifact's name with ``.onnx``.
        arch: the architecture, where the artifact does not record it.
        input_shape: one sample's shape without the batch, such as ``(3, 224, 224)``; default: what the architecture
            is made for.
        target_ort: the oldest ONNX Runtime that must run the file.
        force: replace a file at ``out`` that pcq did not write.
        progress: called at each stage.

    Raises:
        PcqError: the artifact, the architecture or the target is not usable.
        CheckFailed: the exported file is not bit-exact, does not agree with torch, or has not the size predicted.
    """
    from pcq.export import write_onnx

    source = Path(artifact)
    path = Path(out) if out is not None else source.with_suffix(ONNX_SUFFIX)
    checkpoint.refuse_overwrite(path, inputs=[source], force=force)
    if source.is_file() and source.suffix != ".safetensors" and not checkpoint.is_artifact(source):
        raise PcqError("this is not an artifact of pcq", where=str(source), todo="Make one first with `pcq quantize`")
    stored = checkpoint.read_artifact(source)
    network = load_network(stored, source, arch)
    shape = tuple(input_shape) if input_shape else network.input_shape
    if shape is None:
        raise PcqError(
            f"the input shape of {network.arch} is not known",
            where=str(source),
            todo="Give one sample's shape without the batch, such as --input 3x224x224",
        )
    report = write_onnx(
        network.module,
        stored.quantized,
        (torch.zeros(1, *shape),),
        path,
        metadata={"recipe": json.dumps(stored.recipe), "arch": network.arch, "source": source.name},
        tied=stored.tied,
        target_ort=target_ort,
        progress=progress,
    )
    return ExportResult(path, source, network.arch, report)


@dataclass(frozen=True)
class Network:
    """A network with its weights, ready to run: ``module`` in eval mode, its spec, one sample's shape if known."""

    module: nn.Module
    arch: str
    input_shape: tuple[int, ...] | None


def load_network(stored: "checkpoint.Artifact", path: Path, arch: str | None = None) -> Network:
    """Build the artifact's architecture (or ``arch``) and load its dequantized weights.

    Raises:
        PcqError: no architecture is recorded or given, or the weights do not fit it.
    """
    if arch is None and stored.program is not None:
        return Network(stored.program_module(), "the exported program", None)
    spec = arch or stored.arch
    if spec is None:
        raise PcqError(
            "the artifact does not record an architecture",
            where=str(path),
            todo="Name it: --arch torchvision:resnet18, --arch timm:NAME, or --arch file.py:function",
        )
    module = models.build(spec)
    models.load_state(module, stored.state_dict(), spec)
    return Network(module.eval(), spec, models.example_shape(spec))


@dataclass(frozen=True)
class EvalResult:
    """Scores of one network on one data set (percent); see ``pcq.scores.Scores``."""

    path: Path
    data: str
    runtime: str
    scores: "Scores"


def evaluate(
    path: str | Path,
    data: str,
    *,
    arch: str | None = None,
    reference: str | Path | None = None,
    split: str = "test",
    batch: int = 256,
    limit: int | None = None,
    allow_globals: Sequence[str] = (),
    unsafe_pickle: bool = False,
    progress: Progress = silent,
) -> EvalResult:
    """Score a float checkpoint, an artifact, or an ONNX file (through ONNX Runtime) on a data spec.

    Args:
        path: what to score.
        data: a data spec, such as ``digits`` or ``folder:DIR``; see ``pcq.data``.
        arch: the architecture, where it is neither recorded nor recognised.
        reference: a float checkpoint; agreement (equal top-1) with it is reported, and is all there is to report
            where the data has no labels.
        split: ``test``, ``val`` or ``train``.
        batch: samples per batch; the scores do not depend on it.
        limit: stop after so many samples.

    Raises:
        PcqError: the file, the architecture or the data is not usable.
    """
    from pcq.data import open_data
    from pcq.scores import evaluate as score

    opened = open_data(data, split)
    predict, runtime = _predictor(Path(path), arch, allow_globals, unsafe_pickle)
    compared = None
    if reference is not None:
        compared, _ = _predictor(Path(reference), arch, allow_globals, unsafe_pickle)
    scores = score(predict, opened, reference=compared, batch=batch, limit=limit, progress=progress)
    return EvalResult(Path(path), opened.describe(), runtime, scores)


def _predictor(
    path: Path, arch: str | None, allow_globals: Sequence[str], unsafe_pickle: bool
) -> "tuple[Callable[[Tensor], Tensor], str]":
    """What runs the file, and in which runtime."""
    from pcq.scores import module_predictor, onnx_predictor

    if path.suffix == ONNX_SUFFIX:
        return onnx_predictor(path), "ONNX Runtime"
    network = open_network(path, arch, allow_globals=allow_globals, unsafe_pickle=unsafe_pickle)
    return module_predictor(network.module), "torch"


def open_network(
    path: str | Path, arch: str | None = None, *, allow_globals: Sequence[str] = (), unsafe_pickle: bool = False
) -> Network:
    """The network in a float checkpoint or an artifact, with its weights loaded, in eval mode.

    Raises:
        PcqError: the architecture is not known, or the weights do not fit it.
    """
    path = Path(path)
    if checkpoint.is_artifact(path):
        return load_network(checkpoint.read_artifact(path), path, arch)
    source = sources.open_source(path, allow_globals=allow_globals, unsafe_pickle=unsafe_pickle)
    ready = source.module() if arch is None else None
    if ready is not None:
        return Network(ready, str(path), None)
    shapes = {name: source.shape(name) for name in source.names}
    spec = arch or source.arch
    if spec is None:
        recognised = models.recognise(shapes)
        if recognised is None:
            raise PcqError(
                "the architecture was not recognised",
                where=str(path),
                todo="Name it: --arch torchvision:resnet18, --arch timm:NAME, or --arch file.py:function",
            )
        spec = recognised.arch
    spec = models.complete(spec, shapes)
    module = models.build(spec)
    models.load_state(module, {name: source.tensor(name) for name in source.names}, spec)
    return Network(module.eval(), spec, models.example_shape(spec))


@dataclass(frozen=True)
class TensorView:
    """One tensor of an inspected file: its levels in words (or its dtype) and what it takes there."""

    name: str
    shape: tuple[int, ...]
    form: str
    bits: float
    nbytes: int


@dataclass(frozen=True)
class FileView:
    """What :func:`inspect` found in a checkpoint, an artifact or an ONNX file.

    Attributes:
        path: the file.
        kind: what it is, in words.
        facts: further findings, label and value.
        tensors: one row a tensor.
        nbytes: size on disk (of all its files).
    """

    path: Path
    kind: str
    facts: tuple[tuple[str, str], ...]
    tensors: tuple[TensorView, ...]
    nbytes: int


@dataclass(frozen=True)
class RecipeView:
    """A recipe without a mistake in it, as resolved; with a model, also the plan for it."""

    path: str
    recipe: Recipe
    planned: Planned | None


def inspect(
    path: str | Path, *, allow_globals: Sequence[str] = (), unsafe_pickle: bool = False
) -> "FileView | RecipeView":
    """Say what a file is: a checkpoint, an artifact, a recipe or an ONNX file.

    Raises:
        PcqError: the file is none of these, or is damaged.
    """
    path = Path(path)
    if path.suffix in (".yaml", ".yml"):
        return check(str(path))
    if path.suffix == ONNX_SUFFIX:
        return _inspect_onnx(path)
    if checkpoint.is_artifact(path):
        return _inspect_artifact(path)
    source = sources.open_source(path, allow_globals=allow_globals, unsafe_pickle=unsafe_pickle)
    shapes = {name: source.shape(name) for name in source.names}
    notes = list(source.notes)
    _, arch = _architecture(source, shapes, None, notes)
    facts = [("architecture", arch or "not recognised"), *(("note", note) for note in notes)]
    facts += [("tied", f"{name} is {owner}") for name, owner in source.tied.items()]
    rows = tuple(_float_view(name, shapes[name], source.dtype(name)) for name in source.names)
    return FileView(path, "float checkpoint", tuple(facts), rows, source.nbytes)


def _float_view(name: str, shape: tuple[int, ...], dtype: str) -> TensorView:
    bits = 8 * getattr(torch, dtype).itemsize
    return TensorView(name, shape, dtype, bits, math.prod(shape) * bits // 8)


def _quantized_view(name: str, stored: QuantizedTensor, text: str = "") -> TensorView:
    words = text or f"{stored.grid.count} levels"
    bits = 8 * stored.nbytes / max(1, stored.numel)
    return TensorView(name, stored.rows.shape, f"{words}, {stored.grid.g:,} rows", bits, stored.nbytes)


def _inspect_artifact(path: Path) -> FileView:
    stored = checkpoint.read_artifact(path)
    facts = [
        ("architecture", stored.arch or ("an exported program" if stored.program is not None else "not recorded")),
        ("recipe", str(stored.recipe.get("name", ""))),
        *((f"{name} version", version) for name, version in stored.versions.items()),
        *(("tied", f"{name} is {owner}") for name, owner in stored.tied.items()),
    ]
    rows = [_quantized_view(name, tensor, stored.texts[name]) for name, tensor in stored.quantized.items()]
    rows += [
        _float_view(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in stored.floats.items()
    ]
    return FileView(path, "pcq artifact", tuple(facts), tuple(rows), path.stat().st_size)


def _inspect_onnx(path: Path) -> FileView:
    from pcq.export import open_packed

    packed = open_packed(path)
    facts = [
        ("opset", str(packed.opset)),
        ("IR version", str(packed.ir_version)),
        ("unpacking functions", ", ".join(packed.functions)),
        ("bits per packed weight", f"{packed.bits_per_weight:.3f}"),
        ("other tensors", f"{packed.float_bytes:,} bytes"),
        *((key, value) for key, value in packed.metadata.items() if key != "pcq.scheme" and len(value) < 200),
    ]
    rows = tuple(_quantized_view(name, tensor) for name, tensor in packed.weights.items())
    return FileView(path, "packed ONNX", tuple(facts), rows, packed.file_bytes)


def check(
    recipe: str | Path,
    model: str | Path | None = None,
    *,
    arch: str | None = None,
    overrides: Sequence[str] = (),
    allow_globals: Sequence[str] = (),
    unsafe_pickle: bool = False,
) -> RecipeView:
    """Read a recipe strictly and, with a model, settle what each rule matches there.

    Raises:
        PcqError: every mistake in the recipe, each with its line.
    """
    loaded = load_recipe(recipe, overrides)
    if model is None:
        return RecipeView(str(recipe), loaded, None)
    planned = plan(model, loaded, arch=arch, allow_globals=allow_globals, unsafe_pickle=unsafe_pickle)
    return RecipeView(str(recipe), loaded, planned)


@dataclass(frozen=True)
class Shipped:
    """The recipes that come with pcq: name and first line of its comment."""

    recipes: tuple[tuple[str, str], ...]


def recipes() -> Shipped:
    """The shipped recipes, by name."""
    return Shipped(tuple((each.name, each.summary) for each in shipped_recipes()))


@dataclass(frozen=True)
class ProxPlot:
    """A plotted proximal map."""

    path: Path
    prox: str
    levels: tuple[float, ...]


def plot_prox(kind: str, levels: str | Sequence[float] = (-1.0, 0.0, 1.0), out: str | Path | None = None) -> ProxPlot:
    """Draw a proximal map at several strengths, as Figure 1 of arXiv 2110.13220 does, to a PNG.

    Raises:
        PcqError: an unknown map, or levels that are not two or more different numbers.
    """
    from pcq import plots, prox

    kinds: dict[str, prox.Prox] = {
        "hard": prox.Hard(),
        "proxquant": prox.ProxQuant(),
        "binaryrelax": prox.BinaryRelax(),
        "parq": prox.Parq(),
    }
    if kind not in kinds:
        raise PcqError(
            f"there is no proximal map '{kind}'",
            where="--prox",
            allowed=", ".join(kinds),
            todo=did_you_mean(kind, kinds),
        )
    try:
        values = [float(part) for part in levels.split(",")] if isinstance(levels, str) else [float(q) for q in levels]
    except ValueError:
        values = []
    if len(set(values)) < 2 or not all(math.isfinite(q) for q in values):
        raise PcqError(f"'{levels}' are not levels", where="--levels", allowed="two or more numbers, such as -1,0,1")
    ascending = tuple(sorted(set(values)))
    path = Path(out) if out is not None else Path(f"prox-{kind}.png")
    picture = plots.prox_figure(kinds[kind], ascending)
    with checkpoint.atomic(path) as draft:
        draft.write_bytes(picture)
    return ProxPlot(path, kind, ascending)
