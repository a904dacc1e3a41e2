"""What an error of each convolution does to the network's output, in the first order.

A covariance of what enters a layer weighs all positions alike, and each for itself. But for a change D of the layer's
weights the output z changes by ``dz = sum_p J_p D x_p``: by some positions more than by others, and what they do adds
up or cancels. ``E ||dz||^2 = E <grad_W <v, z>, D>^2`` for random directions v ~ N(0, I), one for each sample
(Gauss-Newton). The mean over output channels is the matrix ``S`` of ``tr(D S D^T)``: a row's loss in it is what it does
to the output, apart from what the rows do to one another. Gradients of whole samples as in YAQA (arXiv 2505.22988),
which also has a factor for the channels; that gained nothing more. For convolutions only: a sentence transformer's
Linears came out worse.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pcq import tape as tapes
from pcq.calibrate.layers import Layer, find, generator, patches
from pcq.calibrate.moments import mean_diagonal
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
    """For each convolution that the network's output can be followed back to: weight's name -> ``S [G, n, n]``, twice.

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
    directions = torch.Generator().manual_seed(seed)
    halves: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for index, part in enumerate(parts):
        progress("following the output back", index, len(parts))
        try:
            products = _of_batch(tape, layers, part, tensors, shown, mask, directions, seed, index)
        except RuntimeError:  # an operation without a derivative
            return {}
        for name, found in products.items():
            sums = halves[index % 2]
            sums[name] = sums[name] + found if name in sums else found
    progress("following the output back", len(parts), len(parts))
    result = {}
    for name, one in halves[0].items():
        if name not in halves[1]:  # a single batch does not tell what it is off by
            continue
        other = halves[1][name]
        size = mean_diagonal(one + other) / 2
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
    directions: torch.Generator,
    seed: int,
    index: int,
) -> dict[str, Tensor]:
    """Sums over the samples of batch ``index``: name -> float64 ``[G, n, n]``; ``seed``: of channels' combinations."""
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
    total = torch.zeros(())
    for z in of_each_sample(tapes.output(tape, now), n).values():
        v = torch.zeros_like(z)
        counts = part[mask] != 0 if mask is not None and masks(part[mask], z) else slice(None)
        v[counts] = torch.randn(v[counts].shape, generator=directions, dtype=z.dtype)
        total = total + (v * torch.where(z.isfinite(), z, 0.0)).sum()
    if not total.requires_grad:
        return {}
    gradients: Sequence[Tensor | None] = torch.autograd.grad(total, left, allow_unused=True)
    return {
        layer.weight: _products(layer, x, g, shown[layer.weight].centred, generator(seed, layer.op, index))
        for layer, x, g in zip(layers, entered, gradients, strict=True)
        if g is not None
    }


def _products(layer: Layer, x: Tensor, g: Tensor, centred: bool, draws: torch.Generator) -> Tensor:
    """Sum over samples of ``(grad_W)^T grad_W``: float64 ``[G, w, w]``.

    ``x [n, ...]`` enters the convolution, ``g [n, channels, ...]`` is the gradient of what leaves it.
    """
    assert layer.geometry is not None
    p, groups = patches(layer, x).float(), layer.groups
    g = g if g.ndim > len(layer.geometry.kernel) + 1 else g[None]
    p = p - p.mean(1, keepdim=True) if centred else p
    out = g.float().flatten(2).unflatten(1, (groups, -1)).transpose(0, 1)  # [G, n, r, positions]
    if out.shape[2] > CHANNELS:
        out = torch.randn(CHANNELS, out.shape[2], generator=draws) / CHANNELS**0.5 @ out
    grads: Tensor = (out @ p.reshape(groups, len(g), -1, p.shape[2])).flatten(1, 2)
    return (grads.transpose(1, 2) @ grads).double()
