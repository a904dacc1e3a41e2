"""Calibration step by step: each measured against the float network on samples it did not use, kept if it helps."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pcq import qtensor
from pcq import tape as tapes
from pcq.calibrate.batchnorm import reestimate
from pcq.calibrate.blocks import BlockReport, blocks, refine
from pcq.calibrate.equalization import equalize, most_common, pairs
from pcq.calibrate.layers import find
from pcq.calibrate.oneshot import LayerReport, Settings, batches, calibrate
from pcq.calibrate.padding import mask_at
from pcq.data.inputs import filled, held_batch, of_tokens, refusing
from pcq.errors import PcqError
from pcq.logits import flat, of_each_sample, predicts
from pcq.progress import Progress, silent
from pcq.qtensor import QuantizedTensor, Quantizer
from pcq.quantizers import as_they_are
from pcq.rows import Rows

STILL = 1e-12
"""The part of their squares that outputs which hardly differ are taken to vary by: less is rounding."""

MATCHED = 128
"""Samples that means and deviations are matched on after plain rounding."""


@dataclass(frozen=True)
class Step:
    """One step: its name, what the network is like after it, and why it was not taken or not kept.

    Attributes:
        name: in words.
        error: ``E ||y_q - y||^2 / E ||y - E y||^2`` of the network's output; None: unknown.
        agreement: percent of samples with the float network's top-1; None: unknown, or the output is no prediction.
        reason: why it was not taken or not kept; empty if it was.
        seconds: that it took.
    """

    name: str
    error: float | None
    agreement: float | None = None
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """Quantized weights and all else that changed.

    Attributes:
        quantized: name -> quantized weight, for all of the plan.
        changed: name -> new float tensor: BatchNorm weights, biases and statistics, biases of layers.
        moved: name -> the float weight that was quantized, where it is not the network's own.
        steps: what each step bought, in order.
        layers: one report for each reconstructed layer; empty if that was not kept.
        blocks: one report for each refined block; empty if that was not kept.
        plain: name -> why this weight was only rounded to nearest.
        samples: how many the steps used.
        held_out: how many others they were measured on.
    """

    quantized: Mapping[str, QuantizedTensor]
    changed: Mapping[str, Tensor]
    moved: Mapping[str, Tensor]
    steps: tuple[Step, ...]
    layers: tuple[LayerReport, ...]
    plain: Mapping[str, str]
    samples: int
    held_out: int
    blocks: tuple[BlockReport, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """All that differs from the float network, dequantized, by name."""
        return {**self.changed, **{name: q.dequantize() for name, q in self.quantized.items()}}


def outputs(
    module: nn.Module, tensors: Mapping[str, Tensor], x: Tensor | tuple[Tensor, ...], batch: int = 64
) -> Tensor:
    """The first of :func:`all_outputs`."""
    return all_outputs(module, tensors, x, batch)[0]


def all_outputs(
    module: nn.Module, tensors: Mapping[str, Tensor], x: Tensor | tuple[Tensor, ...], batch: int = 64
) -> tuple[Tensor, ...]:
    """``module``'s floating outputs with ``tensors`` in place of its own: float32 ``[n, ...]`` each.

    ``x`` are samples, or an array of them for each input. Where one is an ``attention_mask`` and the network puts out
    something for each token, they are ``[m, 1, ...]`` of the m tokens that it does not mask.

    Raises:
        PcqError: the module does not take the samples.
    """
    parts = []
    with tapes.evaluating(module), torch.no_grad():
        inputs = x if isinstance(x, tuple) else (x,)
        mask, held = mask_at(module, inputs), held_batch(module)
        for given in zip(*(each.split(held or batch) for each in inputs), strict=True):
            count = len(given[0])
            given = tuple(filled(each, held or count) for each in given)
            with refusing(given, "Give data of the shape that the network was trained on"):
                result = torch.func.functional_call(module, dict(tensors), given)
            floats = of_each_sample(result, len(given[0]))
            real = tuple(each[:count] for each in given)
            parts.append({place: counting(each[:count], real, mask).float() for place, each in floats.items()})
    places = [place for place in parts[0] if all(place in part for part in parts)]
    if not places:
        raise PcqError("the network puts out no numbers for each sample", where=type(module).__name__)
    return tuple(torch.cat([part[place] for part in parts]) for place in places)


def counting(y: Tensor, inputs: Sequence[Tensor], mask: int | None) -> Tensor:
    """Of an output what counts: of tokens ``[m, 1, ...]`` those that input number ``mask`` does not mask."""
    kept = of_tokens(y, inputs, mask)
    return kept if kept is y else kept.unsqueeze(1)


def output_error(y: Sequence[Tensor], aim: Sequence[Tensor]) -> float:
    """``E ||y - aim||^2 / E ||aim - E aim||^2`` of outputs ``[n, ...]``, over all of them.

    Raises:
        PcqError: ``aim``, the float network's, holds NaN.
    """
    sums = [squares(a, b) for a, b in zip(y, aim, strict=True)]
    return sum(error for error, _ in sums) / max(sum(spread for _, spread in sums), 1e-300)


def squares(y: Tensor, aim: Tensor) -> tuple[float, float]:
    """``sum ||y - aim||^2`` and ``sum ||aim - E aim||^2``, without outputs that both mask: the same infinity in both.

    NaN in ``y`` is infinitely far.

    Raises:
        PcqError: ``aim``, the float network's, holds NaN.
    """
    y, aim = (each.double().reshape(len(each), -1) for each in (y, aim))
    if lost := int(aim.isnan().any(1).sum()):
        todo = "Repair the network, or leave those samples out"
        raise PcqError(f"it puts out NaN for {lost} of {len(aim)} samples", where="the float network", todo=todo)
    infinite = aim.isinf()
    apart = (y - aim).masked_fill(infinite & (y == aim), 0)
    aim = aim.masked_fill(infinite, 0)
    mean = aim.sum(0) / (~infinite).sum(0).clamp(min=1)
    spread = float((aim - mean).masked_fill(infinite, 0).square().sum())
    error = float(apart.square().nan_to_num(nan=torch.inf, posinf=torch.inf).sum())
    return error, max(spread, STILL * float(aim.square().sum()))


def compared(name: str, y: Tensor | Sequence[Tensor], aim: Tensor | Sequence[Tensor], seconds: float = 0.0) -> Step:
    """The step after which the network puts out ``y [n, ...]`` where the float one puts out ``aim``.

    Of several outputs the error is that of all, the agreement that of the first.
    """
    y, aim = listed(y), listed(aim)
    error = output_error(y, aim)
    return Step(name, error, agreement(y[0], aim[0]), "", seconds)


def agreement(y: Tensor, aim: Tensor) -> float | None:
    """Percent of samples with equal top-1; None of what is no prediction: maps, states of tokens, single numbers."""
    y, aim = flat(y, labelled=False), flat(aim, labelled=False)
    return 100 * float((y.argmax(1) == aim.argmax(1)).float().mean()) if predicts(aim) else None


def listed(y: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """One output is a list of one."""
    return (y,) if isinstance(y, Tensor) else y


def calibrate_measured(
    module: nn.Module,
    plan: Mapping[str, tuple[Rows, Quantizer]],
    samples: tuple[Tensor, ...],
    held_out: tuple[Tensor, ...],
    settings: Settings,
    progress: Progress = silent,
    teacher: Mapping[str, Tensor] | None = None,
) -> Outcome:
    """Step by step, each on top of those that were kept, and kept if it lowers the output's error on ``held_out``.

    Scales are equalized between layers; means and deviations of every channel matched after plain rounding; layers
    reconstructed; blocks refined; BatchNorm statistics taken anew (these only if the agreement is no lower, either).

    Args:
        module: the float network; it is left as it is.
        plan: name of a weight -> how it is cut into rows, and what chooses the levels.
        samples: the network's inputs, ``[N, ...]`` each, without labels.
        held_out: other samples, to judge by.
        settings: of the reconstruction.
        progress: called once a layer, and once a block.
        teacher: tensors that replace some of the module's as the float reference.

    Raises:
        PcqError: the network does not take the samples, or its pass cannot be replayed.
    """
    exact = {**tapes.state(module), **(teacher or {})}
    aim = all_outputs(module, exact, held_out)
    steps: list[Step] = []

    def rounded(weights: Mapping[str, Tensor]) -> dict[str, QuantizedTensor]:
        return {name: qtensor.quantize(quantizer, weights[name], rows) for name, (rows, quantizer) in plan.items()}

    def measured(name: str, made: Outcome) -> Step:
        seconds = time.perf_counter() - start
        return compared(name, all_outputs(module, {**exact, **made.tensors()}, held_out), aim, seconds)

    def chosen(name: str, made: Outcome, other: Outcome) -> Outcome:
        step = measured(name, made)
        kept = better(step, last_kept(steps))
        steps.append(step if kept else replace(step, reason=HIGHER))
        return made if kept else other

    start = time.perf_counter()
    best = Outcome(rounded(exact), {}, {}, (), (), {}, 0, len(held_out[0]))
    steps.append(measured("nearest levels", best))
    start = time.perf_counter()
    parts = batches(samples, settings.batch, held_batch(module))
    used = len(parts) * len(parts[0][0])
    tape = tapes.record(module, parts[0])
    layers, plain = find(tape, {name: rows.shape for name, (rows, _) in plan.items()})
    best = replace(best, plain=plain, samples=used)
    found, refused = pairs(tape, layers)
    if found:
        moved = equalize(found, exact)
        trial = replace(
            best,
            quantized=rounded({**exact, **moved}),
            changed={name: tensor for name, tensor in moved.items() if name not in plan},
            moved={name: tensor for name, tensor in moved.items() if name in plan},
        )
        best = chosen(f"equalization of {len(found)} pairs", trial, best)
    else:
        steps.append(Step("equalization", None, reason=most_common(refused)))
    source, floats = {**exact, **best.changed, **best.moved}, best.changed
    few = tuple(each[: max(MATCHED, held_batch(module) or 0)] for each in samples)
    for some, how in ((few, replace(settings, method="nearest", corrected=False)), (samples, settings)):
        start = time.perf_counter()
        result = calibrate(module, plan, some, how, source, progress)
        trial = replace(
            best, quantized=result.quantized, changed={**floats, **result.changed}, plain=result.plain,
            layers=result.layers if how is settings else (),
        )  # fmt: skip
        best = chosen(_described(how) + _fewer(result.samples, used), trial, best)
    if settings.refine:
        start = time.perf_counter()
        refined = refine(
            tape, blocks(tape, layers, list(plan)), best.quantized, best.changed, source, parts, settings.refine,
            settings.memory, settings.seed, progress, mask_at(module, samples),
            [name for name, (_, quantizer) in plan.items() if as_they_are(quantizer)],
        )  # fmt: skip
        nearer = sum(block.after < block.before for block in refined.blocks)
        of = f" of {len(refined.blocks)}" if nearer < len(refined.blocks) else ""
        name = f"{nearer}{of} blocks refined" + _fewer(refined.samples, used)
        if nearer:
            trial = replace(best, quantized=refined.quantized, changed=refined.changed, blocks=refined.blocks)
            best = chosen(name, trial, best)
        else:
            seconds = time.perf_counter() - start
            steps.append(Step(name, None, None, "no block's output came nearer to the float one's", seconds))
    if settings.fresh:
        start = time.perf_counter()
        fresh = reestimate(tape, {**exact, **best.tensors()}, parts)
        name = "BatchNorm statistics taken anew"
        if fresh:
            trial = replace(best, changed={**best.changed, **fresh})
            step, kept = measured(name, trial), last_kept(steps)
            reason = less_like(step, kept)
            best = best if reason else trial
            steps.append(replace(step, reason=reason))
        else:
            steps.append(Step(name, None, None, "the network has no BatchNorm"))
    return replace(best, steps=tuple(steps))


HIGHER = "not kept: the error is not lower"


def last_kept(steps: Sequence[Step]) -> Step:
    """The last step that was."""
    return next(each for each in reversed(steps) if not each.reason)


def _fewer(used: int, given: int) -> str:
    return "" if used == given else f" on {used:,} of the samples"


def better(step: Step, other: Step) -> bool:
    """Whether the output's error is lower."""
    assert step.error is not None
    assert other.error is not None
    return step.error < other.error


def less_like(step: Step, other: Step) -> str:
    """Why the step is not kept that may cost no agreement either; empty: it is."""
    if not better(step, other):
        return HIGHER
    return "not kept: the agreement is lower" if (step.agreement or 0) < (other.agreement or 0) else ""


def _described(settings: Settings) -> str:
    matched = {"none": "", "mean": ", means matched", "deviation": ", means and deviations matched"}
    method = "nearest levels" if settings.method == "nearest" else f"reconstruction ({settings.method})"
    return method + matched[settings.match]
