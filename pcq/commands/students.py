"""The network that is trained: made from a checkpoint, with what is frozen taken out."""

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pcq import models, qtensor
from pcq.commands import quantizing, starting
from pcq.commands.networks import unknown
from pcq.commands.quantizing import Planned
from pcq.data.inputs import bind_as
from pcq.errors import PcqError, did_you_mean, raise_all
from pcq.qtensor import QuantizedTensor
from pcq.quantizers import as_they_are
from pcq.settings import Finetune
from pcq.words import counted

if TYPE_CHECKING:
    from pcq.train.activations import Weight8


def build(planned: Planned) -> nn.Module:
    """The network with the model's weights, float32, in eval mode.

    Raises:
        PcqError: the architecture is not known, or has other names for what it loads.
    """
    if planned.arch is None:
        given = planned.source
        what = "training needs the architecture's code, and an exported program has none"
        what = what if given.make_module is not None else "the architecture is not known"
        raise unknown(what, planned.model, {name: given.shape(name) for name in given.names})
    module = models.build(planned.arch)
    models.load_state(module, {name: planned.source.tensor(name) for name in planned.source.names}, planned.arch)
    held = {*module.state_dict(), *(name for name, _ in module.named_buffers())}
    if lost := [name for name in planned.source.names if name not in held]:
        what = f"the network loads '{lost[0]}' under another name, by which it would be trained"
        todo = "Load it into the network, save that one's state_dict(), and give that"
        raise PcqError(what, where=str(planned.model), todo=todo)
    return module.float().eval()


def original_or_new(planned: Planned, original: nn.Module, seed: int | None) -> nn.Module:
    """A network of its own to train: with the model's weights, or with random ones."""
    assert planned.arch is not None
    with torch.random.fork_rng():
        torch.manual_seed(0 if seed is None else seed)
        module = models.build(planned.arch).float()
    for layer in module.modules():
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
            layer.sparse = False  # AdamW and weight decay take dense gradients only
    bind_as(module, original)
    if seed is None:
        module.load_state_dict(original.state_dict())
    return module


def freeze(
    module: nn.Module, planned: Planned, settings: Finetune, begin: starting.Start | None
) -> dict[str, QuantizedTensor]:
    """Take what ``settings.freeze`` matches out of training; its weights with levels are rounded now, or calibrated.

    So are those that the network's own code has taken out. A tied parameter is matched by any of its names.

    Raises:
        PcqError: a pattern matches nothing, or all is frozen.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    problems = [
        PcqError(f"'{pattern}' matches no parameter", where="finetune.freeze", todo=did_you_mean(pattern, parameters))
        for pattern in settings.freeze
        if not any(fnmatchcase(name, pattern) for name in parameters)
    ]
    raise_all(problems)
    for name in parameters:
        if any(fnmatchcase(name, pattern) for pattern in settings.freeze):
            parameters[name].requires_grad_(False)
    chosen = {name for name in parameters if not parameters[name].requires_grad}
    fixed = {}
    for entry in planned.plan.quantized:
        name = entry.parameter.name
        if entry.parameter.tied_to is not None:
            continue
        if name in chosen:
            if begin is not None:
                fixed[name] = begin.quantized[name]
            else:
                fixed[name] = qtensor.quantize(entry.quantizer, parameters[name].detach(), entry.rows)
            parameters[name].data.copy_(fixed[name].dequantize())
    if {entry.parameter.name for entry in planned.plan.quantized if entry.parameter.tied_to is None} <= chosen:
        what = (
            "no weight with levels is left to train" if planned.plan.quantized else "the recipe gives no weight levels"
        )
        raise PcqError(what, where="finetune.freeze" if chosen else planned.recipe.name)
    return fixed


def fitted(planned: Planned) -> bool:
    """Whether any of its levels are fitted to the weights."""
    return not all(as_they_are(entry.quantizer) for entry in planned.plan.quantized)


def unfit(planned: Planned, module: nn.Module) -> tuple[str, ...]:
    """What to say where fixed levels are of another size than the weights that training starts from."""
    from pcq.sensitivity import weight_noise

    parameters = dict(module.named_parameters(remove_duplicate=False))
    entries = [entry for entry in planned.plan.quantized if entry.parameter.tied_to is None]
    lost = []
    for entry in entries:
        if as_they_are(entry.quantizer):
            weight = parameters[entry.parameter.name].detach()
            noise = weight_noise(weight, qtensor.quantize(entry.quantizer, weight, entry.rows))
            lost += [entry.parameter.name] * quantizing.unfit(entry.quantizer, quantizing.sqnr(1.0, noise.share))
    if not lost:
        return ()
    return (
        f"When training began, next to nothing was kept of {len(lost)} of {counted(len(entries), 'weight')}: fixed "
        "levels are used as they are, and it has to bring the weights to their size. `scale: mse` beside them in the "
        "recipe fits them to the weights.",
    )


def forms8(planned: Planned, module: nn.Module) -> "dict[Tensor, Weight8]":
    """The parameters whose layers get activations of 8 bits.

    Raises:
        PcqError: there are none.
    """
    from pcq.train.activations import weights8

    entries = [entry for entry in planned.plan.quantized if entry.parameter.tied_to is None]
    forms = {entry.parameter.name: (qtensor.blank(entry.quantizer, entry.rows), entry.rows) for entry in entries}
    found = weights8(dict(module.named_parameters(remove_duplicate=False)), forms)
    if not found:
        raise PcqError("no layer of this network can run in int8", where="finetune.activations",
                       allowed="weights with evenly spaced levels per tensor or channel")  # fmt: skip
    return found
