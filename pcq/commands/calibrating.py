"""Calibration of a planned quantization: the network, the samples, and what each step bought."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from pcq import checkpoint, models
from pcq.commands.networks import unknown
from pcq.errors import PcqError, refuse_other
from pcq.plan import Quantized
from pcq.progress import Progress, silent

if TYPE_CHECKING:
    from pcq.calibrate.steps import Outcome
    from pcq.commands.quantizing import Planned

T = TypeVar("T")

RANDOM = "random"
SAMPLES = 512
REFINE = 160
FEWEST = 8
SEEDS = 2**31

Method = Literal["proxconnect", "gptq", "rounding", "nearest"]


@dataclass(frozen=True)
class Calibration:
    """What to calibrate with.

    Attributes:
        data: a data spec, whose split ``train`` is used, without labels; or ``random``: invented samples, no data.
        samples: how many; None: 512, or what is there. A quarter as many others are held out to judge the steps by.
            Of ``random``: as many as have 4 million numbers together, 8 to 128.
        method: how each layer's quadratic is minimised; None: ``gptq`` for ``random``, else ``proxconnect``.
        seed: which samples are drawn.
        refine: optimizer steps in which each block is refined after its layers; None: 160; 0: none.
            Invented samples are not good enough for it.
        input_shape: one sample's shape, for ``random`` where the architecture does not tell.
    """

    data: str
    samples: int | None = None
    method: Method | None = None
    seed: int = 0
    input_shape: tuple[int, ...] | None = None
    refine: int | None = None

    def __post_init__(self) -> None:
        from pcq.data.inputs import sample_shape

        sample_shape(self.input_shape)
        refuse_other(self.method, (*get_args(Method), None), "--calib-method")
        if self.refine is not None and self.refine < 0:
            raise PcqError(f"{self.refine} steps cannot be made", where="--refine", allowed="0 or more")
        if self.refine and self.data == RANDOM:
            what = "blocks are not refined on invented samples, which are too unlike the real ones for that"
            raise PcqError(what, where="--refine", todo="Leave it out")
        if not 0 <= self.seed < SEEDS:
            raise PcqError(f"{self.seed} is no seed", where="--seed", allowed=f"0 to {SEEDS - 1}")
        if self.samples is not None and self.samples < FEWEST:
            raise PcqError(f"{self.samples} samples are too few", where="--samples", allowed=f"{FEWEST} or more")

    @property
    def solver(self) -> Method:
        return self.method or ("gptq" if self.data == RANDOM else "proxconnect")

    @property
    def refinement(self) -> int:
        """Optimizer steps for each block."""
        return 0 if self.data == RANDOM else REFINE if self.refine is None else self.refine

    def to_json(self, samples: int | None) -> dict[str, object]:
        """What an artifact records of it; ``samples`` were used, or asked for."""
        said = {"data": self.data, "method": self.solver, "samples": samples, "seed": self.seed}
        return {**said, "refine": self.refinement}


@dataclass(frozen=True)
class Calibrated:
    """What calibration made of a plan.

    Attributes:
        asked: what was asked for, with method and samples settled.
        network: the float network, in eval mode.
        data: the samples in words; invented ones are called so.
        outcome: the new tensors, and what each step bought.
        shape: one sample's shape; None of a network of several inputs.
    """

    asked: Calibration
    network: nn.Module
    data: str
    outcome: "Outcome"
    shape: tuple[int, ...] | None

    def to_json(self) -> dict[str, object]:
        """What an artifact records of it."""
        return self.asked.to_json(self.outcome.samples)


def calibrated(planned: "Planned", asked: Calibration, progress: Progress = silent) -> Calibrated:
    """Quantize the weights of ``planned`` with a view to what enters them; nothing is written.

    The result is also a starting point for a fine-tune: ``result.network`` with ``result.outcome.tensors()``.

    Raises:
        PcqError: the network is not known, does not run on the samples, or there are too few of them.
    """
    from pcq.calibrate.oneshot import Settings
    from pcq.calibrate.steps import calibrate_measured
    from pcq.care import CARE, care

    network = float_network(planned)
    known = first_names(network)
    chosen = {}
    for entry in planned.plan.quantized:
        if entry.parameter.tied_to is None and entry.parameter.name in known:
            chosen[known[entry.parameter.name]] = (entry.rows, entry.quantizer)
        checkpoint.refuse_non_finite(entry.parameter.name, planned.source.tensor(entry.parameter.name))
    names = [entry.parameter.name for entry in planned.plan.quantized if entry.parameter.tied_to is None]
    if lost := [name for name in names if name not in known]:
        todo = "Leave --calib out, or give the architecture with --arch"
        raise PcqError(f"the network has no parameter '{lost[0]}' to calibrate", where=str(planned.model), todo=todo)
    if len(chosen) < len(names):
        what = "two of its weights are one in the network"
        raise PcqError(what, where=str(planned.model), todo="Leave --calib out")
    stored_as = [entry.parameter.name for entry in planned.plan.entries if entry.parameter.tied_to is None]
    back = {known[name]: name for name in stored_as if name in known}
    if asked.data == RANDOM:
        shape = painted(planned, network, asked.input_shape)
        settings = replace(CARE, method=asked.solver, seed=asked.seed)
        outcome = renamed(care(network, chosen, shape, settings, asked.samples, progress), back)
        said = f"{outcome.samples} invented samples of {'x'.join(map(str, shape))}: no real data was seen"
        return Calibrated(replace(asked, samples=outcome.samples), network, said, outcome, shape)
    samples, held_out, said = draw_inputs(asked, network)
    settings = Settings(method=asked.solver, seed=asked.seed, refine=asked.refinement)
    outcome = renamed(calibrate_measured(network, chosen, samples, held_out, settings, progress), back)
    seen = tuple(samples[0].shape[1:]) if len(samples) == 1 else None
    return Calibrated(replace(asked, samples=outcome.samples), network, said, outcome, seen)


def first_names(network: nn.Module) -> dict[str, str]:
    """Of each parameter's names, the one that the network has it under first: of tied ones there are several."""
    first = {id(parameter): name for name, parameter in network.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in network.named_parameters(remove_duplicate=False)}


def renamed(outcome: "Outcome", names: Mapping[str, str]) -> "Outcome":
    """``outcome`` with other names of its tensors: those of the checkpoint, which may be others of tied weights."""

    def named(values: Mapping[str, T]) -> dict[str, T]:
        return {names.get(name, name): value for name, value in values.items()}

    return replace(
        outcome,
        quantized=named(outcome.quantized),
        changed=named(outcome.changed),
        moved=named(outcome.moved),
        plain=named(outcome.plain),
    )


def painted(planned: "Planned", network: nn.Module, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape of samples to invent: what was given, or the architecture's own.

    Raises:
        PcqError: it is not known, or the network takes whole numbers or several inputs.
    """
    from pcq.data.inputs import needed, taken

    if len(takes := needed(network)) > 1:
        raise _not_pictures(f"{len(takes)} inputs ({', '.join(takes)})")
    shape = shape or (models.example_shape(planned.arch) if planned.arch else None)
    if shape is None:
        todo = "Give it: --input 3x224x224 (channels, height, width)"
        raise PcqError("to invent samples, one sample's shape has to be known", where="--calib random", todo=todo)
    if taken(network, shape).ids is not None:
        raise _not_pictures("whole numbers, such as tokens")
    return shape


def _not_pictures(takes: str) -> PcqError:
    what = f"samples are invented as pictures, and this network takes {takes}"
    return PcqError(what, where="--calib random", todo="Give real ones, such as --calib npz:FILE")


def float_network(planned: "Planned") -> nn.Module:
    """The network with the weights of the source, in eval mode.

    Raises:
        PcqError: its architecture is not known.
    """
    source = planned.source
    if planned.arch is None:
        ready = source.module()
        if ready is None:
            what = "calibration runs the network, and its architecture is not known"
            raise unknown(what, planned.model, {name: source.shape(name) for name in source.names})
        return ready.eval()
    module = models.build(planned.arch)
    models.load_state(module, source.state_dict(), planned.arch)
    return module.eval()


def draw_inputs(
    asked: Calibration, network: nn.Module, usual: int = SAMPLES
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], str]:
    """:func:`draw` for a network of any number of inputs: an array for each, in the order of its arguments.

    Raises:
        PcqError: the data is not there, there are too few samples, or they are not the network's inputs.
    """
    from pcq.data.inputs import Several, inputs

    try:
        x, others, said = draw(asked, usual)
    except Several as several:
        found = tuple(inputs(several.arrays, network, asked.data).values())
        order, count = _drawn(asked, len(found[0]), usual)
        said = f"{count:,} samples of {', '.join(several.arrays)}, and {len(order) - count:,} others to judge by"
        return tuple(each[order[:count]] for each in found), tuple(each[order[count:]] for each in found), said
    return (x,), (others,), said


def _drawn(asked: Calibration, n: int, usual: int) -> tuple[Tensor, int]:
    """Numbers of ``n`` samples drawn by the seed, and how many of them are not held out.

    Raises:
        PcqError: there are too few.
    """
    count = min(asked.samples or usual, n * 4 // 5)
    others = min(max(FEWEST, count // 4), n - count)
    if count < FEWEST:
        raise PcqError(
            f"{n} samples are too few to calibrate with",
            where=asked.data,
            allowed=f"{FEWEST * 5 // 4} or more",
            todo="Give more, or calibrate without data: --calib random",
        )
    refuse_more(asked, n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(asked.seed))[: count + others], count


def refuse_more(asked: Calibration, n: int) -> None:
    """Of ``n`` samples.

    Raises:
        PcqError: more are asked for than leave as many as are to be held out.
    """
    if asked.samples is not None and n * 4 // 5 < asked.samples:
        raise PcqError(
            f"there are {n:,} samples, and {asked.samples:,} with as many as a quarter held out are more",
            where=asked.data,
            allowed=f"--samples {FEWEST} to {n * 4 // 5}",
        )


def draw(asked: Calibration, usual: int = SAMPLES) -> tuple[Tensor, Tensor, str]:
    """Samples, others held out, and both in words: drawn by the seed from split ``train``, never from ``test``.

    ``usual``: how many, where nothing else is asked for.

    Raises:
        PcqError: the data is not there, or there are too few samples.
    """
    from pcq.data import open_data

    data = open_data(asked.data, "train")
    numbers, count = _drawn(asked, data.n, usual)
    order = numbers.tolist()
    taken = [data.take(order[i : i + 64]) for i in range(0, len(order), 64)]
    x = torch.cat(taken)
    said = f"{count:,} samples of {data.name}, {data.split}, and {len(x) - count:,} others to judge by; labels unused"
    return x[:count], x[count:], said


def stored(planned: "Planned", made: Calibrated, progress: Progress = silent) -> "list[checkpoint.Done]":
    """What calibration found as what the artifact holds: every tensor once, shapes and dtypes as planned."""
    out: list[checkpoint.Done] = []
    outcome = made.outcome
    for entry in planned.plan.entries:
        name = entry.parameter.name
        if entry.parameter.tied_to is not None:
            continue
        if isinstance(entry, Quantized):
            exact = outcome.moved.get(name, planned.source.tensor(name)).float()
            value = outcome.quantized[name]
            noise = float((value.dequantize() - exact).square_().sum(dtype=torch.float64))
            out.append(checkpoint.Done(entry, value, float(exact.square().sum(dtype=torch.float64)), noise))
        else:
            kept = planned.source.tensor(name)
            fresh = outcome.changed.get(name)
            out.append(checkpoint.Done(entry, kept if fresh is None else fresh.to(kept.dtype).reshape(kept.shape)))
    progress("writing", len(out), len(out))
    return out
