"""Calibrated one-shot quantization: layer by layer, with the error of the layers before in view.

For each layer, in the order they run, minimise ``E ||(W x_f - E W x_f) - (W_q x_q - E W_q x_q)||^2`` over codes and
levels, with ``x_f`` what enters it in the float network and ``x_q`` in the network quantized so far. In second moments
this is ``tr((W_q - T) C (W_q - T)^T)`` plus a constant, ``C = cov(x_q)`` and the corrected target
``T = W cov(x_f, x_q) C^-1``, both as far as the samples tell them (:mod:`pcq.calibrate.moments`). Means, and where a
BatchNorm follows also deviations, of every output channel are then made equal to the float network's: through the
BatchNorm's statistics, or through the bias.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from pcq import qtensor
from pcq import tape as tapes
from pcq.calibrate.layers import Layer, Norm, find, generator, patches
from pcq.calibrate.moments import Moments, Sums, damped, doubt, mean_diagonal, noise, pull, target
from pcq.calibrate.padding import counted, mask_at, real_rows
from pcq.calibrate.quadratic import Codes, Quadratic, descend, gptq, nearest, proxconnect, refit
from pcq.calibrate.rounding import rounding
from pcq.calibrate.sketch import BATCH, MOST, Shown, sketches
from pcq.calibrate.starts import better, improved, search
from pcq.calibrate.streams import Streams
from pcq.data.inputs import held_batch
from pcq.errors import PcqError
from pcq.progress import Progress, silent
from pcq.qtensor import QuantizedTensor, Quantizer
from pcq.quantizers import as_they_are
from pcq.rows import Rows

Method = Literal["proxconnect", "gptq", "rounding", "nearest"]

LEAST = 0.3
"""The part of H that the covariance has at least: see docs/calibration.md."""

_ELEMENTS = 2**25  # numbers in the patches that the moments of a layer are taken from


@dataclass(frozen=True)
class Settings:
    """How to reconstruct.

    Attributes:
        method: ``nearest``: levels and codes of the weights alone; ``gptq``: from several starts; ``proxconnect``:
            these and its own, the better for each channel; ``rounding``: AdaRound's.
        corrected: aim at the float network's output from the quantized network's input; else at the layer's own.
        steps: of ``proxconnect``.
        rounds: how many times coordinate descent and the refit of the levels alternate.
        match: what of every channel's output is made equal to the float network's.
        damp: part of the mean diagonal that is added to H, at least.
        output: of convolutions H is what errors do to the network's output (:mod:`pcq.calibrate.sketch`), as far as
            the samples tell it; else the covariance, in which all positions count alike.
        positions: output positions that the moments of one layer are taken from, at most; fewer where a position is
            large, but at least 16 for each weight of a row.
        batch: samples that go through the network at once.
        memory: bytes of activations to keep between layers.
        refine: optimizer steps in which each block is refined after its layers; 0: none.
        fresh: try BatchNorm statistics taken anew at the end.
        seed: of the positions drawn, and of the order of the batches.
    """

    method: Method = "gptq"
    corrected: bool = True
    steps: int = 60
    rounds: int = 4
    match: Literal["none", "mean", "deviation"] = "deviation"
    damp: float = 0.01
    output: bool = True
    positions: int = 16384
    batch: int = 32
    memory: int = 2**30
    refine: int = 0
    fresh: bool = True
    seed: int = 0

    def count(self, groups: int, width: int, batches: int) -> int:
        """Positions drawn from each of ``batches``; the layer has ``groups`` groups, ``width`` weights a row."""
        most = max(min(self.positions, _ELEMENTS // (groups * width)), 16 * width)
        return most // batches + 1

    def generator(self, op: int, batch: int) -> torch.Generator:
        """Draws the positions of one layer and batch; a new one for each stream, that both draw the same."""
        return generator(self.seed, op, batch)


@dataclass(frozen=True)
class LayerReport:
    """What one layer lost: squared error of its centred output over the variance of the float network's.

    Attributes:
        weight: its name.
        nearest: with the weights rounded to their nearest levels.
        solved: with the codes and levels found.
    """

    weight: str
    nearest: float
    solved: float


@dataclass(frozen=True)
class Calibrated:
    """What :func:`calibrate` found.

    Attributes:
        quantized: name -> quantized weight, for all that were asked for.
        changed: name -> new tensor, for biases and BatchNorm statistics.
        layers: one report for each reconstructed layer.
        plain: name -> why this weight was only rounded to nearest.
        samples: how many samples were used.
    """

    quantized: dict[str, QuantizedTensor]
    changed: dict[str, Tensor]
    layers: tuple[LayerReport, ...]
    plain: dict[str, str]
    samples: int


def batches(samples: tuple[Tensor, ...], batch: int, held: int | None = None) -> list[tuple[Tensor, ...]]:
    """Equal batches of at most ``batch`` samples; fewer samples than there are batches may be left over.

    For a program of a fixed batch, ``held``, they are of that many, and as many as do not fill one are left over.

    Raises:
        PcqError: there are no samples, or fewer than the program takes at once.
    """
    count = len(samples[0])
    if count == 0 or any(len(sample) != count for sample in samples):
        raise PcqError("there are no calibration samples, or not as many of each input")
    if held is not None and count < held:
        raise PcqError(f"the program takes {held} samples at once, and there are {count}", where="calibration",
                       todo="Give more, or export it with an open batch")  # fmt: skip
    parts = -(-count // batch) if held is None else count // held
    each = held or count // parts
    return [tuple(_fast(s[i * each : (i + 1) * each]) for s in samples) for i in range(parts)]


def _fast(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def moments(
    layer: Layer, weight: Tensor, streams: Streams, settings: Settings, real: Sequence[Mapping[int, Tensor]] = ()
) -> Moments:
    """Second moments of what enters ``layer``, over all batches; ``weight [G, r, n]`` is the float one.

    ``real``: for each batch the rows that count, by the number of the value; all of them where nothing is said.
    """
    count = settings.count(len(weight), weight.shape[2], len(streams.kept))
    sums = Sums(weight, centred(layer, settings), bounded(layer), settings.corrected)
    for index, (x_f, x_q) in enumerate(streams.inputs(layer.op, layer.x)):
        if real:
            x_f, x_q = (real_rows(layer, x, real[index]) for x in (x_f, x_q))
        p_f, p_q = (patches(layer, x, count, settings.generator(layer.op, index)).float() for x in (x_f, x_q))
        sums.add(p_f, p_q)
    return sums.moments()


def centred(layer: Layer, settings: Settings) -> bool:
    """Whether a BatchNorm or a bias takes up what the mean of the layer's output changes by."""
    return settings.match != "none" and layer.shifts


def bounded(layer: Layer) -> bool:
    """Whether rows far out are bounded: those of a Linear behind which no BatchNorm weighs all rows alike."""
    return layer.geometry is None and layer.norm is None


def quadratic(weight: Tensor, found: Moments, settings: Settings) -> Quadratic:
    """The layer's quadratic: H is the covariance as far as the samples tell it, the target likewise."""
    h = found.cov + damped(found.cov, max(settings.damp, noise(found)))
    if not settings.corrected:
        return Quadratic(weight, h)
    return Quadratic(target(weight, found.cov, found.cross, pull(weight, found)), h)


def seen(q: Quadratic, halves: tuple[Tensor, Tensor] | None, settings: Settings) -> Quadratic:
    """The quadratic with what errors do to the network's output in the covariance's place, as far as that is known.

    ``halves [G, n, n]`` are from :func:`pcq.calibrate.sketch.sketches`. Their mean is mixed with the covariance so that
    the expected squared error is least: the covariance has the part rho that is the mean's own expected squared error,
    a quarter of what the halves differ by, over its squared distance from the covariance (Ledoit and Wolf 2004, Lemma
    2.1, with another target).
    """
    if halves is None:
        return q
    one, other = halves
    size, sketch = mean_diagonal(q.h), (one + other) / 2
    known = mean_diagonal(sketch) > 0
    rho = min(1.0, max(LEAST, doubt(one, other, sketch, torch.where(known, q.h / size, sketch))))
    mixed = rho * q.h + (1 - rho) * (size * sketch + damped(q.h, settings.damp))
    return replace(q, h=torch.where(known, mixed, q.h))


def together(
    layers: Sequence[Layer], plan: Mapping[str, tuple[Rows, Quantizer]], settings: Settings
) -> dict[str, dict[str, Shown]]:
    """Which convolutions are looked at in one pass back: the first one's weight -> all of theirs.

    As many as have their matrices in ``settings.memory`` bytes; one that has not goes alone.
    """
    found: dict[str, dict[str, Shown]] = {}
    first, room = "", 0
    for layer in (each for each in layers if each.geometry is not None):
        shape = plan[layer.weight][0].shape
        size = 16 * layer.groups * layer.channels(shape).length ** 2  # of both halves, in float64
        if size > room or not found:
            first, room = layer.weight, settings.memory
            found[first] = {}
        found[first][layer.weight] = Shown(shape, centred(layer, settings))
        room -= size
    return found


def solve(q: Quadratic, rows: Rows, quantizer: Quantizer, view: "View", settings: Settings) -> Codes:
    """Codes and levels for one layer."""
    grid = qtensor.fit(quantizer, view.weight(q.target), rows)
    free = not as_they_are(quantizer)
    match settings.method:
        case "gptq":
            codes = search(q, grid, view.row) if free else gptq(q, grid, view.row)
        case "rounding":
            codes = rounding(q, grid, view.row)
        case "proxconnect":
            codes = proxconnect(q, nearest(grid, view.row, q.target), settings.steps, free)
            if free:
                codes = better(q, search(q, grid, view.row), improved(q, codes))
        case "nearest":
            codes = nearest(grid, view.row, q.target)
    for _ in range(settings.rounds if settings.method != "nearest" else 0):
        if free:
            codes = refit(q, codes)
        codes, changes = descend(q, codes, 2)
        if not changes and not free:
            break
    return codes


@dataclass(frozen=True)
class View:
    """Between a weight in its own shape and as ``[G, r, n]``; ``row [G, r, n]`` is each weight's row of the grid."""

    channels: Rows
    groups: int
    row: Tensor

    @staticmethod
    def of(layer: Layer, rows: Rows) -> "View":
        channels = layer.channels(rows.shape)
        index = torch.arange(rows.g)[:, None].expand(rows.g, rows.width)
        row = channels.split(rows.merge(index).contiguous()).reshape(layer.groups, -1, channels.length)
        return View(channels, layer.groups, row.contiguous())

    def split(self, weight: Tensor) -> Tensor:
        return self.channels.split(weight).reshape(self.groups, -1, self.channels.length)

    def weight(self, split: Tensor) -> Tensor:
        return self.channels.merge(split.reshape(self.channels.g, -1)).contiguous()


def matched(
    norm: Norm, tensors: Mapping[str, Tensor], bias: Tensor, ratio: Tensor, mean_f: Tensor, mean_q: Tensor
) -> dict[str, Tensor]:
    """BatchNorm statistics under which ``ratio * (y_f - mean_f) + mean_q`` comes out as ``y_f`` did before."""
    mean, var = tensors[norm.mean], tensors[norm.var]
    ratio = ratio.clamp(min=torch.sqrt(norm.eps / (var + norm.eps)))
    return {
        norm.mean: mean_q + bias - (mean_f + bias - mean) * ratio,
        norm.var: ((var + norm.eps) * ratio.square() - norm.eps).clamp(min=0),
    }


def match(
    layer: Layer, tensors: Mapping[str, Tensor], found: Moments, new: Tensor, settings: Settings
) -> dict[str, Tensor]:
    """The tensors that make the layer's output moments with weight ``new [G, r, n]`` those of the float network."""
    if settings.match == "none" or not layer.shifts:
        return {}
    mean_q = (new @ found.mean[:, :, None]).flatten()
    mean_f = found.y_mean.flatten()
    bias = tensors[layer.bias] if layer.bias else torch.zeros_like(mean_f)
    if layer.norm is None:
        assert layer.bias is not None, layer
        return {layer.bias: bias + mean_f - mean_q}
    ratio = torch.ones_like(mean_f)
    if settings.match == "deviation":
        var_q = (new @ found.cov).mul_(new).sum(2).flatten()
        var_f = found.y_var.flatten()
        known = var_f + layer.norm.eps > 0
        ratio = torch.where(known, (var_q + layer.norm.eps) / (var_f + layer.norm.eps), 1.0).sqrt()
    return matched(layer.norm, tensors, bias, ratio, mean_f, mean_q)


def calibrate(
    module: nn.Module,
    plan: Mapping[str, tuple[Rows, Quantizer]],
    samples: tuple[Tensor, ...],
    settings: Settings = Settings(),
    teacher: Mapping[str, Tensor] | None = None,
    progress: Progress = silent,
) -> Calibrated:
    """Quantize the weights named in ``plan`` so that the network's layers keep their outputs on ``samples``.

    Args:
        module: the float network; it is left as it is.
        plan: name of a weight -> how it is cut into rows, and what chooses the levels.
        samples: the network's positional inputs ``[N, ...]``, without labels. Tokens that an ``attention_mask`` among
            them masks do not count.
        settings: see :class:`Settings`.
        teacher: tensors that replace some of the module's as the float reference.
        progress: called once a layer.

    Raises:
        PcqError: the network's forward pass cannot be replayed.
    """
    held = held_batch(module)
    parts = batches(samples, settings.batch, held)
    tape = tapes.record(module, parts[0])
    tensors = {name: _fast(tensor) for name, tensor in {**tapes.state(module), **(teacher or {})}.items()}
    layers, plain = find(tape, {name: rows.shape for name, (rows, _) in plan.items()})
    quantized = {name: qtensor.quantize(plan[name][1], tensors[name], plan[name][0]) for name in plain}
    student = {**tensors, **{name: q.dequantize() for name, q in quantized.items()}}
    streams = Streams(tape, parts, tensors, student, settings.memory)
    mask, places = mask_at(module, samples), [(layer.op, layer.x) for layer in layers]
    real = [counted(tape, tensors, part, mask, places) for part in parts]
    reports, changed = [], {}
    followed = together(layers, plan, settings) if settings.output and settings.method != "nearest" else {}
    few = batches(tuple(each[: max(MOST, held or 0)] for each in samples), BATCH, held) if followed else []
    sketched: dict[str, tuple[Tensor, Tensor]] = {}
    for index, layer in enumerate(layers):
        progress("calibrating", index, len(layers))
        rows, quantizer = plan[layer.weight]
        view = View.of(layer, rows)
        weight = view.split(tensors[layer.weight].float())
        if some := followed.get(layer.weight):
            sketched = sketches(module, some, few, tensors, mask, settings.seed, progress)
        found = moments(layer, weight, streams, settings, real)
        if not found.finite:
            plain[layer.weight] = "what enters it is not finite on these samples"
            quantized[layer.weight] = qtensor.quantize(quantizer, tensors[layer.weight], rows)
            streams.quantized[layer.weight] = _fast(quantized[layer.weight].dequantize())
            continue
        q = quadratic(weight, found, settings)
        codes = solve(seen(q, sketched.get(layer.weight), settings), rows, quantizer, view, settings)
        new = codes.decode()
        scale = max(float(found.y_var.sum()), 1e-30)
        plainly = qtensor.quantize(quantizer, tensors[layer.weight], rows).dequantize()
        reports.append(
            LayerReport(
                layer.weight, float(q.loss(view.split(plainly)).sum()) / scale, float(q.loss(new).sum()) / scale
            )
        )
        result = QuantizedTensor(view.weight(codes.codes), codes.grid, rows)
        quantized[layer.weight] = result
        streams.quantized[layer.weight] = _fast(result.dequantize())
        fresh = match(layer, tensors, found, new, settings)
        changed.update(fresh)
        streams.quantized.update(fresh)
    progress("calibrating", len(layers), len(layers))
    ordered = {name: quantized[name] for name in plan}
    return Calibrated(ordered, changed, tuple(reports), plain, len(parts) * len(parts[0][0]))
