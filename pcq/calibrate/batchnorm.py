"""BatchNorm statistics taken anew: what each BatchNorm sees when all before it use those of their own batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pcq import tape as tapes
from pcq.tape import Op, Tape


def reestimate(tape: Tape, tensors: Mapping[str, Tensor], batches: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Mean and variance of what enters each BatchNorm over all ``batches`` (of one size); name -> tensor.

    With one batch the network then puts out, at every BatchNorm, exactly the moments (mean its bias, deviation its
    weight, but for epsilon) that it has on its training data. The variance of several is the mean of theirs and the
    variance of their means.
    """
    means: dict[str, list[Tensor]] = {}
    variances: dict[str, list[Tensor]] = {}

    def normalize(op: Op, args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias, _, _, _, _, eps = args
        mean_name, var_name = tape.name_of(op.args[3]), tape.name_of(op.args[4])
        if mean_name is None or var_name is None:  # it has none of its own, such as an InstanceNorm
            made: tuple[Tensor, Tensor, Tensor] = op.function(*args)
            return made
        var, mean = torch.var_mean(x.float().transpose(0, 1).flatten(1), 1, unbiased=False)
        means.setdefault(mean_name, []).append(mean)
        variances.setdefault(var_name, []).append(var)
        empty = x.new_empty(0)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), empty, empty

    for batch in batches:
        values = dict(zip(tape.inputs, batch, strict=True))
        tapes.run(tape, tensors, values, 0, len(tape.ops), {"native_batch_norm": normalize})
    found: dict[str, Tensor] = {}
    for (mean_name, mean), (var_name, var) in zip(means.items(), variances.items(), strict=True):
        between, center = torch.var_mean(torch.stack(mean), 0, unbiased=False)
        found[mean_name], found[var_name] = center, torch.stack(var).mean(0) + between
    return found
