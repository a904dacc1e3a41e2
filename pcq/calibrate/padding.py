"""Padded tokens: which rows of a network's values are theirs, so that calibration does not count them.

A row is a padded token's if what the padding holds shows in it. So that is looked for: other tokens are put where the
``attention_mask`` says padding, and the rows that are not the same then are theirs, whatever the order or shape in
which the network holds its tokens. Where there are not as many such rows as padded tokens (a pooled sentence, a sum
over all tokens) all rows count.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pcq import tape as tapes
from pcq.calibrate.layers import Layer
from pcq.data.inputs import named_mask, names
from pcq.tape import Tape


def mask_at(module: nn.Module, inputs: tuple[Tensor, ...]) -> int | None:
    """Which of the inputs is a mask ``[n, t]`` of tokens; None: none is."""
    return named_mask(names(module)[: len(inputs)], inputs)


def counted(
    tape: Tape,
    tensors: Mapping[str, Tensor],
    batch: tuple[Tensor, ...],
    at: int | None,
    places: Iterable[tuple[int, int]],
) -> dict[int, Tensor]:
    """Which rows of values are not padded tokens', for those values whose rows are one for each token.

    Args:
        tape: of the network.
        tensors: its parameters and buffers.
        batch: its inputs.
        at: which of them is the mask; None: no token is padded.
        places: operations, each with a value alive before it; rows lie along its last axis.

    Returns:
        The value's number -> bool, of the value's shape but the last axis.
    """
    if at is None or bool(batch[at].all()):
        return {}
    pair = [dict(zip(tape.inputs, each, strict=True)) for each in (batch, altered(batch, at))]
    padded = int((batch[at] == 0).sum())
    found: dict[int, Tensor] = {}
    before = 0
    for op, number in sorted(set(places)):
        pair = [tapes.run(tape, tensors, values, before, op) for values in pair]
        before = op
        plain, other = (values[number] for values in pair)
        if (rows := unreached(plain, other, padded)) is not None:
            found[number] = rows
    return found


def real_rows(layer: Layer, x: Tensor, real: Mapping[int, Tensor]) -> Tensor:
    """Of what enters ``layer`` the rows that count; ``real`` is from :func:`counted`."""
    return x if layer.geometry is not None or layer.x not in real else x[real[layer.x]]


def unreached(plain: Tensor, other: Tensor, padded: int) -> Tensor | None:
    """Rows along the last axis that are the same with other tokens behind the mask; None: not all but ``padded``."""
    if plain.ndim < 2:
        return None
    same = (plain == other).all(-1)
    return same if int((~same).sum()) == padded else None


def altered(batch: Sequence[Tensor], at: int) -> tuple[Tensor, ...]:
    """The batch with other tokens where input number ``at`` masks them: numbers that occur elsewhere in it."""
    mask = batch[at] != 0

    def other(x: Tensor) -> Tensor:
        if x.shape[:2] != mask.shape or x is batch[at]:
            return x
        kept = mask.reshape(*mask.shape, *[1] * (x.ndim - 2))
        if x.is_floating_point():
            return torch.where(kept, x, x + 1)
        known = x.unique()
        return torch.where(kept, x, torch.where(x == known[0], known[-1], known[0]))

    return tuple(other(x) for x in batch)
