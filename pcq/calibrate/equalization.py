"""Scale moved between layers where that is exact, so that the ranges of a layer's input channels are in balance.

Cross-layer equalization (arXiv 1906.04721) between a layer whose BatchNorm takes the scale and the one that reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pcq.calibrate.layers import Layer, Norm
from pcq.tape import Op, Tape


@dataclass(frozen=True)
class Pair:
    """Two layers between which scale can move: ``second`` alone reads the activation of ``norm``'s output."""

    first: Layer
    norm: Norm
    second: Layer


def pairs(tape: Tape, layers: list[Layer]) -> tuple[list[Pair], dict[str, str]]:
    """The pairs of ``layers`` that equalization is exact for, and for every other second layer the reason against it.

    Exact: convolution or Linear, BatchNorm with weight and bias, nothing or an activation with ``f(s x) = s f(x)`` for
    ``s > 0``, then a convolution without groups or a Linear, each value read only by the next.
    """
    found: list[Pair] = []
    refused: dict[str, str] = {}
    by_norm = {layer.norm.op: layer for layer in layers if layer.norm is not None}
    for layer in layers:
        number, reason = layer.x, ""
        while not reason:
            maker = tape.makers.get(number)
            if tape.sole_user(number) is None:
                reason = "its input is used elsewhere too"
            elif maker is None:
                reason = "its input is the network's"
            elif maker in by_norm:
                break
            elif tape.ops[maker].name in ("relu", "leaky_relu") or _pads_with_zeros(tape.ops[maker]):
                number = tape.ops[maker].args[0].number
            else:
                reason = f"'{tape.ops[maker].name}' before it does not pass a scale on"
        first = by_norm.get(tape.makers.get(number, -1))
        if not reason and (first is None or first.norm is None or not first.norm.weight or not first.norm.bias):
            reason = "the BatchNorm before it has no weight and bias"
        if not reason and (layer.groups > 1 or layer.transposed):
            reason = "scaling the inputs of a grouped or transposed convolution is not done"
        if reason:
            refused[layer.weight] = reason
        else:
            assert first is not None
            assert first.norm is not None
            found.append(Pair(first, first.norm, layer))
    return found, refused


def _pads_with_zeros(op: Op) -> bool:
    return op.name == "constant_pad_nd" and (len(op.args) < 3 or op.args[2] == 0)


def equalize(found: list[Pair], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New tensors under which the network computes the same, with ranges of inputs and outputs in balance.

    Channel c between the layers is divided by ``s_c = sqrt(r1 r2) / r2`` (arXiv 1906.04721, eq. 11), r1 the range of
    the first layer's output channel with the BatchNorm's slope, r2 that of the second layer's input channel; s is kept
    in 1/8 .. 8. Only the BatchNorm's weight and bias and the second layer's weight change.
    """
    now = dict(tensors)
    changed: dict[str, Tensor] = {}
    for pair in found:
        assert pair.norm.weight, pair
        assert pair.norm.bias, pair
        gamma, beta = now[pair.norm.weight], now[pair.norm.bias]
        weight = now[pair.second.weight]
        own = pair.first.channels(tuple(now[pair.first.weight].shape)).split(now[pair.first.weight])
        slope = gamma.abs() / (now[pair.norm.var] + pair.norm.eps).sqrt()
        r1, r2 = own.abs().amax(1) * slope, weight.transpose(0, 1).flatten(1).abs().amax(1)
        sound = (r1 > 0) & (r2 > 0)
        s = torch.where(sound, (r1 / r2).sqrt(), 1.0).clamp(0.125, 8.0)
        update = {
            pair.norm.weight: gamma / s,
            pair.norm.bias: beta / s,
            pair.second.weight: weight * s.reshape(1, -1, *[1] * (weight.ndim - 2)),
        }
        changed.update(update)
        now.update(update)
    return changed


def most_common(refused: Mapping[str, str]) -> str:
    """Why most layers are in no pair."""
    reasons = list(refused.values())
    return max(sorted(set(reasons)), key=reasons.count) if reasons else "no two layers follow each other"
