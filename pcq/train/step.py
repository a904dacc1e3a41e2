"""One optimizer step: learning rate, loss, backward, update. Pure functions of the settings and of how far it is."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcq.data.inputs import masks
from pcq.errors import PcqError
from pcq.logits import flat, main_output, predicts
from pcq.settings import Finetune
from pcq.train.ranks import ALONE, Ranks
from pcq.words import kind

TEMPERATURE = 2.0
"""By which outputs are divided before networks are compared (arXiv 1503.02531)."""

LEAST = -1e30
"""Below it outputs are masked: all alike."""


def make_optimizer(settings: Finetune, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Weights decay, what has one axis (biases, norms) does not. On a GPU a step is one kernel."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = True if trained and all(p.device.type == "cuda" for p in trained) else None
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9, nesterov=True, fused=fused)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=fused)


def rate(settings: Finetune, progress: float) -> float:
    """The learning rate at ``progress`` in [0, 1) of the training."""
    peak = settings.learning_rate
    match settings.rate:
        case "onecycle":
            if progress < 0.3:
                return peak * _cosine(1 / 25, 1.0, progress / 0.3)
            return peak * _cosine(1.0, 0.0, (progress - 0.3) / 0.7)
        case "cosine":
            return peak * min(1.0, (progress + 1e-3) / 0.05) * _cosine(1.0, 0.0, progress)
        case "step":
            return peak * (1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01)
        case "constant":
            return peak


def _cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * min(1.0, share))) / 2


def logits(out: Any, labelled: bool = True) -> Tensor:
    """The output called ``logits``, else the first: [b, classes], or any floats without labels."""
    out = main_output(out)
    if isinstance(out, Tensor):
        out = flat(out, labelled)
    if not isinstance(out, Tensor) or (labelled and out.ndim != 2):
        found = f"of shape {list(out.shape)}" if isinstance(out, Tensor) else kind(out)
        todo = "Leave the labels out: it then follows the float network" if isinstance(out, Tensor) else ""
        raise PcqError(f"its output is {found}", where="the network", allowed="a tensor [b, classes]", todo=todo)
    return out


def loss_of(
    settings: Finetune, out: Tensor, labels: Tensor | None, teacher: Tensor | None, mask: Tensor | None = None
) -> Tensor:
    """Cross entropy with the labels and, by the share ``distill``, divergence from the float network's outputs.

    Without labels the divergence is all there is. Of outputs that are not [b, classes] it is the mean squared
    difference; of tokens [b, t, ...] for each sample that of those whose ``mask`` [b, t] is not 0. Outputs that both
    networks mask by -infinity do not differ.
    """
    out = out.float()
    share = settings.distill if labels is not None else 1.0
    total = out.new_zeros(())
    if labels is not None and share < 1:
        total = (1 - share) * F.cross_entropy(out, labels, label_smoothing=settings.smoothing)
    if share > 0:
        assert teacher is not None
        out, teacher = (t.clamp(min=LEAST) for t in (out, teacher.float()))
        total = total + share * (_divergence(out, teacher) if predicts(out) else _squares(out, teacher, mask))
    return total


def _divergence(out: Tensor, teacher: Tensor) -> Tensor:
    student, wanted = (F.log_softmax(t / TEMPERATURE, 1) for t in (out, teacher))
    return TEMPERATURE**2 * F.kl_div(student, wanted, log_target=True, reduction="batchmean")


def _squares(out: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    squares = (out - teacher).square()
    if mask is None or not masks(mask, out):
        return squares.mean()
    real = (mask != 0).to(squares)
    return ((squares.flatten(2).mean(2) * real).sum(1) / real.sum(1).clamp(min=1)).mean()


def update(
    settings: Finetune,
    optimizer: torch.optim.Optimizer,
    module: nn.Module,
    loss: Tensor,
    learning_rate: float,
    ranks: Ranks = ALONE,
) -> None:
    """Backward, mean over the processes, clip, step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    ranks.average(module.parameters())
    if settings.clip:
        torch.nn.utils.clip_grad_norm_(module.parameters(), settings.clip)
    optimizer.step()
