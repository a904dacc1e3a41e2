"""The network that a file holds or names: recognised, built, loaded."""

import contextlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pcq import checkpoint, models, sources
from pcq.data.inputs import hides_tokens, in_order, names, needed
from pcq.errors import PcqError
from pcq.sources.pt2 import Inputs, example_inputs

if TYPE_CHECKING:
    from pcq.data import Data

ONNX_SUFFIX = ".onnx"


@dataclass(frozen=True)
class Network:
    """A network with its weights, ready to run.

    Attributes:
        module: in eval mode.
        arch: its spec, or where an exported program comes from.
        input_shape: one sample's shape without the batch, if known.
        inputs: what an exported program was made with, as zeros, by position or by name; empty otherwise.
    """

    module: nn.Module
    arch: str
    input_shape: tuple[int, ...] | None
    inputs: Inputs = ()

    @property
    def values(self) -> tuple[Tensor, ...]:
        """The inputs in order."""
        return tuple(self.inputs.values()) if isinstance(self.inputs, dict) else self.inputs

    def run(self, *inputs: Tensor) -> object:
        """Its output on a tensor for each input, in order."""
        if isinstance(self.inputs, dict):
            return self.module(**dict(zip(self.inputs, inputs, strict=True)))
        return self.module(*inputs)

    def run_named(self, feed: Mapping[str, Tensor]) -> object:
        """Its output on tensors by their arguments' names, in order; one alone is the first argument."""
        return self.run(*feed.values()) if self.inputs or len(feed) == 1 else self.module(**feed)

    def refuse_several(self, path: Path) -> None:
        """Several inputs are taken only where something says what each is.

        Raises:
            PcqError: nothing does.
        """
        takes = needed(self.module)
        if len(takes) > 1:
            what = f"the network takes {len(takes)} inputs, and the file does not say what they are: {', '.join(takes)}"
            allowed = "one input, or an exported program (.pt2)"
            todo = (
                "Give data with an array for each of them by its name, --example SPEC, or hand it in as such a program"
            )
            raise PcqError(what, where=str(path), allowed=allowed, todo=todo)

    def data(self, spec: str, split: str) -> "Data":
        """A data set of what it takes: of several inputs their arrays in its order.

        Raises:
            PcqError: the data is not usable, or has not the arrays that the network takes.
        """
        from pcq.data import open_inputs
        from pcq.data.inputs import numbers

        def ordered(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
            order = self.order(arrays, spec)
            found = numbers(arrays, spec)
            return {name: found[name] for name in order}

        return open_inputs(spec, split, ordered)

    def order(self, arrays: Mapping[str, Any], spec: str) -> list[str]:
        """The arrays' names in the order of what it takes.

        Raises:
            PcqError: there is no such input, or one that is needed is not given.
        """
        if not isinstance(self.inputs, dict):
            return in_order(arrays, self.module, spec)
        if arrays.keys() != self.inputs.keys():
            raise PcqError(f"its arrays are {', '.join(arrays)}", where=spec, allowed=", ".join(self.inputs))
        return list(self.inputs)

    @staticmethod
    def of_program(module: nn.Module, said: str, inputs: Inputs) -> "Network":
        """An exported program's; what it was made with tells the shape of a sample, where it takes one by position.

        Masks of tokens among its inputs hide none: where all are hidden, any output is as right as another.
        """
        named = inputs if isinstance(inputs, dict) else dict(zip(names(module), inputs, strict=bool(inputs)))
        for name, x in named.items():
            if hides_tokens(name) and not x.is_floating_point():
                x.fill_(1)
        shape = tuple(inputs[0].shape[1:]) if isinstance(inputs, tuple) and len(inputs) == 1 else None
        return Network(module, said, shape, inputs)


def load_network(stored: "checkpoint.Artifact", path: Path, arch: str | None = None) -> Network:
    """Build the artifact's architecture (or ``arch``) and load its dequantized weights, in the network's own dtypes.

    Raises:
        PcqError: no architecture is recorded or given, or the weights do not fit it.
    """
    if arch is None and stored.program is not None:
        return Network.of_program(stored.program_module(), "the exported program", stored.example_inputs())
    spec = arch or stored.arch
    if spec is None:
        shapes = {name: tuple(tensor.shape) for name, tensor in stored.state_dict().items()}
        raise unknown("the artifact does not record an architecture", path, shapes)
    module = models.build(spec)
    models.load_state(module, stored.dequantized(), spec)
    return Network(module.eval(), spec, models.example_shape(spec))


def open_network(
    path: str | Path,
    arch: str | None = None,
    *,
    otherwise: str | None = None,
    key: str | None = None,
    allow_globals: Sequence[str] = (),
    unsafe_pickle: bool = False,
) -> Network:
    """The network in a float checkpoint or an artifact, with its weights loaded, in eval mode.

    ``otherwise`` is the architecture of a checkpoint that neither names its own nor is recognised.

    Raises:
        PcqError: the architecture is not known, or the weights do not fit it.
    """
    path = Path(path)
    if checkpoint.is_artifact(path):
        return load_network(checkpoint.read_artifact(path), path, arch)
    source = sources.open_source(path, key=key, allow_globals=allow_globals, unsafe_pickle=unsafe_pickle)
    ready = source.module() if arch is None else None
    if ready is not None:
        return Network.of_program(ready, str(path), () if source.program is None else example_inputs(source.program))
    shapes = {name: source.shape(name) for name in source.names}
    spec = arch or source.arch
    if spec is None:
        try:
            recognised = models.recognise(shapes)
        except models.Ambiguous:
            if otherwise is None:
                raise
            recognised = None
        spec = recognised.arch if recognised is not None else otherwise
    if spec is None:
        raise unknown("the architecture was not recognised", path, shapes)
    spec = models.complete(spec, shapes)
    module = models.build(spec)
    source = fitting(source, module, spec)
    models.load_state(module, {name: source.tensor(name) for name in source.names}, spec)
    return Network(module.eval(), spec, models.example_shape(spec))


def keys(
    paths: Sequence[Path], key: str | None, allow_globals: Sequence[str] = (), unsafe_pickle: bool = False
) -> list[str | None]:
    """Of several files, ``key`` for those with a state dict of that name; None for those that hold a single one.

    Raises:
        PcqError: a file holds several, and none of that name; or no file has one.
    """
    found: list[str | None] = []
    refused: list[PcqError] = []
    for path in paths:
        mine = None
        if key is not None and path.suffix != ONNX_SUFFIX and not checkpoint.is_artifact(path):
            try:
                sources.open_source(path, key=key, allow_globals=allow_globals, unsafe_pickle=unsafe_pickle)
                mine = key
            except sources.NoSuchState as error:
                if error.several:
                    raise
                refused.append(error)
        found.append(mine)
    if key is not None and not any(found):
        none = PcqError(f"no file holds several state dicts, or one named '{key}'", where="--key", todo="Leave it out")
        raise refused[0] if len(paths) == len(refused) == 1 else none
    return found


def recorded(path: Path) -> str | None:
    """The architecture spec in an artifact, or in an ONNX file made from one; None where there is none."""
    if path.suffix == ONNX_SUFFIX:
        import onnx

        entries = onnx.load(path, load_external_data=False).metadata_props
        spec = next((entry.value for entry in entries if entry.key == "pcq.arch"), None)
        return spec if spec is not None and ":" in spec else None  # in words where it is an exported program
    return checkpoint.read_artifact(path).arch if checkpoint.is_artifact(path) else None


def architecture(source: sources.Source, arch: str | None) -> tuple[sources.Source, nn.Module | None, str | None]:
    """``source`` as the network names its weights, the network without them, where it is known, and its spec.

    What was found on the way is among its notes.
    """
    shapes = {name: source.shape(name) for name in source.names}
    given = arch or source.arch
    if given:
        spec = models.complete(given, shapes)
        module = skeleton(spec)
        fitted = fitting(source, module, spec)
        models.check_shapes(module, {name: fitted.shape(name) for name in fitted.names}, spec)
        return fitted, module, spec
    if source.make_module is not None:
        return source, source.module(), None
    try:
        recognised = models.recognise(shapes)
    except models.Ambiguous as error:
        return source.noted(f"The architecture is open: {error}"), None, None
    if recognised is None:
        said = f"The architecture was not recognised; eval and export will need it. {name_it(source.path)}."
        return source.noted(said), None, None
    return source.noted(f"Recognised: {recognised.sentence}."), skeleton(recognised.arch), recognised.arch


def fitting(source: sources.Source, module: nn.Module, spec: str) -> sources.Source:
    """``source`` under the names of ``module``: the one part of it that is this network, such as what Lightning has
    under ``model.`` beside a loss's weights; with a prefix that belongs to it; or as transformers loads its folders.

    As it is where it fits, or where nothing helps.
    """
    shapes = {name: source.shape(name) for name in source.names}
    check = models.mismatch(module, shapes)
    if not check:
        return source
    if len(check.parts) == 1:
        return sources.part(source, check.parts[0])
    if prefix := models.prefix_of(module, shapes):
        return sources.with_prefix(source, prefix)
    loaded = models.as_transformers_loads(spec, source.state_dict()) if spec.startswith("hf:") else None
    return source if loaded is None else sources.as_loaded(source, *loaded)


def unknown(what: str, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> PcqError:
    """Of weights whose architecture is needed and nobody said; where several networks fit them, these are named."""
    try:
        models.recognise(shapes)
    except models.Ambiguous as error:
        return PcqError(f"{what}: {error.what}", where=str(path), todo=error.todo)
    return PcqError(what, where=str(path), todo=name_it(path))


def name_it(path: Path) -> str:
    """How to say the architecture of a checkpoint; ``save_pretrained``'s folders hold it themselves."""
    folder = path if path.is_dir() else path.parent
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((folder / "config.json").read_bytes())
        if isinstance(config, dict) and "model_type" in config:
            return f"Name it: --arch {shlex.quote(f'hf:{folder}')}"
    return "Name it: --arch torchvision:resnet18, --arch timm:NAME, --arch hf:FOLDER, or --arch file.py:function"


def skeleton(spec: str) -> nn.Module:
    """The network without memory for its weights, where it can be built so."""
    if not spec.startswith(("torchvision:", "timm:", "hf:")):
        return models.build(spec)
    try:
        with torch.device("meta"):
            return models.build(spec)
    except NotImplementedError:  # a constructor that reads values while it builds
        return models.build(spec)
