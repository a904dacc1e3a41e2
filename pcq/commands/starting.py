"""Where a fine-tune starts from: the float network, or its calibrated quantization."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pcq.commands.calibrating import Calibrated, Calibration, calibrated
from pcq.errors import PcqError
from pcq.progress import Progress
from pcq.proxconnect import Target
from pcq.qtensor import QuantizedTensor
from pcq.settings import NEAR_RATES, Finetune, method_of

if TYPE_CHECKING:
    from pcq.commands.quantizing import Planned
    from pcq.train.ranks import Ranks


@dataclass(frozen=True)
class Start:
    """The calibrated network: what calibration says of itself, and all its tensors that are not the float network's."""

    calibrated: Calibrated
    tensors: Mapping[str, Tensor]

    @property
    def quantized(self) -> Mapping[str, QuantizedTensor]:
        return self.calibrated.outcome.quantized

    def levels(self, weights: Mapping[str, Target]) -> dict[str, Target]:
        """``weights`` with the calibrated levels to start from."""
        found = {}
        for name, target in weights.items():
            device = target.parameter.device
            grid = self.quantized[name].grid.map(lambda t, device=device: t.to(device))  # type: ignore[misc]
            found[name] = replace(target, grid=grid)
        return found


def settled(settings: Finetune, asked: Calibration | None, scratch: bool) -> Finetune:
    """``settings`` with the learning rate of a calibrated start, where they say none.

    Raises:
        PcqError: a calibrated start makes no sense with random weights, nor with a method that knows of no levels
            before its end.
    """
    if asked is None:
        return settings
    if scratch:
        raise PcqError("random weights cannot be calibrated", where="--scratch", todo="Leave out it or --calib")
    if method_of(settings).posttraining:
        what = "post-training quantization rounds at its end, so calibrated levels at its start do nothing"
        raise PcqError(what, where="--calib", todo="Choose another method, such as proxconnect")
    return settings if settings.lr is not None else replace(settings, lr=NEAR_RATES[settings.optimizer])


def start(
    planned: "Planned",
    asked: Calibration,
    module: nn.Module,
    shape: tuple[int, ...],
    here: "Ranks",
    progress: Progress,
    made: Calibrated | None = None,
) -> Start:
    """Calibrate, and give ``module`` what training starts from: latents that round to the calibrated weights.

    Norms, biases and statistics are the calibrated ones. Several processes start from the first one's. ``made``: what
    calibration found, if that is known.

    Raises:
        PcqError: the calibration samples are not usable.
    """
    made = made or calibrated(planned, shaped(asked, shape), progress)
    outcome, floats = made.outcome, dict(made.network.named_parameters(remove_duplicate=False))
    state = module.state_dict()
    with torch.no_grad():
        for name, tensor in outcome.changed.items():
            state[name].copy_(tensor)
        for name, quantized in outcome.quantized.items():
            exact = outcome.moved.get(name, floats[name].detach())
            state[name].copy_(centred(exact, quantized))
    here.share(state.values())
    return Start(made, outcome.tensors())


def shaped(asked: Calibration, shape: tuple[int, ...]) -> Calibration:
    """``asked`` with the shape of a sample, if it does not say one."""
    return asked if asked.input_shape is not None else replace(asked, input_shape=shape)


def centred(weight: Tensor, quantized: QuantizedTensor, times: int = 4) -> Tensor:
    """Latents near the float ``weight`` whose nearest levels are ``quantized``, each level the mean of its latents.

    So levels refitted to the latents (``pcq.refit``) are still the calibrated ones, but for weights at the edge between
    two levels, which cannot be moved over it: a few rounds of moving and clipping leave little of that.
    """
    from pcq.calibrate.blocks import latents

    rows = quantized.rows
    levels = quantized.grid.levels().expand(rows.g, -1)
    codes, real = rows.split(quantized.codes).long(), rows.split(torch.ones(rows.shape))
    counts = torch.zeros_like(levels).scatter_add_(1, codes, real)
    latent = rows.split(latents(weight, quantized))
    for _ in range(times):
        sums = torch.zeros_like(levels).scatter_add_(1, codes, latent * real)
        shift = torch.where(counts > 0, levels - sums / counts.clamp(min=1), 0.0)
        latent = rows.split(latents(rows.merge(latent + shift.gather(1, codes)), quantized))
    return rows.merge(latent).contiguous()
