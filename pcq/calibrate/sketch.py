"""What an error of each layer does to the network's output, in the first order.

A covariance of what enters a layer weighs all positions alike, and each for itself. But for a change D of the layer's
weights the output z changes by ``dz = sum_p J_p D x_p``: by some positions more than by others, and what they do adds
up or cancels. ``E ||dz||^2 = E <grad_W <v, z>, D>^2`` for random directions v ~ N(0, I), one for each sample
(Gauss-Newton). The mean over output channels is the matrix ``S`` of ``tr(D S D^T)``: a row's loss in it is what it does
to the output, apart from what the rows do to one another. Gradients of whole samples as in YAQA (arXiv 2505.22988),
which also has a factor for the channels; in convolutional networks that gained nothing more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pcq import tape as tapes
from pcq.calibrate.layers import Layer, find, patches
from pcq.data.inputs import masks
from pcq.logits import of_each_sample
from pcq.progress import Progress, silent
from pcq.tape import Tape

BATCH = 8
"""Samples that go through the network and back at once."""

MOST = 512
"""Samples that are looked at, at most."""

CHANNELS = 64
"""Of layers with more output channels so many random combinations are looked at, others for each batch."""


@dataclass(frozen=True)
class Shown:
    """A weight's shape, and whether something behind its layer takes up the mean of its output's change."""

    shape: tuple[int, ...]
    centred: bool


def sketches(
    module: nn.Module,
    shown: Mapping[str, Shown],
    parts: Sequence[tuple[Tensor, ...]],
    tensors: Mapping[str, Tensor],
    mask: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, tuple[Tensor, Tensor]]:
    """For each layer that the network's output can be followed back to: weight's name -> ``S [G, n, n]``, twice.

    Of either half of the batches. The mean of both has a mean diagonal of one in each group; zero where nothing depends
    on the group.

    Args:
        module: the network.
        shown: the layers to look at, by their weights' names.
        parts: the samples in equal batches.
        tensors: the parameters and buffers to use.
        mask: which of the inputs masks tokens; what is put out for those does not count.
        seed: of the directions.
        progress: called once a batch.
    """
    tape = tapes.record(module, parts[0])
    layers, _ = find(tape, {name: each.shape for name, each in shown.items()})
    generator = torch.Generator().manual_seed(seed)
    halves: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for index, part in enumerate(parts):
        progress("following the output back", index, len(parts))
        for name, found in _of_batch(tape, layers, part, tensors, shown, mask, generator).items():
            sums = halves[index % 2]
            sums[name] = sums[name] + found if name in sums else found
    progress("following the output back", len(parts), len(parts))
    result = {}
    for name, one in halves[0].items():
        other = halves[1].get(name, one)
        size = torch.diagonal(one + other, dim1=1, dim2=2).mean(1)[:, None, None] / 2
        made = tuple(torch.where(size > 0, each / size, 0.0).float() for each in (one, other))
        if all(bool(torch.isfinite(each).all()) for each in made):
            result[name] = made[0], made[1]
    return result


def _of_batch(
    tape: Tape,
    layers: Sequence[Layer],
    part: tuple[Tensor, ...],
    tensors: Mapping[str, Tensor],
    shown: Mapping[str, Shown],
    mask: int | None,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Sums over a batch's samples: name -> float64 ``[G, n, n]``."""
    now: dict[int, Tensor] = dict(zip(tape.inputs, part, strict=True))
    at, n = 0, len(part[0])
    entered: list[Tensor] = []
    left: list[Tensor] = []
    for layer in layers:
        now = tapes.run(tape, tensors, now, at, layer.op, gradient=True)
        entered.append(now[layer.x].detach())
        now = tapes.run(tape, tensors, now, layer.op, layer.op + 1, gradient=True)
        at, y = layer.op + 1, tape.ops[layer.op].outputs[0]
        left.append(now[y] if now[y].requires_grad else now[y].detach().requires_grad_())
        now[y] = left[-1].clone()  # which what follows may write into
    now = tapes.run(tape, tensors, now, at, len(tape.ops), gradient=True)
    total = first = torch.zeros(())
    for z in of_each_sample(tapes.output(tape, now), n).values():
        v = torch.zeros_like(z)
        counts = part[mask] != 0 if mask is not None and masks(part[mask], z) else slice(None)
        v[counts] = torch.randn(v[counts].shape, generator=generator, dtype=z.dtype)
        seen = v * torch.where(z.isfinite(), z, 0.0)
        total, first = total + seen.sum(), first + seen[0].sum()
    if not total.requires_grad:
        return {}
    linear = [y for layer, y in zip(layers, left, strict=True) if layer.geometry is None]
    of_first = iter(torch.autograd.grad(first, linear, retain_graph=True, allow_unused=True) if linear else ())
    gradients: Sequence[Tensor | None] = torch.autograd.grad(total, left, allow_unused=True)
    found = {}
    for layer, x, g in zip(layers, entered, gradients, strict=True):
        one = next(of_first) if layer.geometry is None else None
        if g is None:
            continue
        p, rows = patches(layer, x).float(), _rows(layer, g)
        if one is not None:
            order = _by_sample(_rows(layer, one), n)
            if order is None:
                continue
            p, rows = p[:, order], rows[order]
        if len(rows) == p.shape[1] and len(rows) % n == 0:
            found[layer.weight] = _products(layer, p, rows, n, shown, generator)
    return found


def _rows(layer: Layer, y: Tensor) -> Tensor:
    """What leaves a layer, one row for each position: ``[m, channels]``."""
    return (y if layer.geometry is None else y.movedim(1, -1)).float().flatten(0, -2)


def _by_sample(first: Tensor, n: int) -> Tensor | None:
    """Rows in the order of ``n`` samples: ``[m]``; ``first [m, channels]`` is the gradient of the first one's outputs.

    Some networks hold samples outermost, others innermost. None where it is neither.
    """
    m = len(first)
    if m % n:
        return None
    order, mine = torch.arange(m), first.any(1).nonzero()[:, 0]
    if bool((mine < m // n).all()):
        return order
    return order.reshape(-1, n).T.flatten() if bool((mine % n == 0).all()) else None


def _products(
    layer: Layer, p: Tensor, g: Tensor, n: int, shown: Mapping[str, Shown], generator: torch.Generator
) -> Tensor:
    """Sum over ``n`` samples of ``(grad_W)^T grad_W``: float64 ``[G, w, w]``.

    ``p [G, m, w]`` is what the layer's positions see, ``g [m, channels]`` the gradient of what leaves them.
    """
    if shown[layer.weight].centred:
        # about the mean of those that the output depends on: padded tokens are none of them
        reached = g.any(1) if layer.geometry is None else torch.ones(len(g), dtype=torch.bool)
        p = p - p[:, reached].mean(1, keepdim=True)
    out = g.reshape(n, len(g) // n, layer.groups, -1).permute(2, 0, 3, 1)  # [G, n, r, positions]
    if out.shape[2] > CHANNELS:
        out = torch.randn(CHANNELS, out.shape[2], generator=generator) / CHANNELS**0.5 @ out
    grads = (out @ p.reshape(layer.groups, n, -1, p.shape[2])).flatten(1, 2)
    return (grads.transpose(1, 2) @ grads).double()
