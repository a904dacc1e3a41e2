"""From an artifact to an exported program: the one that it was made from, or its network traced."""

import io
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pcq import checkpoint
from pcq.commands.doors import DoorResult, opened
from pcq.commands.exporting import first
from pcq.commands.networks import Network, load_network
from pcq.errors import CheckFailed, PcqError, first_line
from pcq.sources.pt2 import are_names, counting

TOLERANCE = 1e-5
"""Largest difference of a program's outputs, relative to their scale; nearly all have none."""


def export_pt2(
    artifact: str | Path,
    out: str | Path | None = None,
    *,
    arch: str | None = None,
    input_shape: Sequence[int] | None = None,
    example: str | None = None,
    force: bool = False,
) -> DoorResult:
    """Write the dequantized network as an exported program: ``torch.export.load`` runs it without its source code.

    Outputs of a class that is a dictionary of names, such as Hugging Face's, are plain dictionaries of them.

    An artifact made from such a program gives that program back, with its inputs and the sizes that it leaves open.

    Args:
        artifact: a file that ``quantize`` or ``finetune`` wrote.
        out: the file; default: the artifact's name with ``.pt2``.
        arch: the architecture, where the artifact does not record it.
        input_shape: one sample's shape without the batch; default: what the architecture is made for.
        example: a data spec instead; it also says what the inputs of a network of several are: an array for each.
        force: replace a file at ``out``.

    Raises:
        PcqError: the artifact or the architecture is not usable, or torch cannot export it.
        CheckFailed: the program that was read back computes something else.
    """
    from pcq.data.inputs import sample_shape

    input_shape = sample_shape(input_shape)
    source, stored = opened(artifact)
    path = Path(out) if out is not None else checkpoint.beside(source, ".pt2")
    checkpoint.refuse_overwrite(path, ".pt2", inputs=[source], force=force)
    if arch is None and stored.program is not None:
        if input_shape:
            raise PcqError("the exported program says the shapes of its inputs", where="--input", todo="Leave it out")
        if example:
            raise PcqError("the exported program says what its inputs are", where="--example", todo="Leave it out")
        made = _of_program(stored.exported_program(), source)
    else:
        network = load_network(stored, source, arch)
        made = _of_network(network, source, input_shape, first(example, network, input_shape))
    with checkpoint.atomic(path) as draft:
        written = io.BytesIO()  # on a disk that is full torch ends the process
        torch.export.save(made.program, written)
        draft.write_bytes(written.getbuffer())
        del written
        with draft.open("rb") as opened_again:  # by its name torch would insist on the suffix
            read = torch.export.load(opened_again)
        for name, tensor in made.program.state_dict.items():
            if not torch.equal(read.state_dict[name], tensor):
                raise CheckFailed("was written and reads differently", where=name)
        off = max(_apart(made.network, read.module(), *inputs) for inputs in made.trials.values())
        if not off <= TOLERANCE:
            if not max(_apart(made.network, made.network, *inputs) for inputs in made.trials.values()) <= TOLERANCE:
                from pcq.export.verify import drawn

                raise drawn(str(source))
            what = f"the program puts out something else: {off:.2g} of the outputs' scale away from the network's"
            raise CheckFailed(what, where=str(path), allowed=f"up to {TOLERANCE:g}")
    said = " and ".join(map(str, made.trials))
    exactly = "the very bits of the network" if off == 0 else f"the network's numbers within {off:.1e} of their scale"
    proof = f"loaded again, it puts out {exactly} at batch {said}"
    return DoorResult(path, source, "pt2", len(made.program.state_dict), 0, (), path.stat().st_size, proof)


@dataclass(frozen=True)
class _Program:
    """To be written: the program, what it has to compute, and inputs by batch, positional and by name."""

    program: torch.export.ExportedProgram
    network: nn.Module
    trials: dict[int, tuple[tuple[Any, ...], dict[str, Any]]]


def _of_network(
    network: Network, source: Path, input_shape: tuple[int, ...] | None, given: tuple[Tensor, ...]
) -> _Program:
    """Traced, for any batch if torch manages it; on the samples ``given``, or else random ones."""
    from pcq.data.inputs import names, needed, resized, taken
    from pcq.export.tracing import other_sizes

    if len(given) < len(needed(network.module)):
        network.refuse_several(source)
    shape = input_shape or network.input_shape
    if shape is None and not given:
        raise PcqError(f"the input shape of {network.arch} is not known", where=str(source),
                       todo="Give one sample's shape without the batch, such as --input 3x224x224")  # fmt: skip
    random = taken(network.module, shape or ()) if not given else None

    def samples(batch: int) -> tuple[Tensor, ...]:
        if random is not None:
            return (random(batch, seed=batch),)
        return tuple(torch.cat([x] * batch)[:batch] for x in given)

    program, batches = _exported(network.module, samples, str(source))
    trials: dict[int, tuple[tuple[Tensor, ...], dict[str, Any]]] = {batch: (samples(batch), {}) for batch in batches}
    if len(batches) > 1:  # the last also at another length of tokens, where that is open
        last = samples(batches[-1])
        called = [*names(network.module), *[""] * len(last)][: len(last)]
        trials[batches[-1]] = (resized(called, last, other_sizes(program, last)), {})
    signature = program.module_call_graph[0].signature
    assert signature is not None
    signature.out_spec = _named(signature.out_spec)
    return _Program(program, network.module, trials)


def _named(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """``spec`` with dictionaries in place of classes that are such of names: a program of these needs their code."""
    if spec.is_leaf():
        return spec
    own = spec.type not in (tuple, list, dict, OrderedDict) and are_names(spec.context, spec.num_children)
    return pytree.TreeSpec(dict if own else spec.type, spec.context, [_named(child) for child in spec.children()])


def _of_program(program: torch.export.ExportedProgram, source: Path) -> _Program:
    """As it is; tried on as many samples as it was made with, and on twice as many where their number is open."""
    from pcq.data.inputs import varied

    module = program.module()
    leaves, tree = pytree.tree_flatten(program.example_inputs)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise PcqError("the exported program says no tensors that it takes", where=str(source))
    open_ = counting(_shapes(program))

    def call(*values: Tensor) -> object:
        args, named = pytree.tree_unflatten(list(values), tree)
        return module(*args, **named)

    trials = {}
    for times in (1, 2) if any(open_) else (1,):
        zeros = tuple(torch.cat([x] * times) if free else x for x, free in zip(leaves, open_, strict=True))
        generator = torch.Generator().manual_seed(times)
        trials[len(zeros[0]) if zeros[0].ndim else 1] = pytree.tree_unflatten(
            [torch.randn(x.shape, generator=generator).to(x.dtype) if x.is_floating_point() else x
             for x in varied(call, zeros)], tree,
        )  # fmt: skip
    return _Program(program, module, trials)


def _apart(
    network: Callable[..., object], program: Callable[..., object], args: tuple[Any, ...], named: dict[str, Any]
) -> float:
    """The largest difference of their outputs, relative to that output's largest value.

    Not zero where torch has another way for eval mode, as for nn.TransformerEncoderLayer, that a program has not.
    """
    with torch.no_grad():
        ours, theirs = (pytree.tree_leaves(each(*args, **named)) for each in (network, program))
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(a, Tensor):
            continue
        if a.shape != b.shape:
            return math.inf
        other = ~((a == b) | (a.isnan() & b.isnan()))
        if other.any():
            off, scale = (float(value.double().abs().max()) for value in ((a.double() - b.double())[other], a))
            worst = max(worst, off / scale) if scale and math.isfinite(off / scale) else math.inf
    return worst


def _exported(
    module: nn.Module, samples: Callable[[int], tuple[Tensor, ...]], where: str
) -> tuple[torch.export.ExportedProgram, tuple[int, ...]]:
    """The program, for any batch and length of tokens if torch manages it, and the batches it takes."""
    from pcq.data.inputs import of_any_length
    from pcq.export.tracing import advice, hushed

    example = samples(2)
    try:
        with hushed():
            any_, moves = torch.export.Dim.AUTO, of_any_length(example)
            sizes = tuple({0: any_, 1: any_} if tokens else {0: any_} for tokens in moves)
            moving = torch.export.export(module, example, dynamic_shapes=sizes, strict=False)
            if all(isinstance(shape[0], torch.SymInt) for shape in _shapes(moving)):
                return moving, (1, 3)
            return torch.export.export(module, tuple(x[:1] for x in example), strict=False), (1,)
    except Exception as error:  # torch.export raises many kinds
        told = first_line(error)
        raise PcqError(f"torch cannot export the network: {told}", where=where, todo=advice(told)) from error


def _shapes(program: torch.export.ExportedProgram) -> list[Sequence[object]]:
    """Of every input."""
    names = program.graph_signature.user_inputs
    return [tuple(node.meta["val"].shape) for node in program.graph.nodes if node.name in names]
