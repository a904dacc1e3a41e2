"""What a ProxConnect can be attached to."""

import gc
import inspect
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pcq import shards
from pcq.errors import PcqError, raise_all
from pcq.methods import Method
from pcq.proxconnect.weights import Target

if TYPE_CHECKING:
    from pcq.proxconnect.attached import ProxConnect

ATTACHED: "weakref.WeakSet[ProxConnect]" = weakref.WeakSet()
"""Those whose hooks are on."""


def refuse_averages(optimizer: torch.optim.Optimizer) -> None:
    """A schedule-free optimizer (arXiv 2405.15682) in its eval mode has put averages in place of the weights."""
    if any(group.get("train_mode") is False for group in optimizer.param_groups) and optimizer.state:
        raise PcqError(
            "the optimizer is in its eval mode: the parameters hold averages, which are on no levels",
            todo="Call its train() first; within quantized() the model is what it is going to be.",
        )


def _taken() -> set[int]:
    """Identities of the parameters that a ProxConnect has which is attached."""
    return {id(weight.parameter) for prox in ATTACHED for weight in prox.weights.values()}


def check(
    optimizer: torch.optim.Optimizer, weights: Mapping[str, Target], method: object, steps: int, refit: int | None
) -> None:
    try:
        optimizer.register_step_pre_hook(lambda *_: None).remove()
    except AttributeError:  # a wrapper, such as Accelerate's
        what = f"a {type(optimizer).__name__} has no step hooks"
        todo = "Attach to the optimizer in it." if hasattr(optimizer, "optimizer") else ""
        raise PcqError(what, allowed="a torch.optim.Optimizer", todo=todo) from None
    refuse_averages(optimizer)
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        what = f"{type(optimizer).__name__} is not taken: its step needs a closure, which would see the wrong weights"
        raise PcqError(what, allowed="an optimizer whose step() goes without, such as SGD, AdamW, Muon")
    problems = []
    todo = "Call its finish() or detach() first."
    taken = _taken()
    if weights and any(id(target.parameter) in taken for target in weights.values()):
        gc.collect()  # what nobody holds any more, but by the hooks, does not count
        taken = _taken()
    if any(prox.optimizer is optimizer for prox in ATTACHED):
        problems.append(PcqError("this optimizer has a ProxConnect attached already", todo=todo))
    else:
        problems += [
            PcqError("has a ProxConnect already, by another optimizer", where=name, todo=todo)
            for name, target in weights.items()
            if id(target.parameter) in taken
        ]
    if not isinstance(method, Method):
        what, todo = f"the method is a {type(method).__name__}", 'Write METHODS["proxconnect"], or another of them'
        problems.append(PcqError(what, allowed="a pcq.methods.Method", todo=todo))
    if not weights:
        problems.append(PcqError("there are no weights to quantize"))
    if steps < 1:
        problems.append(
            PcqError(f"steps is {steps}", allowed="the number of optimizer steps of the training, 1 or more")
        )
    if refit is not None and refit < 1:
        problems.append(PcqError(f"refit is {refit}", allowed="a number of steps, 1 or more, or None"))
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    seen: dict[int, str] = {}
    for name, target in weights.items():
        data = target.parameter.data
        if id(target.parameter) in seen:
            problems.append(PcqError(f"is the same parameter as {seen[id(target.parameter)]}", where=name))
        seen[id(target.parameter)] = name
        if id(target.parameter) not in mine:
            problems.append(
                PcqError(
                    "is not one of the optimizer's parameters",
                    where=name,
                    todo="Attach to the one that has it, or leave out what is not trained.",
                )
            )
        elif type(data) is not Tensor and not (shards.sharded(data) and shards.by_rows(data)):
            allowed = "a plain tensor, or one that FSDP2 has cut along its first axis"
            problems.append(PcqError(f"is a {type(data).__name__}", where=name, allowed=allowed))
        elif data.dtype != torch.float32:
            problems.append(
                PcqError(
                    f"is {str(data.dtype).removeprefix('torch.')}: steps smaller than its rounding would be lost",
                    where=name,
                    allowed="float32",
                    todo="Keep float32 parameters and compute in lower precision with torch.autocast.",
                )
            )
        elif not data.numel():
            problems.append(PcqError("has no elements, so there are no levels for them", where=name))
        elif tuple(data.shape) != target.rows.shape:
            problems.append(PcqError(f"has shape {tuple(data.shape)}, its rows {target.rows.shape}", where=name))
        elif not bool(torch.isfinite(shards.whole(data)).all()):
            problems.append(PcqError("has infinite or NaN weights", where=name))
    raise_all(problems)
