"""Two copies of a network moving through the same samples, layer by layer: the float one and the quantized one."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from pcq import tape as tapes
from pcq.tape import Tape


class Streams:
    """The float and the quantized network's values for every batch, kept at one place of the tape.

    Each layer's inputs are computed from the kept values, which move forward to the layer if what has to be kept there
    is at most ``memory`` bytes; else they stay and the stretch is computed again for the next layer.
    ``quantized`` is the caller's to change, for operations from the last place asked for on.
    """

    def __init__(
        self,
        tape: Tape,
        batches: list[tuple[Tensor, ...]],
        reference: Mapping[str, Tensor],
        quantized: Mapping[str, Tensor],
        memory: int,
    ) -> None:
        self.tape, self.reference, self.quantized, self.memory = tape, reference, dict(quantized), memory
        self.at = 0
        first = [dict(zip(tape.inputs, batch, strict=True)) for batch in batches]
        self.kept = [(values, values) for values in first]

    def inputs(self, op: int, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The float and the quantized network's value ``number`` just before operation ``op``, batch by batch."""
        moving = True
        for index, (reference, quantized) in enumerate(self.kept):
            pair = (
                tapes.run(self.tape, self.reference, reference, self.at, op),
                tapes.run(self.tape, self.quantized, quantized, self.at, op),
            )
            if index == 0:
                size = sum(tensor.nbytes for values in pair for tensor in values.values())
                moving = size * len(self.kept) <= self.memory
            yield pair[0][number], pair[1][number]
            if moving:
                self.kept[index] = pair
        if moving:
            self.at = op
