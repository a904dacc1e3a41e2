"""What a file is; what a recipe says; how a proximal map looks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pcq import checkpoint, sources
from pcq.commands.networks import ONNX_SUFFIX, architecture
from pcq.commands.quantizing import Planned, plan
from pcq.errors import PcqError, did_you_mean
from pcq.qtensor import QuantizedTensor
from pcq.recipe import Recipe, load_recipe, shipped_recipes


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
    _, arch = architecture(source, shapes, None, notes)
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
    from pcq.export import is_packed, open_packed

    if not is_packed(path):
        return _inspect_float_onnx(path)
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


def _inspect_float_onnx(path: Path) -> FileView:
    """What `pcq quantize` finds in an ONNX model that pcq did not pack: weights, then what it would leave float."""
    from pcq import onnx_input

    opened = onnx_input.open_graph(path)
    inventory = onnx_input.take_inventory(opened)
    graph = opened.model.graph
    facts = [
        ("opset", str(opened.opset)),
        ("IR version", str(opened.ir_version)),
        ("inputs", ", ".join(f"{value.name} {value.shape}" for value in graph.inputs)),
        ("outputs", ", ".join(f"{value.name} {value.shape}" for value in graph.outputs)),
        *((f"note {i + 1}", f"`pcq quantize` would do this: {note}") for i, note in enumerate(opened.notes)),
    ]
    rows = [(weight.parameter, weight.parameter.kind) for weight in inventory.weights.values()]
    views = [_float_view(each.name, each.shape, each.dtype) for each, _ in (*rows, *inventory.others)]
    words = [words for _, words in (*rows, *inventory.others)]
    named = tuple(replace(view, form=f"{view.form}, {said}") for view, said in zip(views, words, strict=True))
    return FileView(path, "float ONNX", tuple(facts), named, opened.file_bytes)


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
