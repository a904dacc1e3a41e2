"""Data-free care: what a network's own BatchNorms know is enough to repair most of what rounding breaks.

A BatchNorm holds the mean and deviation that each channel had on the training images, and fixes those of what follows.
So samples need not be real to have layers see inputs of the right moments: :func:`synthesize` paints some,
:func:`reference` gives the float network the BatchNorm statistics of those samples, so that every BatchNorm in it puts
out its trained moments, and calibration against that network (``pcq.calibrate``) rounds with the layers' inputs in view
and matches every channel's mean and deviation. :func:`transferred` carries the change of the statistics over to the
trained ones. Before that :func:`equalize` moves scale between layers where that is exact (arXiv 1906.04721).
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pcq import qtensor
from pcq import tape as tapes
from pcq.calibrate.batchnorm import reestimate
from pcq.calibrate.layers import Layer, Norm, find, norms
from pcq.calibrate.oneshot import Settings, calibrate
from pcq.calibrate.steps import HIGHER, Outcome, Step, better, compared, last_kept, outputs
from pcq.errors import PcqError
from pcq.progress import Progress, silent
from pcq.qtensor import QuantizedTensor, Quantizer
from pcq.rows import Rows
from pcq.tape import Op, Tape

CARE = Settings(corrected=False)
"""Settings for invented samples: errors of the layers before are not compensated, for those are not the real ones."""


def synthesize(example: tuple[int, ...], count: int, seed: int) -> Tensor:
    """Dead leaves: overlapping discs of random size and colour, float32 ``[count, *example]``, mean 0, deviation 1.

    Like photographs they have objects in front of others, sharp edges and a spectrum that falls as a power of the
    frequency (Lee, Mumford, Huang 2001; as training images: arXiv 2106.05963). ``example`` is one sample's shape:
    channels, then any number of spatial axes; with none the samples are Gaussian.

    Raises:
        PcqError: the shape has no channel axis.
    """
    if not example:
        raise PcqError("one sample is a single number: there is nothing to paint")
    generator = torch.Generator().manual_seed(seed)
    channels, plane = example[0], example[1:]
    if not plane:
        return torch.randn(count, channels, generator=generator)
    longest = max(plane)
    axes = torch.meshgrid(*(torch.arange(length, dtype=torch.float32) for length in plane), indexing="ij")
    smallest, largest = min(2.0, longest / 2), max(longest / 2, 1.0)
    leaves = min(2000, max(16, math.prod(plane) // 64))
    images = torch.empty(count, channels, *plane)
    for image in images:
        spot = torch.rand(leaves, generator=generator)
        # radii with density ~ r^-3, the scale-invariant law; drawn large to small so that small ones stay visible
        radius = (smallest**-2 + spot * (largest**-2 - smallest**-2)).rsqrt().sort(descending=True).values
        place = [torch.rand(leaves, generator=generator) * length for length in plane]
        grey, tint = torch.randn(leaves, 1, generator=generator), torch.randn(leaves, channels, generator=generator)
        colour = (0.75 * grey + 0.66 * tint).unbind(0)
        image[:] = torch.randn(channels, generator=generator).reshape(-1, *[1] * len(plane))
        for leaf in range(leaves):
            low = [max(0, math.floor(float(p[leaf] - radius[leaf]))) for p in place]
            high = [math.ceil(float(p[leaf] + radius[leaf])) + 1 for p in place]
            window = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            apart = sum((axis[window] - p[leaf]).square() for axis, p in zip(axes, place, strict=True))
            inside = torch.as_tensor(apart) < radius[leaf].square()
            part = image[(slice(None), *window)]
            part.copy_(torch.where(inside, colour[leaf].reshape(-1, *[1] * len(plane)), part))
    return (images - images.mean()) / images.std()


def usual_count(example: tuple[int, ...]) -> int:
    """How many samples have 4 million numbers together, 8 to 128."""
    return min(128, max(8, 2**22 // math.prod(example)))


def invented(
    module: nn.Module, example: tuple[int, ...], count: int | None, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Samples ``[count, *example]``, and the BatchNorm statistics that they are to be used with; name -> tensor.

    Raises:
        PcqError: the network does not take samples of that shape, or its pass cannot be replayed.
    """
    samples = synthesize(example, count or usual_count(example), seed)
    outputs(module, {}, samples[:1])
    return samples, reference(tapes.record(module, (samples,)), tapes.state(module), (samples,))


def reference(tape: Tape, tensors: Mapping[str, Tensor], samples: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The statistics each BatchNorm sees on ``samples`` when all before it have been given theirs; name -> tensor."""
    return reestimate(tape, tensors, [samples])


def transferred(
    all_norms: list[Norm], changed: Mapping[str, Tensor], teacher: Mapping[str, Tensor], trained: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Statistics ``changed`` with respect to the ``teacher``'s, as the same change of the ``trained`` ones.

    The quantized layer's output is taken as ``ratio * y + shift`` of the float one's, per channel, on real data as on
    the samples; the deviation's ratio and the shift are what the change from teacher to changed says.
    """
    out = dict(changed)
    for norm in all_norms:
        if norm.mean not in changed:
            continue
        eps = norm.eps
        ratio = ((changed[norm.var] + eps) / (teacher[norm.var] + eps)).sqrt()
        out[norm.mean] = changed[norm.mean] - (teacher[norm.mean] - trained[norm.mean]) * ratio
        out[norm.var] = ((trained[norm.var] + eps) * ratio.square() - eps).clamp(min=0)
    return out


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
        if not reason and (layer.groups > 1 or (layer.geometry is not None and layer.geometry.transposed)):
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


def care(
    module: nn.Module,
    plan: Mapping[str, tuple[Rows, Quantizer]],
    example: tuple[int, ...],
    settings: Settings = CARE,
    count: int | None = None,
    progress: Progress = silent,
) -> Outcome:
    """Quantize the weights named in ``plan`` without any data.

    Each step is kept if it lowers the error of the network's output on invented samples that the steps did not use;
    what cannot be done here is named with the reason. A network without BatchNorm, or whose forward pass cannot be
    replayed, is rounded to nearest.

    Args:
        module: the float network, on the CPU; it is left as it is.
        plan: name of a weight -> how it is cut into rows, and what chooses the levels.
        example: the shape of one sample, such as ``(3, 224, 224)``.
        settings: of the calibration; ``batch`` does not count, for all samples go through at once.
        count: how many samples to invent; None: as many as have 4 million numbers together, 8 to 128.
        progress: called once a layer.

    Raises:
        PcqError: the network does not take samples of that shape.
    """
    trained = tapes.state(module)
    plain = {name: qtensor.quantize(quantizer, trained[name], rows) for name, (rows, quantizer) in plan.items()}
    count = count or usual_count(example)
    progress("inventing samples", 0, 2)
    samples = synthesize(example, count, settings.seed)
    progress("inventing samples", 1, 2)
    unseen = synthesize(example, count, settings.seed + 1)
    outcome = Outcome(plain, {}, {}, (), (), {}, count, len(unseen))
    outputs(module, {}, unseen, count)
    try:
        tape = tapes.record(module, (samples,))
        all_norms = norms(tape)
        reason = "" if all_norms else "the network has no BatchNorm, and so no record of its activations"
    except PcqError as problem:
        reason = str(problem)
    if reason:
        nothing = (Step("nearest levels", None), Step("data-free care", None, reason=reason))
        return replace(outcome, steps=nothing)
    teacher = {**trained, **reference(tape, trained, (samples,))}
    aim = outputs(module, teacher, unseen, count)

    def measure(name: str, quantized: Mapping[str, QuantizedTensor], changed: Mapping[str, Tensor]) -> Step:
        student = {**teacher, **changed, **{name: q.dequantize() for name, q in quantized.items()}}
        return compared(name, outputs(module, student, unseen, count), aim, time.perf_counter() - start)

    start = time.perf_counter()
    steps = [measure("nearest levels", plain, {})]
    layers, refused = find(tape, {name: rows.shape for name, (rows, _) in plan.items()})
    best, changed, moved = plain, dict[str, Tensor](), dict[str, Tensor]()
    found, unpaired = pairs(tape, layers)
    start = time.perf_counter()
    if found:
        equalized = equalize(found, teacher)
        source = {**teacher, **equalized}
        trial = {name: qtensor.quantize(quantizer, source[name], rows) for name, (rows, quantizer) in plan.items()}
        floats = {name: tensor for name, tensor in equalized.items() if name not in plan}
        step = measure(f"equalization of {len(found)} pairs", trial, floats)
        if better(step, steps[0]):
            teacher, best, changed = source, trial, floats
            moved = {name: tensor for name, tensor in equalized.items() if name in plan}
        else:
            step = replace(step, reason=HIGHER)
        steps.append(step)
    else:
        steps.append(Step("equalization", None, reason=_most_common(unpaired)))
    settings = replace(settings, batch=count)
    floats = changed
    for name, trial_settings in (
        ("moments matched through BatchNorm", replace(settings, method="nearest")),
        (f"reconstruction of each layer ({settings.method})", settings),
    ):
        start = time.perf_counter()
        result = calibrate(module, plan, (samples,), trial_settings, teacher, progress)
        fresh = {**floats, **result.changed}
        step = measure(name, result.quantized, fresh)
        if better(step, last_kept(steps)):
            best, changed = result.quantized, fresh
            outcome = replace(outcome, layers=result.layers)
        else:
            step = replace(step, reason=HIGHER)
        steps.append(step)
    changed = transferred(all_norms, changed, teacher, trained)
    return replace(outcome, quantized=best, changed=changed, moved=moved, steps=tuple(steps), plain=refused)


def _most_common(refused: Mapping[str, str]) -> str:
    reasons = list(refused.values())
    return max(sorted(set(reasons)), key=reasons.count) if reasons else "no two layers follow each other"
