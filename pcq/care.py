"""Data-free care: what a network's own BatchNorms know is enough to repair most of what rounding breaks.

A BatchNorm holds the mean and deviation that each channel had on the training images, and fixes those of what follows.
So samples need not be real to have layers see inputs of the right moments: :func:`synthesize` paints some,
:func:`reference` gives the float network the BatchNorm statistics of those samples, so that every BatchNorm in it puts
out its trained moments, and calibration against that network (``pcq.calibrate``) rounds with the layers' inputs in view
and matches every channel's mean and deviation. :func:`transferred` carries the change of the statistics over to the
trained ones.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pcq import qtensor
from pcq import tape as tapes
from pcq.calibrate.batchnorm import reestimate
from pcq.calibrate.layers import Norm, norms
from pcq.calibrate.oneshot import Settings, batches
from pcq.calibrate.steps import Outcome, Step, calibrate_measured, outputs
from pcq.data.inputs import held_batch
from pcq.errors import PcqError
from pcq.progress import Progress, silent
from pcq.qtensor import Quantizer
from pcq.rows import Rows
from pcq.tape import Tape

CARE = Settings(corrected=False, fresh=False, output=False)
"""Settings for invented samples: errors of the layers before are not compensated, for those are not the real ones, and
BatchNorm statistics are not taken anew."""


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
    parts = _parts(module, samples)
    return samples, reference(tapes.record(module, parts[0]), tapes.state(module), parts)


def _parts(module: nn.Module, samples: Tensor) -> list[tuple[Tensor, ...]]:
    """All samples at once, or as many as a program of a fixed batch takes."""
    held = held_batch(module)
    return [(samples,)] if held is None else batches((samples,), held, held)


def reference(tape: Tape, tensors: Mapping[str, Tensor], parts: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """The statistics each BatchNorm sees on samples in batches when all before it have been given theirs, by name."""
    return reestimate(tape, tensors, parts)


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
    count = count or usual_count(example)
    progress("inventing samples", 0, 2)
    samples = synthesize(example, count, settings.seed)
    progress("inventing samples", 1, 2)
    unseen = synthesize(example, count, settings.seed + 1)
    outputs(module, {}, unseen, count)
    try:
        parts = _parts(module, samples)
        tape = tapes.record(module, parts[0])
        all_norms = norms(tape)
        shared = any(op.name == "native_batch_norm" and op.args[5] is False for op in tape.ops)
        why = "its BatchNorms are each used more than once" if shared else "the network has no BatchNorm"
        reason = "" if all_norms else f"{why}, and so there is no record of its activations"
    except PcqError as problem:
        reason = str(problem)
    if reason:
        plain = {name: qtensor.quantize(quantizer, trained[name], rows) for name, (rows, quantizer) in plan.items()}
        nothing = (Step("nearest levels", None), Step("data-free care", None, reason=reason))
        return Outcome(plain, {}, {}, nothing, (), {}, count, len(unseen))
    teacher = {**trained, **reference(tape, trained, parts)}
    settings = replace(settings, batch=count)
    outcome = calibrate_measured(module, plan, (samples,), (unseen,), settings, progress, teacher)
    return replace(outcome, changed=transferred(all_norms, outcome.changed, teacher, trained))
