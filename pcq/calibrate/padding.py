"""Padded tokens: which rows of a network's values are theirs, so that calibration does not count them.

A row is a padded token's if what the padding holds shows in it. So that is looked for: other tokens are put where the
``attention_mask`` says padding, and the rows that are not the same then are theirs, whatever the order or shape in
which the network holds its tokens. Where there are not as many such rows as padded tokens (a pooled sentence, a sum
over all tokens) all rows count.
"""

import inspect
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from pcq import tape as tapes
from pcq.tape import Tape

MASK = "attention_mask"


def mask_at(module: nn.Module, inputs: tuple[Tensor, ...]) -> int | None:
    """Which of the inputs is a mask ``[n, t]`` of tokens; None: none is."""
    names = list(inspect.signature(module.forward).parameters)[: len(inputs)]
    at = names.index(MASK) if MASK in names else None
    return None if at is None or inputs[at].ndim != 2 or inputs[at].is_floating_point() else at


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
        if plain.ndim > 1 and int((reached := (plain != other).any(-1)).sum()) == padded:
            found[number] = ~reached
    return found


def altered(batch: tuple[Tensor, ...], at: int) -> tuple[Tensor, ...]:
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
