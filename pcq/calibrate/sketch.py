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
        if not now[y].requires_grad:  # nothing before it is followed
            now[y] = now[y].detach().requires_grad_()
        left.append(now[y])
    now = tapes.run(tape, tensors, now, at, len(tape.ops), gradient=True)
    total = torch.zeros(())
    for z in of_each_sample(tapes.output(tape, now), n).values():
        v = torch.randn(z.shape, generator=generator, dtype=z.dtype)
        if mask is not None and masks(part[mask], z):
            v = v * (part[mask] != 0).to(v.dtype).reshape(*part[mask].shape, *[1] * (z.ndim - 2))
        total = total + (v * torch.where(z.isfinite(), z, 0.0)).sum()
    if not total.requires_grad:
        return {}
    found = {}
    for layer, x, g in zip(layers, entered, torch.autograd.grad(total, left, allow_unused=True), strict=True):
        if g is not None:
            made = _products(layer, x, g, n, shown[layer.weight].centred, generator)
            if made is not None:
                found[layer.weight] = made
    return found


def _products(layer: Layer, x: Tensor, g: Tensor, n: int, centred: bool, generator: torch.Generator) -> Tensor | None:
    """Sum over ``n`` samples of ``(grad_W)^T grad_W``: float64 ``[G, w, w]``.

    ``x`` enters the layer, ``g`` is the gradient of what leaves it. None where rows cannot be told by samples.
    """
    p = patches(layer, x).float()
    rows = (g if layer.geometry is None else g.movedim(1, -1)).float().flatten(0, -2)
    if len(rows) % n or len(rows) != p.shape[1]:
        return None
    if centred:
        p = p - p.mean(1, keepdim=True)
    out = rows.reshape(n, len(rows) // n, layer.groups, -1).permute(2, 0, 3, 1)  # [G, n, r, positions]
    if out.shape[2] > CHANNELS:
        out = torch.randn(CHANNELS, out.shape[2], generator=generator) / CHANNELS**0.5 @ out
    grads = (out @ p.reshape(layer.groups, n, -1, p.shape[2])).flatten(1, 2)
    return (grads.transpose(1, 2) @ grads).double()
