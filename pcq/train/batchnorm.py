"""BatchNorm statistics estimated anew: those of training belong to weights that have moved since."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pcq.data import Inputs

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def layers(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The layers that keep statistics."""
    found = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [m for m in found if m.running_mean is not None]


def statistics(module: nn.Module) -> list[Tensor]:
    """Copies of all of them."""
    return [getattr(layer, name).clone() for layer in layers(module) for name in STATISTICS]


def put(module: nn.Module, kept: list[Tensor]) -> None:
    """Copies back what :func:`statistics` took."""
    into = (getattr(layer, name) for layer in layers(module) for name in STATISTICS)
    for tensor, value in zip(into, kept, strict=True):
        tensor.copy_(value)


@torch.no_grad()
def reestimate(module: nn.Module, samples: Iterable[Inputs]) -> None:
    """Set every layer's statistics to the mean over ``samples`` (batches of one size) of the batches' own.

    The rest of the network is in eval mode, so nothing else changes.
    """
    found = layers(module)
    momenta = [layer.momentum for layer in found]
    module.eval()
    for layer in found:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean over the batches
        layer.train()
    try:
        for x in samples:
            module(*x)
    finally:
        for layer, momentum in zip(found, momenta, strict=True):
            layer.momentum = momentum
        module.eval()


@contextmanager
def borrowed(module: nn.Module, samples: Iterable[Inputs]) -> Iterator[None]:
    """Within it the statistics are those of :func:`reestimate`; afterwards they are as before."""
    kept = statistics(module)
    if kept:
        reestimate(module, samples)
    try:
        yield
    finally:
        put(module, kept)
