"""What each quantized weight costs: measured on the weight, on its layer's output, on the network's output.

The network's output is measured with one weight quantized and all others float, and with one weight float and all
others quantized. Both replay a tape (``pcq.tape``) from the place where the weight is first used, so that what comes
before is computed once for all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcq import tape as tapes
from pcq.calibrate.layers import find, patches
from pcq.calibrate.oneshot import batches
from pcq.calibrate.padding import counted, mask_at, real_rows
from pcq.calibrate.steps import STILL, agreement, counting, listed, output_error
from pcq.data.inputs import held_batch
from pcq.errors import PcqError
from pcq.logits import flat, of_each_sample
from pcq.progress import Progress, silent
from pcq.qtensor import QuantizedTensor
from pcq.tape import Tape

BATCH = 32
POSITIONS = 8192
TINY = 1e-300
"""The least that is divided by."""
OUTLIER = 4.0
"""Deviations of its row beyond which a weight is called an outlier."""


@dataclass(frozen=True)
class Drift:
    """How far a network's output is from the float network's, over some samples.

    Attributes:
        error: ``E ||y_q - y||^2 / E ||y - E y||^2``.
        agreement: percent of samples with the same top-1; None of what is no prediction.
        kl: mean of ``KL(softmax(y) || softmax(y_q))`` in nats; None likewise.
    """

    error: float
    agreement: float | None
    kl: float | None


@dataclass(frozen=True)
class Local:
    """What quantizing a weight does to the output of its layer, on the float network's inputs.

    Attributes:
        error: ``E ||dy||^2`` over the variance of y, both summed over the channels.
        centred: the same without each channel's mean of dy: what is left when means are matched.
    """

    error: float
    centred: float


@dataclass(frozen=True)
class WeightNoise:
    """What can be said of a quantized weight without data.

    Attributes:
        share: ``sum (w_q - w)^2 / sum w^2``; 0: exact.
        flips: percent of the weights that lose their sign (they become zero, or change it).
        outliers: percent of the weights more than four deviations from the mean of their row of levels.
    """

    share: float
    flips: float
    outliers: float


def drift(outputs: Tensor | Sequence[Tensor], aims: Tensor | Sequence[Tensor]) -> Drift:
    """How far outputs ``[n, ...]`` are from the float network's: all by their error, the first by the rest."""
    error = output_error(listed(outputs), listed(aims))
    y, aim = listed(outputs)[0], listed(aims)[0]
    alike = agreement(y, aim)
    if alike is None:
        return Drift(error, None, None)
    sure, other = (F.log_softmax(flat(x, labelled=False).double(), 1) for x in (aim, y))
    apart = sure.exp() * (sure - other)
    return Drift(error, alike, max(float(apart.masked_fill(sure == -torch.inf, 0).sum(1).mean()), 0.0))


def weight_noise(weight: Tensor, quantized: QuantizedTensor) -> WeightNoise:
    """Noise, lost signs and outliers of a weight."""
    exact, rounded = weight.double(), quantized.dequantize().double()
    rows = quantized.rows.split(exact)
    outside = (rows - rows.mean(1, keepdim=True)).abs() > OUTLIER * rows.std(1, correction=0, keepdim=True)
    share = float((rounded - exact).square().sum() / exact.square().sum().clamp(min=TINY))
    lost = (exact != 0) & (exact.sign() != rounded.sign())
    return WeightNoise(share, 100 * float(lost.float().mean()), 100 * float(outside.float().mean()))


@dataclass(frozen=True)
class Bench:
    """A float network on its samples, ready to be run with other weights.

    Attributes:
        tape: its pass.
        parts: the samples in batches.
        tensors: its parameters and buffers.
        aim: what it puts out: ``[n, ...]`` for each output.
        mask: which of its inputs masks tokens; those do not count.
    """

    tape: Tape
    parts: Sequence[tuple[Tensor, ...]]
    tensors: Mapping[str, Tensor]
    aim: tuple[Tensor, ...]
    mask: int | None = None

    @staticmethod
    def of(module: nn.Module, samples: tuple[Tensor, ...], teacher: Mapping[str, Tensor] | None = None) -> "Bench":
        """``teacher``: tensors that replace some of the module's.

        Raises:
            PcqError: the network does not take the samples, or its pass cannot be replayed.
        """
        parts = batches(samples, BATCH, held_batch(module))
        tape = tapes.record(module, parts[0])
        mask = mask_at(module, samples)
        bench = Bench(tape, parts, {**tapes.state(module), **(teacher or {})}, (), mask)
        return replace(bench, aim=bench.outputs({}))

    def outputs(self, changed: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What the network puts out with some tensors ``changed``."""
        tensors = {**self.tensors, **changed}
        found = []
        for part in self.parts:
            values = tapes.run(self.tape, tensors, dict(zip(self.tape.inputs, part, strict=True)), 0, self.end)
            found.append(self._output(values, part))
        return _joined(found)

    @property
    def samples(self) -> int:
        """How many there are."""
        return sum(len(part[0]) for part in self.parts)

    @property
    def end(self) -> int:
        return len(self.tape.ops)

    def first_use(self, name: str) -> int | None:
        """The first operation that reads a tensor; None if none does."""
        places = [
            self.tape.users[n][0] for n, known in self.tape.names.items() if known == name and n in self.tape.users
        ]
        return min(places, default=None)

    def _output(self, values: Mapping[int, Tensor], part: tuple[Tensor, ...]) -> list[Tensor]:
        floats = of_each_sample(tapes.output(self.tape, values), len(part[0])).values()
        if not floats:
            raise PcqError("the network puts out no numbers for each sample")
        return [counting(each, part, self.mask).float() for each in floats]

    def one_by_one(
        self,
        base: Mapping[str, Tensor],
        swapped: Mapping[str, Tensor],
        stage: str = "",
        progress: Progress = silent,
    ) -> dict[str, Drift]:
        """The network with the tensors ``base``, and then each of ``swapped`` alone in its place: name -> drift.

        A tensor that the pass does not read does nothing.
        """
        places = {name: self.first_use(name) for name in swapped}
        order = sorted((place, name) for name, place in places.items() if place is not None)
        tensors = {**self.tensors, **base}
        found: dict[str, list[list[Tensor]]] = {name: [] for _, name in order}
        for index, part in enumerate(self.parts):
            values = dict(zip(self.tape.inputs, part, strict=True))
            at = 0
            for number, (place, name) in enumerate(order):
                progress(stage, index * len(order) + number, len(self.parts) * len(order))
                values = tapes.run(self.tape, tensors, values, at, place)
                at = place
                end = tapes.run(self.tape, {**tensors, name: swapped[name]}, values, place, self.end)
                found[name].append(self._output(end, part))
        same = drift(self.outputs(base), self.aim) if len(order) < len(swapped) else None
        return {name: drift(_joined(found[name]), self.aim) if name in found else _known(same) for name in swapped}

    def local(
        self, candidates: Mapping[str, Sequence[Callable[[], Tensor]]], progress: Progress = silent
    ) -> dict[str, list[Local]]:
        """For each weight that acts as a matrix on patches: what each candidate does to its layer's output.

        A candidate is a call that gives the weight's values. At most ``POSITIONS`` output positions are looked at.
        """
        layers, _ = find(self.tape, {name: tuple(self.tensors[name].shape) for name in candidates})
        spreads = {layer.weight: [_Spread() for _ in range(1 + len(candidates[layer.weight]))] for layer in layers}
        for index, part in enumerate(self.parts):
            values = dict(zip(self.tape.inputs, part, strict=True))
            real = counted(self.tape, self.tensors, part, self.mask, [(layer.op, layer.x) for layer in layers])
            at = 0
            for number, layer in enumerate(layers):
                progress("layers", index * len(layers) + number, len(self.parts) * len(layers))
                values = tapes.run(self.tape, self.tensors, values, at, layer.op)
                at = layer.op
                generator = torch.Generator().manual_seed(layer.op * 1009 + index)
                x = real_rows(layer, values[layer.x], real)
                p = patches(layer, x, POSITIONS // len(self.parts) + 1, generator).float()
                channels = layer.channels(tuple(self.tensors[layer.weight].shape))

                def split(weight: Tensor, layer: Any = layer, channels: Any = channels) -> Tensor:
                    rows: Tensor = channels.split(weight).reshape(layer.groups, -1, channels.length)
                    return rows.transpose(1, 2)

                exact = split(self.tensors[layer.weight].float())
                matrices = (exact, *(split(each()) - exact for each in candidates[layer.weight]))
                mean = p.mean(1, keepdim=True)
                p = p - mean
                for spread, matrix in zip(spreads[layer.weight], matrices, strict=True):
                    spread.add(p @ matrix, mean.double() @ matrix.double())
        result = {}
        for name, (own, *others) in spreads.items():
            variance = max(own.variance, STILL * own.off, TINY)
            result[name] = [Local((each.variance + each.off) / variance, each.variance / variance) for each in others]
        return result


class _Spread:
    """Of what leaves a layer, batch by batch: sums over the channels of variances and squared means.

    Variances are of differences from the mean of each batch: differences of squares would be rounding errors where
    means are large.
    """

    def __init__(self) -> None:
        self.count, self.about, self.mean = 0, 0.0, torch.zeros(1, dtype=torch.float64)

    def add(self, apart: Tensor, mean: Tensor) -> None:
        """Outputs ``[G, m, r]`` less their ``mean [G, 1, r]``."""
        m = apart.shape[1]
        part = m / (self.count + m)
        self.about += float(apart.double().square().sum()) + part * self.count * float(
            (mean - self.mean).square().sum()
        )
        self.mean = self.mean + part * (mean - self.mean)
        self.count += m

    @property
    def variance(self) -> float:
        return self.about / self.count

    @property
    def off(self) -> float:
        return float(self.mean.square().sum())


def _joined(parts: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


def _known(value: Drift | None) -> Drift:
    assert value is not None
    return value
