"""Calibration step by step: each measured against the float network on samples it did not use, kept if it helps."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pcq import qtensor
from pcq import tape as tapes
from pcq.calibrate.batchnorm import reestimate
from pcq.calibrate.blocks import BlockReport, blocks, refine
from pcq.calibrate.layers import find
from pcq.calibrate.oneshot import LayerReport, Settings, batches, calibrate
from pcq.errors import PcqError
from pcq.progress import Progress, silent
from pcq.qtensor import QuantizedTensor, Quantizer
from pcq.rows import Rows


@dataclass(frozen=True)
class Step:
    """One step: its name, what the network is like after it, and why it was not taken or not kept.

    Attributes:
        name: in words.
        error: ``E ||y_q - y||^2 / E ||y - E y||^2`` of the network's output; None: unknown.
        agreement: percent of samples with the float network's top-1; None: unknown, or fewer than two outputs.
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
    """``module``'s first floating output with ``tensors`` in place of its own: float32 ``[n, k]``.

    ``x`` are samples, or an array of them for each input.

    Raises:
        PcqError: the module does not take the samples.
    """
    parts = []
    with tapes.evaluating(module), torch.no_grad():
        inputs = x if isinstance(x, tuple) else (x,)
        for given in zip(*(each.split(batch) for each in inputs), strict=True):
            part = given[0]
            try:
                result = torch.func.functional_call(module, dict(tensors), given)
            except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
                told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                where = "samples of " + " and ".join(
                    "x".join(map(str, each.shape[1:])) or "one number" for each in inputs
                )
                todo = "Give data of the shape that the network was trained on"
                raise PcqError(f"the network does not take them: {told}", where=where, todo=todo) from error
            leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
            first = next((leaf for leaf in leaves if leaf.is_floating_point() and len(leaf) == len(part)), None)
            if first is None:
                raise PcqError("the network puts out no numbers for each sample", where=type(module).__name__)
            parts.append(first.float().flatten(1))
    return torch.cat(parts)


def compared(name: str, y: Tensor, aim: Tensor, seconds: float = 0.0) -> Step:
    """The step after which the network puts out ``y [n, k]`` where the float one puts out ``aim``."""
    error = float((y - aim).square().sum() / (aim - aim.mean(0)).square().sum().clamp(min=1e-30))
    agreement = 100 * float((y.argmax(1) == aim.argmax(1)).float().mean()) if aim.shape[1] > 1 else None
    return Step(name, error, agreement, "", seconds)


def calibrate_measured(
    module: nn.Module,
    plan: Mapping[str, tuple[Rows, Quantizer]],
    samples: tuple[Tensor, ...],
    held_out: tuple[Tensor, ...],
    settings: Settings,
    progress: Progress = silent,
) -> Outcome:
    """Reconstruct layer by layer on ``samples``, refine block by block, try BatchNorm statistics taken anew.

    The reconstruction and the refinement stay if they lower the network's output error on ``held_out``; BatchNorm
    statistics taken anew if both the error and the agreement are then no worse.

    Args:
        module: the float network; it is left as it is.
        plan: name of a weight -> how it is cut into rows, and what chooses the levels.
        samples: the network's inputs, ``[N, ...]`` each, without labels.
        held_out: other samples, to judge by.
        settings: of the reconstruction.
        progress: called once a layer, and once a block.

    Raises:
        PcqError: the network does not take the samples, or its pass cannot be replayed.
    """
    aim = outputs(module, {}, held_out)
    own = tapes.state(module)
    start = time.perf_counter()
    plain = {name: qtensor.quantize(quantizer, own[name], rows) for name, (rows, quantizer) in plan.items()}
    seconds = time.perf_counter() - start
    best = {name: q.dequantize() for name, q in plain.items()}
    steps = [compared("nearest levels", outputs(module, best, held_out), aim, seconds)]
    start = time.perf_counter()
    result = calibrate(module, plan, samples, settings, progress=progress)
    seconds = time.perf_counter() - start
    outcome = Outcome(plain, {}, {}, (), (), result.plain, result.samples, len(held_out[0]))
    trial = {**result.changed, **{name: q.dequantize() for name, q in result.quantized.items()}}
    step = compared(_described(settings), outputs(module, trial, held_out), aim, seconds)
    if better(step, steps[0]):
        best = trial
        outcome = replace(outcome, quantized=result.quantized, changed=result.changed, layers=result.layers)
    else:
        step = replace(step, reason=HIGHER)
    steps.append(step)
    parts = batches(samples, settings.batch)
    tape = tapes.record(module, parts[0])
    if settings.refine:
        start = time.perf_counter()
        layers, _ = find(tape, {name: rows.shape for name, (rows, _) in plan.items()})
        found = blocks(tape, layers, list(plan))
        refined = refine(
            tape, found, outcome.quantized, outcome.changed, own, parts, settings.refine, settings.memory,
            settings.seed, progress,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        trial = {**refined.changed, **{name: q.dequantize() for name, q in refined.quantized.items()}}
        name = f"{len(refined.blocks)} blocks refined" + _fewer(refined.samples, result.samples)
        step = compared(name, outputs(module, trial, held_out), aim, seconds)
        if better(step, last_kept(steps)):
            best = trial
            outcome = replace(outcome, quantized=refined.quantized, changed=refined.changed, blocks=refined.blocks)
        else:
            step = replace(step, reason=HIGHER)
        steps.append(step)
    start = time.perf_counter()
    fresh = reestimate(tape, {**own, **best}, parts)
    name = "BatchNorm statistics taken anew"
    if fresh:
        seconds = time.perf_counter() - start
        step = compared(name, outputs(module, {**best, **fresh}, held_out), aim, seconds)
        kept = last_kept(steps)
        if better(step, kept) and (step.agreement or 0) >= (kept.agreement or 0):
            outcome = replace(outcome, changed={**outcome.changed, **fresh})
        else:
            step = replace(step, reason="not kept: no better on the samples held out")
        steps.append(step)
    else:
        steps.append(Step(name, None, None, "the network has no BatchNorm"))
    return replace(outcome, steps=tuple(steps))


HIGHER = "not kept: the error is not lower"


def last_kept(steps: Sequence[Step]) -> Step:
    """The last step that was."""
    return next(each for each in reversed(steps) if not each.reason)


def _fewer(used: int, given: int) -> str:
    return "" if used == given else f" on {used:,} of the samples, which fit into memory"


def better(step: Step, other: Step) -> bool:
    """Whether the output's error is lower."""
    assert step.error is not None
    assert other.error is not None
    return step.error < other.error


def _described(settings: Settings) -> str:
    matched = {"none": "", "mean": ", means matched", "deviation": ", means and deviations matched"}
    return f"reconstruction ({settings.method}){matched[settings.match]}"
