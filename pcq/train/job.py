"""What a fine-tune trains, and what comes out of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pcq.activations import Range
from pcq.grids import Grid
from pcq.proxconnect import Target, Telemetry
from pcq.qtensor import QuantizedTensor
from pcq.settings import Finetune
from pcq.train import augment
from pcq.train.activations import Weight8
from pcq.train.ranks import ALONE, Ranks
from pcq.train.splits import Splits


@dataclass(frozen=True)
class Job:
    """What to train.

    Attributes:
        module: the network with the weights to start from, on its device; it is trained in place.
        teacher: the float network, where its outputs are needed.
        weights: what gets levels, by name.
        splits: the data.
        data: its spec.
        settings: all else; ``augment`` and ``precision`` settled.
        saved: where the state goes that the run can go on from.
        metrics: where the measurements go.
        fingerprint: of recipe, model and data: what a saved state has to agree with.
        save_every: steps between saves; None: by the clock.
        ranks: the processes that train together; the first one writes the files.
        board: TensorBoard's folder; None: it gets nothing.
        weights8: parameters whose layers compute on activations of 8 bits; None: activations are float.
        fixed: levels of the weights that are not trained.
    """

    module: nn.Module
    teacher: nn.Module | None
    weights: Mapping[str, Target]
    splits: Splits
    data: str
    settings: Finetune
    saved: Path
    metrics: Path
    fingerprint: Mapping[str, str]
    save_every: int | None = None
    ranks: Ranks = ALONE
    board: Path | None = None
    weights8: Mapping[Tensor, Weight8] | None = None
    fixed: Mapping[str, Grid] = field(default_factory=dict)


@dataclass(frozen=True)
class Epoch:
    """One look: the score (percent) of the held-out samples with the weights on their levels, and the mean loss."""

    step: int
    epoch: float
    loss: float
    score: float


@dataclass(frozen=True)
class BatchNorm:
    """Scores (percent) of the held-out samples with the statistics of training and with those estimated anew."""

    before: float
    after: float
    kept: bool


@dataclass(frozen=True)
class Trained:
    """What came out; the module holds it too.

    Attributes:
        quantized: codes and levels of each weight that has some.
        epochs: one look an epoch.
        batchnorm: None where there is nothing to estimate.
        telemetry: the measurements over the run, the last one at its end.
        steps: optimizer steps.
        hard_from: the step from which on all weights were on their levels.
        unquantized: for post-training quantization, the score before the weights were rounded.
        resumed_at: the step that the run went on from, if it was interrupted.
        ranges: of activations, by name, where they had 8 bits.
    """

    quantized: dict[str, QuantizedTensor]
    epochs: tuple[Epoch, ...]
    batchnorm: BatchNorm | None
    telemetry: tuple[Telemetry, ...]
    steps: int
    hard_from: int
    unquantized: float | None
    resumed_at: int | None
    ranges: dict[str, Range] = field(default_factory=dict)


def quick_in_bf16(device: torch.device) -> bool:
    """Whether the machine multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    flags = Path("/proc/cpuinfo")
    return device.type == "cpu" and flags.is_file() and "avx512_bf16" in flags.read_text(errors="ignore")


def settled(settings: Finetune, data: str, device: torch.device) -> Finetune:
    """``settings`` with every ``auto`` made up, but for ``anneal``, which belongs to the method."""
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if settings.activations is None and quick_in_bf16(device) else "float32"
    return replace(settings, augment=augment.settle(settings.augment, data), precision=precision)
