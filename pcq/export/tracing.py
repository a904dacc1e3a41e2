"""A torch network as an unoptimised onnx_ir graph, and what is needed to run the two side by side.

Optimising before the weights are packed would fold BatchNorm into convolutions and rename and transpose Linear
weights; so nothing is optimised here (ONNX.md section 3).
"""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from pcq.data.inputs import names, of_any_length, refusing, resized, runs
from pcq.errors import PcqError, raise_all
from pcq.logits import NAME, main_output, tensors

Example = Sequence[Tensor] | Mapping[str, Tensor]
"""A network's inputs: positional, or by the names of ``forward``'s arguments."""


DEPENDS = ("data-dependent", "could not guard", "failed to unpack", "unbacked")
"""Words of torch about what depends on values."""


def advice(told: str) -> str:
    """What to do about a network that torch cannot export, by what it says; empty where that says enough."""
    if "grouped_mm" in told:
        return "Its experts compute as ONNX does not: name it with --arch 'hf:FOLDER?experts_implementation=batched_mm'"
    if not any(word in told.lower() for word in DEPENDS):
        return ""
    return (
        "Its sizes or its way depend on values, as with packed sequences, boxes chosen among others and masks that "
        "nn.Transformer looks at (tell it so: tgt_is_causal=True): give the network without that part"
    )


@contextmanager
def hushed() -> Iterator[None]:
    """Nothing of what torch and its exporters log, warn of and print; what matters is in their exceptions, too."""
    logged = logging.root.manager.disable
    try:
        logging.disable(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logged)


class FixedBatch(PcqError):
    """The network takes one number of samples only."""

    def __init__(self) -> None:
        todo = "Look for sizes that are written out in its forward(), such as x.view(1, -1)"
        super().__init__("the network's code fixes the batch size", where="export", todo=todo)


@dataclass(frozen=True)
class Traced:
    """A network's graph and the network.

    Attributes:
        model: the unoptimised graph; its initializers share storage with the network's parameters.
        used: the names that ``forward`` uses.
        example: one tensor for each input of the graph, in its order.
        batched: for each input, whether its first dimension is the batch and can be any size.
        others: for each input the axes of a sample whose size is open, such as the length of tokens, and another size
            to try; none where the network does not take those sizes.
        smallest_batch: the fewest samples the network takes at once.
        run: the network itself: inputs -> its tensor outputs in the graph's order.
    """

    model: ir.Model
    used: frozenset[str]
    example: tuple[Tensor, ...]
    batched: tuple[bool, ...]
    others: tuple[dict[int, int], ...]
    smallest_batch: int
    run: Callable[[Sequence[Tensor]], list[Tensor]]


def trace(network: nn.Module | ExportedProgram, example: Example | None, opset: int) -> Traced:
    """Export ``network`` with a dynamic batch dimension, of tokens also a dynamic length, nothing optimised.

    Every input whose first dimension is as long as the first input's is taken to be batched, and whole numbers
    ``[n, t]`` for tokens, or their mask or types, whose length stays open where the network's code lets it. An exported
    program keeps the dimensions it was exported with; without an example its own is taken.

    Raises:
        PcqError: the network is in training mode or not on the CPU; it does not take the example; torch cannot export
            it, or would leave something out; its batch size is fixed.
    """
    if example is None and isinstance(network, ExportedProgram) and network.example_inputs is not None:
        example = tuple(pytree.tree_leaves(network.example_inputs))
    if example is None:
        raise PcqError("an example of the network's inputs is needed", where="export")
    inputs = dict(example) if isinstance(example, Mapping) else tuple(example)
    leaves = tuple(inputs.values()) if isinstance(inputs, dict) else inputs
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise PcqError("example inputs must be tensors", where="export", allowed="one or more, positional or by name")
    if isinstance(network, ExportedProgram):
        program = _to_onnx(network, (), {}, None, opset)
        module: nn.Module = network.module()
    else:
        _check(network)
        module = network
        try:
            program = _export(network, inputs, opset)
        except PcqError:
            with refusing(leaves), torch.no_grad():  # where the samples are at fault, not the code
                _called(network, inputs)
            raise
    graph = program.model.graph
    if len(graph.inputs) != len(leaves):
        raise PcqError(f"the network has {len(graph.inputs)} inputs, the example {len(leaves)}", where="export")
    names = [value.name or "" for value in graph.inputs]
    if isinstance(inputs, dict) and set(names) == inputs.keys():
        inputs = {name: inputs[name] for name in names}
        leaves = tuple(inputs.values())
    batched = tuple(
        value.shape is not None and len(value.shape) > 0 and not isinstance(value.shape[0], int)
        for value in graph.inputs
    )
    if not isinstance(network, ExportedProgram | torch.fx.GraphModule) and not batched[0]:
        raise FixedBatch

    def result(values: Sequence[Tensor]) -> Any:
        with torch.no_grad():
            return _called(
                module, dict(zip(inputs, values, strict=True)) if isinstance(inputs, dict) else tuple(values)
            )

    def run(values: Sequence[Tensor]) -> list[Tensor]:
        return tensors(result(values))

    if len(graph.outputs) > 1:
        _name_main(graph, result(leaves))
    used, smallest = _signature(program.exported_program, tensors_of(network))
    others = other_sizes(program.exported_program, leaves)
    if any(others) and not runs(run, resized(names, _several(leaves, batched), others)):
        others = [{} for _ in leaves]
    return Traced(program.model, used, leaves, batched, tuple(others), smallest, run)


def _name_main(graph: ir.Graph, result: Any) -> None:
    """Give the output that counts its name, where it is not the first, so that whoever runs the file knows it."""
    found, main = tensors(result), main_output(result)
    at = next((i for i, leaf in enumerate(found) if leaf is main), 0)
    taken = {value.name for node in graph for value in node.outputs} | {value.name for value in graph.inputs}
    if at and len(found) == len(graph.outputs) and not {NAME} & (taken | graph.initializers.keys()):
        graph.outputs[at].name = NAME


def tensors_of(network: nn.Module | ExportedProgram) -> dict[str, Tensor]:
    """Parameters and buffers by every name they have."""
    if isinstance(network, ExportedProgram):
        return {name: value for name, value in network.state_dict.items() if isinstance(value, Tensor)}
    named = dict(network.named_parameters(remove_duplicate=False))
    return named | dict(network.named_buffers(remove_duplicate=False))


def _called(network: nn.Module, inputs: dict[str, Tensor] | tuple[Tensor, ...]) -> Any:
    return network(**inputs) if isinstance(inputs, dict) else network(*inputs)


def _export(network: nn.Module, inputs: dict[str, Tensor] | tuple[Tensor, ...], opset: int) -> torch.onnx.ONNXProgram:
    """With a dynamic batch, and length if that can be; an exported program's module with the sizes that it leaves open,
    if any."""
    leaves = list(inputs.values()) if isinstance(inputs, dict) else list(inputs)
    batch = leaves[0].shape[0] if leaves[0].ndim else 0
    moving = [leaf.ndim > 0 and leaf.shape[0] == batch for leaf in leaves]
    several = _several(leaves, moving)
    shapes: list[dict[int, str]] = [{0: "batch"} if moves else {} for moves in moving]
    takes = list(inputs) if isinstance(inputs, dict) else [*names(network), *[""] * len(leaves)][: len(leaves)]
    more = _left_open(network, inputs) if isinstance(network, torch.fx.GraphModule) else _lengths(takes, leaves)
    longer = [shape | one for shape, one in zip(shapes, more, strict=True)]

    def export(values: list[Tensor], shapes: list[dict[int, str]] | None) -> torch.onnx.ONNXProgram:
        if not isinstance(inputs, dict):
            return _to_onnx(network, tuple(values), {}, None if shapes is None else tuple(shapes), opset)
        named = dict(zip(inputs, values, strict=True))
        return _to_onnx(network, (), named, None if shapes is None else dict(zip(inputs, shapes, strict=True)), opset)

    try:
        return export(several, longer)
    except FixedBatch:
        if isinstance(network, torch.fx.GraphModule):
            return export(leaves, None)
        if longer == shapes:
            raise
    except PcqError:
        if longer == shapes or isinstance(network, torch.fx.GraphModule):
            raise
    return export(several, shapes)  # the code fixes the length


def _lengths(takes: Sequence[str], leaves: Sequence[Tensor]) -> list[dict[int, str]]:
    """Of each input the axis of the tokens, if it has one, and its name: a decoder's length is one of its own."""
    called = ["decoder_length" if name.startswith("decoder") else "length" for name in takes]
    return [{1: name} if moves else {} for name, moves in zip(called, of_any_length(leaves), strict=True)]


def _left_open(program: torch.fx.GraphModule, inputs: Mapping[str, Tensor] | Sequence[Tensor]) -> list[dict[int, str]]:
    """Of each input, by name or position, the axes but the first whose size the program leaves open, and its name."""
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    held = {key: node.meta.get("val") for at, node in enumerate(nodes) for key in (at, node.name)}
    found = []
    for key, leaf in dict(inputs if isinstance(inputs, Mapping) else enumerate(inputs)).items():
        value = held.get(key)
        sizes = [] if not isinstance(value, Tensor) else [str(size) for size in value.shape]
        found.append({
            at: size for at, size in enumerate(sizes) if at and size.isidentifier() and leaf.shape[at] > 1
        })  # fmt: skip
    return found


def _several(leaves: Sequence[Tensor], batched: Sequence[bool]) -> list[Tensor]:
    """Of those that are ``batched`` a batch of one doubled: torch takes a dimension of size 1 for a constant."""
    pairs = zip(leaves, batched, strict=True)
    return [torch.cat([leaf, leaf]) if moves and leaf.shape[0] == 1 else leaf for leaf, moves in pairs]


def _check(module: nn.Module) -> None:
    problems = []
    baked = isinstance(module, torch.fx.GraphModule)  # an exported program's module: its mode is in its graph
    training = [] if baked else [name for name, child in module.named_modules() if child.training]
    if training:
        problems.append(PcqError("the network is in training mode", where=training[0] or "export",
                                 todo="Call .eval() first"))  # fmt: skip
    elsewhere = [name for name, value in module.state_dict().items() if value.device.type != "cpu"]
    if elsewhere:
        problems.append(PcqError("the weights are not in CPU memory", where=elsewhere[0], todo="Call .cpu() first"))
    projected = [name for name, child in module.named_modules() if isinstance(child, nn.LSTM) and child.proj_size]
    if projected:
        what = "it is an LSTM with proj_size, which ONNX has not: torch leaves its projection out"
        problems.append(PcqError(what, where=projected[0] or "export", todo="Export a program instead: --pt2"))
    raise_all(problems)


def _to_onnx(
    network: nn.Module | ExportedProgram,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor],
    shapes: tuple[dict[int, str], ...] | dict[str, dict[int, str]] | None,
    opset: int,
) -> torch.onnx.ONNXProgram:
    try:
        with hushed(), torch.no_grad():
            program = torch.onnx.export(
                network, args, kwargs=kwargs, dynamo=True, optimize=False, opset_version=opset,
                dynamic_shapes=shapes, verbose=False,
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
        if any("static shape" in line for line in lines):
            raise FixedBatch from error
        text = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
        raise PcqError(f"torch cannot export this network: {text}", where="export", todo=advice(text)) from error
    assert program is not None
    got = program.model.opset_imports.get("")
    if got != opset:
        raise PcqError(f"torch needs opset {got} for this network, the target runtime has {opset}", where="export",
                       todo="Choose a newer target runtime")  # fmt: skip
    return program


def _signature(program: ExportedProgram | None, tensors: Mapping[str, Tensor]) -> tuple[frozenset[str], int]:
    """The names of the parameters and buffers that are used, tied names included, and the smallest batch."""
    assert program is not None
    signature = program.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    live = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    storages = {tensors[held[name]].data_ptr() for name in live if held.get(name) in tensors}
    used = frozenset(name for name, value in tensors.items() if value.data_ptr() in storages)
    return used, next(iter(_open_sizes(program, 0)), None) or 1


def other_sizes(program: ExportedProgram | None, leaves: Sequence[Tensor]) -> list[dict[int, int]]:
    """Of each input the axes behind the first whose size the program leaves open, and another size to try."""
    found: list[dict[int, int]] = [{} for _ in leaves]
    for axis in range(1, max(leaf.ndim for leaf in leaves)):
        for one, leaf, fewest in zip(found, leaves, _open_sizes(program, axis), strict=True):
            if fewest:
                one[axis] = min(leaf.shape[axis], max(2, fewest, leaf.shape[axis] // 2))
    return found


def _open_sizes(program: ExportedProgram | None, axis: int) -> list[int | None]:
    """Of each input that is a tensor the smallest size of an axis that is open, 1 or more; None: it is fixed."""
    assert program is not None
    found: list[int | None] = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.name in program.graph_signature.user_inputs and isinstance(value, Tensor):
            size: object = value.shape[axis] if value.ndim > axis else None
            if isinstance(size, torch.SymInt) and str(size).isidentifier():  # a fixed size may be symbolic, too
                limits = program.range_constraints.get(size.node.expr)
                found.append(1 if limits is None else max(1, int(limits.lower)))
            else:
                found.append(None)
    return found
