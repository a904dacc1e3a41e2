"""A file to be measured: what runs it, and inputs of the shapes that it takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pcq.commands.fresh import Array
from pcq.commands.networks import ONNX_SUFFIX, Network, open_network
from pcq.errors import PcqError, raise_all
from pcq.progress import Progress
from pcq.sources.pt2 import counting
from pcq.words import dimensions

if TYPE_CHECKING:
    from pcq.data import Data


@dataclass(frozen=True)
class Input:
    """One input.

    Attributes:
        name: what the file calls it.
        sizes: with the samples first, None where one is open; None: nothing is known of them.
        kind: its type in NumPy's words.
        usual: the sizes of the example that it was exported with, where sizes are open; empty: not known.
    """

    name: str
    sizes: tuple[int | None, ...] | None
    kind: str
    usual: tuple[int, ...] = ()

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether one sample's shape can be this input's."""
        if self.sizes is None:
            return True
        return len(self.sizes) == 1 + len(shape) and all(
            taken in (None, size) for taken, size in zip(self.sizes[1:], shape, strict=True)
        )

    def whole(self, batch: int, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """Its sizes for that many samples of ``shape``, where that fits; None: they are not known."""
        if shape and self.fits(shape):
            sizes = (*(self.sizes or (None,))[:1], *shape)
        elif self.sizes is None:
            return None
        else:
            sizes = (*self.sizes[:1], *(self.usual or self.sizes)[1:])
        if sizes[:1] == (None,):
            sizes = (batch, *sizes[1:])
        known = tuple(size for size in sizes if size is not None)
        return known if len(known) == len(sizes) else None

    @property
    def said(self) -> str:
        """One sample's shape in words."""
        return f"{self.name} {dimensions((self.sizes or ())[1:])}"


@dataclass(frozen=True)
class Benched:
    """A file.

    Attributes:
        path: where it is.
        runtime: ``ONNX Runtime`` or ``torch``.
        opening: how ``open_network`` opens it, for torch.
        inputs: what it takes, in order.
        samples: real ones, [n, ...] for each input; without any, numbers are invented.
    """

    path: Path
    runtime: str
    opening: Mapping[str, Any]
    inputs: tuple[Input, ...]
    samples: tuple[Tensor, ...] = ()

    @property
    def lengths(self) -> set[int]:
        """How many samples it takes at once; empty: any number."""
        lengths = {one.sizes[0] for one in self.inputs if one.sizes}
        return set() if None in lengths else {length for length in lengths if length}

    def refuse(self, batches: Sequence[int]) -> None:
        """Raise PcqError if it takes none of these numbers of samples."""
        if self.lengths and self.lengths.isdisjoint(batches):
            said, noun = " or ".join(map(str, sorted(self.lengths))), "samples" if max(self.lengths) > 1 else "sample"
            raise PcqError(f"it takes {said} {noun} at once, no other number",
                           where=str(self.path), todo=f"Give --batch {max(self.lengths)}")  # fmt: skip

    def feed(self, batch: int, shape: tuple[int, ...] | None) -> dict[str, Array] | None:
        """Inputs of that many samples, real ones again and again; None where the file allows only another number.

        ``shape`` is an invented sample's, for those inputs that it fits.

        Raises:
            PcqError: a shape is not known.
        """
        if self.lengths and batch not in self.lengths:
            return None
        if self.samples:
            chosen = torch.arange(batch) % len(self.samples[0])
            taken = zip(self.inputs, self.samples, strict=True)
            return {one.name: x[chosen].numpy().astype(one.kind) for one, x in taken}
        from pcq.data.inputs import hides_tokens

        feed = {}
        generator = np.random.default_rng(0)
        for one in self.inputs:
            sizes = one.whole(batch, shape)
            if sizes is None:
                said = "its input" if self.runtime == "torch" else f"its input '{one.name}'"
                such = "128, if it is that of each input" if len(self.inputs) > 1 else "3x224x224"
                todo = f"Give one sample's shape without the batch, such as --input {such}, or data: --example SPEC"
                raise PcqError(f"the shape of {said} is not known", where=str(self.path), todo=todo)
            if np.issubdtype(np.dtype(one.kind), np.floating):
                made = generator.normal(size=sizes)
            else:
                made = np.full(sizes, 1 if hides_tokens(one.name) else 0)
            feed[one.name] = np.asarray(made).astype(one.kind)
        return feed


def open_files(
    paths: Sequence[Path],
    openings: Sequence[Mapping[str, Any]],
    given: tuple[int, ...] | None,
    progress: Progress,
    example: str | None = None,
    most: int = 1,
) -> tuple[list[Benched], tuple[int, ...] | None]:
    """What runs each file, and one sample's shape: the one given, else what a file of one input says.

    Of the data ``example`` each has ``most`` samples, evenly spaced, or those that there are. Without it a network
    takes the several inputs that an ONNX file or an exported program among the files has by the names of its arguments.

    Raises:
        PcqError: a file cannot be opened, or its inputs cannot be of the shape given, of the other files', or the data.
    """
    from pcq.data import open_inputs
    from pcq.data.inputs import numbers, taken

    data = None if example is None else open_inputs(example, "train", lambda arrays: numbers(arrays, example))
    samples = () if data is None else data.given(data.order(most).tolist())
    files: list[Benched] = []
    bare: dict[int, Network] = {}
    said: list[tuple[int, ...]] = []
    usual: list[tuple[int, ...]] = []
    for done, (path, opening) in enumerate(zip(paths, openings, strict=True)):
        progress(f"open {path.name}", done, len(paths))
        if path.suffix == ONNX_SUFFIX:
            file = Benched(path, "ONNX Runtime", {}, _of_onnx(path, given is not None or example is not None))
            files.append(file if data is None else _on_arrays(file, data, samples))
        elif data is not None:
            files.append(_on_samples(path, opening, data, samples))
        else:
            network = open_network(path, **opening)
            usual += [network.input_shape] if network.input_shape else []
            if network.inputs:
                files.append(Benched(path, "torch", opening, _of_program(network, path)))
            else:
                bare[done] = network
                files.append(Benched(path, "torch", opening, (Input("x", None, "float32"),)))
        inputs = files[-1].inputs
        if example is None and len(inputs) == 1 and inputs[0].sizes and None not in inputs[0].sizes[1:]:
            said.append(tuple(size for size in inputs[0].sizes[1:] if size is not None))
        elif example is None and len(inputs) == 1 and inputs[0].usual:
            usual.append(inputs[0].usual[1:])
    for place, network in bare.items():
        if several := _described(network.module, files):
            files[place] = replace(files[place], inputs=several)
        else:
            network.refuse_several(files[place].path)
    shape = given or next(iter(said + usual), None)
    if shape is not None:
        _refuse(files, shape, given is not None)
    for place, network in bare.items():
        if shape is not None and len(files[place].inputs) == 1 and taken(network.module, shape).ids is not None:
            files[place] = replace(files[place], inputs=(Input("x", None, "int64"),))
    return files, shape


def _described(module: torch.nn.Module, files: Sequence[Benched]) -> tuple[Input, ...]:
    """Several inputs of another file that the network takes by their names, in its order; empty: no file has such."""
    from pcq.data.inputs import names, needed

    for file in files:
        found = {one.name: one for one in file.inputs}
        if len(found) > 1 and {*needed(module)} <= found.keys() <= {*names(module)}:
            return tuple(found[name] for name in names(module) if name in found)
    return ()


def _on_arrays(file: Benched, data: "Data", samples: tuple[Tensor, ...]) -> Benched:
    """An ONNX file with samples of ``data``: arrays by the names of its inputs.

    Raises:
        PcqError: it does not take them.
    """
    from pcq.data.inputs import refuse_kind, refuse_others

    names = [one.name for one in file.inputs]
    refuse_others(names, tuple(data.arrays), str(file.path))
    found = dict(zip(data.arrays or names, samples, strict=True))
    samples = tuple(found[name] for name in names)
    for one, x in zip(file.inputs, samples, strict=True):
        refuse_kind(x.is_floating_point(), np.dtype(one.kind), one.name, str(file.path), only=len(names) == 1)
        if not one.fits(tuple(x.shape[1:])):
            raise PcqError(f"it does not take samples of {dimensions(x.shape[1:])}", where=str(file.path),
                           allowed=_allowed(file), todo="Give data of such samples as --example")  # fmt: skip
    return replace(file, samples=samples)


def _on_samples(path: Path, opening: Mapping[str, Any], data: "Data", samples: tuple[Tensor, ...]) -> Benched:
    """A checkpoint, an artifact or an exported program with samples of ``data``.

    Raises:
        PcqError: it takes other inputs.
    """
    from pcq.data.inputs import names, refuse_one

    network = open_network(path, **opening)
    if not data.arrays:
        refuse_one(network.module, str(path), data.notes)
    called = network.order(data.arrays, data.name) if data.arrays else names(network.module)[:1]
    found = dict(zip(data.arrays or called, samples, strict=True))
    samples = tuple(found[name] for name in called)
    if network.inputs:
        inputs = _of_program(network, path)
    else:
        kinds = [str(x.dtype).removeprefix("torch.") for x in samples]
        shapes = [(None, *x.shape[1:]) for x in samples]
        inputs = tuple(Input(*each) for each in zip(called, shapes, kinds, strict=True))
    return Benched(path, "torch", opening, inputs, samples)


def _refuse(files: Sequence[Benched], shape: tuple[int, ...], given: bool) -> None:
    """Raise PcqError if a file of one input does not take that shape, or, of one that was given, no input at all."""
    problems = []
    for file in files:
        if len(file.inputs) == 1 and not file.inputs[0].fits(shape):
            what = f"it does not take samples of {dimensions(shape)}" + ("" if given else ", as another file does")
            problems.append(PcqError(what, where=str(file.path), allowed=_allowed(file),
                                     todo="Give such a shape as --input" if given else "Measure it apart"))  # fmt: skip
    if given and not problems and not any(one.fits(shape) for file in files for one in file.inputs):
        several = "; ".join(f"{file.path.name}: {_allowed(file)}" for file in files)
        problems.append(PcqError(f"no input takes samples of {dimensions(shape)}", where="--input", allowed=several,
                                 todo="Give one input's shape, or leave it out"))  # fmt: skip
    raise_all(problems)


def _allowed(file: Benched) -> str:
    said = ", ".join(one.said for one in file.inputs)
    return f"{said} (? is any size)" if "?" in said else said


def _of_onnx(path: Path, given: bool) -> tuple[Input, ...]:
    """What an ONNX file takes. No sizes are none, or those of a single number: where samples are ``given``, the former.

    Raises:
        PcqError: there is no such file, ONNX Runtime does not load it, or it takes what is no number.
    """
    from pcq.export.scheme import usual_sizes
    from pcq.onnx_input.trials import KINDS, input_session

    if not path.exists():
        raise PcqError("there is no such file", where=str(path))
    session = input_session(path)
    values, usual = session.get_inputs(), usual_sizes(session.get_modelmeta().custom_metadata_map)
    if strange := [value.type for value in values if value.type not in KINDS]:
        raise PcqError(f"it takes a {strange[0]}", where=str(path), allowed=", ".join(KINDS))
    unknown = given and len(values) == 1 and not values[0].shape
    inputs = []
    for value in values:
        sizes = None if unknown else tuple(d if isinstance(d, int) and d > 0 else None for d in value.shape)
        made = Input(value.name, sizes, np.dtype(KINDS[value.type]).name)
        known = usual.get(value.name, ())
        inputs.append(replace(made, usual=(1, *known)) if known and made.fits(known) else made)
    return tuple(inputs)


def _of_program(network: Network, path: Path) -> tuple[Input, ...]:
    """What an exported program takes: samples as many as there are, where that is open."""
    from pcq.onnx_input.trials import KINDS

    assert isinstance(network.module, torch.fx.GraphModule), path
    nodes = [node for node in network.module.graph.nodes if node.op == "placeholder"]
    if isinstance(network.inputs, dict):
        named = {node.name: node for node in nodes}
        nodes = [named[name] for name in network.inputs]
    kinds = [str(x.dtype).removeprefix("torch.") for x in network.values]
    known = [np.dtype(kind).name for kind in KINDS.values()]
    if strange := [kind for kind in kinds if kind not in known]:
        raise PcqError(f"it takes a {strange[0]}", where=str(path), allowed=", ".join(known))
    shapes = [node.meta["val"].shape for node in nodes]
    inputs = []
    for node, x, kind, shape, counts in zip(nodes, network.values, kinds, shapes, counting(shapes), strict=True):
        sizes = [size if isinstance(size, int) else None for size in shape]
        if sizes and not counts:  # fixed, or open, and not the number of samples
            sizes[0] = x.shape[0]
        inputs.append(Input(node.name, tuple(sizes), kind, tuple(x.shape)))
    return tuple(inputs)
