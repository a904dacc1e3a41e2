"""What a file is; what a recipe says; how a proximal map looks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pcq import checkpoint, sources
from pcq.commands.networks import ONNX_SUFFIX, architecture
from pcq.commands.quantizing import Planned, plan
from pcq.commands.views import FileView, float_view, quantized_view
from pcq.errors import PcqError, did_you_mean
from pcq.recipe import Recipe, load_recipe, shipped_recipes


@dataclass(frozen=True)
class RecipeView:
    """A recipe without a mistake in it, as resolved; with a model, also the plan for it."""

    path: str
    recipe: Recipe
    planned: Planned | None


def inspect(
    path: str | Path, *, key: str | None = None, allow_globals: Sequence[str] = (), unsafe_pickle: bool = False
) -> "FileView | RecipeView":
    """Say what a file is: a checkpoint, an artifact, a recipe or an ONNX file.

    Raises:
        PcqError: the file is none of these, or is damaged.
    """
    path = Path(path)
    given = {"--key": key, "--allow-global": allow_globals or None, "--unsafe-pickle": unsafe_pickle or None}
    said = [option for option, value in given.items() if value is not None]
    if said and (path.suffix in (".yaml", ".yml", ONNX_SUFFIX) or checkpoint.is_artifact(path)):
        raise PcqError("this is about checkpoints, and the file is none", where=said[0], todo="Leave it out")
    if path.suffix in (".yaml", ".yml"):
        return check(str(path))
    if path.suffix == ONNX_SUFFIX:
        from pcq.commands.inspecting_onnx import inspect_onnx

        return inspect_onnx(path)
    if checkpoint.is_artifact(path):
        return _inspect_artifact(path)
    opened = sources.open_source(path, key=key, allow_globals=allow_globals, unsafe_pickle=unsafe_pickle)
    source, _, arch = architecture(opened, None)
    shapes = {name: source.shape(name) for name in source.names}
    own = "an exported program" if source.program is not None else "a module, saved whole"
    told = arch or ("not recognised" if source.make_module is None else own)
    facts = [("architecture", told), *(("note", note) for note in source.notes)]
    facts += [("tied", f"{name} is {owner}") for name, owner in source.tied.items()]
    rows = tuple(float_view(name, shapes[name], source.dtype(name)) for name in source.names)
    whole = path.is_file() and path.suffix != ".json"  # else an index or a folder: several files
    return FileView(path, "float checkpoint", tuple(facts), rows, path.stat().st_size if whole else source.nbytes)


def _inspect_artifact(path: Path) -> FileView:
    stored = checkpoint.read_artifact(path)
    facts = [
        ("architecture", stored.arch or ("an exported program" if stored.program is not None else "not recorded")),
        ("recipe", str(stored.recipe.get("name", ""))),
        *((f"{name} version", version) for name, version in stored.versions.items()),
        *(("tied", f"{name} is {owner}") for name, owner in stored.tied.items()),
    ]
    rows = [quantized_view(name, tensor, stored.texts[name]) for name, tensor in stored.quantized.items()]
    rows += [
        float_view(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in stored.floats.items()
    ]
    return FileView(path, "pcq artifact", tuple(facts), tuple(rows), path.stat().st_size)


def check(
    recipe: str | Path,
    model: str | Path | None = None,
    *,
    arch: str | None = None,
    overrides: Sequence[str] = (),
    key: str | None = None,
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
    planned = plan(model, loaded, arch=arch, key=key, allow_globals=allow_globals, unsafe_pickle=unsafe_pickle)
    return RecipeView(str(recipe), loaded, planned)


@dataclass(frozen=True)
class Shipped:
    """The recipes that come with pcq: name and first line of its comment."""

    recipes: tuple[tuple[str, str], ...]


def recipes() -> Shipped:
    """The shipped recipes, by name."""
    return Shipped(tuple((each.name, each.summary) for each in shipped_recipes()))


FARTHEST = 1e30
"""The largest level that is drawn."""


@dataclass(frozen=True)
class ProxPlot:
    """A plotted proximal map."""

    path: Path
    prox: str
    levels: tuple[float, ...]


def plot_prox(
    kind: str, levels: str | Sequence[float] = (-1.0, 0.0, 1.0), out: str | Path | None = None, *, force: bool = False
) -> ProxPlot:
    """Draw a proximal map at several strengths, as Figure 1 of arXiv 2110.13220 does, to a PNG.

    Raises:
        PcqError: an unknown map, levels that are not two or more different numbers, or a file at ``out`` that pcq did
            not draw, unless ``force`` replaces it.
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
    if len(set(values)) < 2 or not all(abs(q) <= FARTHEST for q in values):
        allowed = f"two or more numbers up to {FARTHEST:g}, such as -1,0,1"
        raise PcqError(f"'{levels}' are not levels", where="--levels", allowed=allowed)
    ascending = tuple(sorted(set(values)))
    path = Path(out) if out is not None else Path(f"prox-{kind}.png")
    checkpoint.refuse_overwrite(path, ".png", force=force)
    picture = plots.prox_figure(kinds[kind], ascending)
    with checkpoint.atomic(path) as draft:
        draft.write_bytes(picture)
    return ProxPlot(path, kind, ascending)
