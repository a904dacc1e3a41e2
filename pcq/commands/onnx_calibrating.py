"""Calibration of a planned ONNX model: the samples, and what came of it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pcq.commands.calibrating import FEWEST, RANDOM, SAMPLES, Calibration, draw, refuse_more
from pcq.errors import PcqError
from pcq.progress import Progress, silent

if TYPE_CHECKING:
    from pcq.calibrate.steps import Outcome
    from pcq.commands.quantizing import Planned
    from pcq.onnx_input.feeds import Array, Feeds

INVENTED = 64
"""Random samples, where nothing else is said."""

LARGEST = 2**32
"""Bytes of random samples, all of which are held at once."""


@dataclass(frozen=True)
class OnnxCalibrated:
    """What calibration made of a plan for an ONNX model.

    Attributes:
        asked: what was asked for, with method and samples settled.
        data: the samples in words.
        outcome: the new tensors, and what each step bought.
    """

    asked: Calibration
    data: str
    outcome: "Outcome"

    def to_json(self) -> dict[str, object]:
        """What the file's metadata records of it."""
        return {"data": self.asked.data, "method": self.asked.solver, "samples": self.outcome.samples,
                "seed": self.asked.seed}  # fmt: skip


def calibrated_onnx(planned: "Planned", asked: Calibration, progress: Progress = silent) -> OnnxCalibrated:
    """Quantize the weights of an ONNX model's plan with a view to what enters them; nothing is written.

    Raises:
        PcqError: the model does not run on the samples, or there are too few of them.
    """
    from pcq.calibrate.oneshot import Settings
    from pcq.onnx_input.calibrating import calibrate

    samples, held_out, said = feeds(planned.model, asked)
    chosen = {entry.parameter.name: (entry.rows, entry.quantizer) for entry in planned.plan.quantized}
    settings = Settings(method=asked.solver, seed=asked.seed, match="mean")
    outcome = calibrate(planned.model, chosen, samples, held_out, settings, progress)
    return OnnxCalibrated(replace(asked, samples=outcome.samples), said, outcome)


def feeds(model: Path, asked: Calibration) -> "tuple[Feeds, Feeds, str]":
    """Samples, others held out, and both in words.

    A data spec feeds a model of one input; ``npz:FILE`` whose arrays are named like the inputs feeds any: those as long
    as the longest are samples, others (a sample rate, a state) are given to every batch. ``random``: normal numbers.

    Raises:
        PcqError: the data is not there, too little, or not for this model.
    """
    from pcq.data.inputs import refuse, refuse_kind
    from pcq.onnx_input import open_graph
    from pcq.onnx_input.feeds import invented, named
    from pcq.onnx_input.trials import KINDS, find_trials, input_session, listed, read_arrays, refuse_strange

    session = input_session(model)
    refuse_strange(session, model)
    inputs = session.get_inputs()
    if not inputs:
        raise PcqError(
            "it takes no inputs, so there is nothing to calibrate on", where=str(model), todo="Leave --calib out"
        )
    first = inputs[0].shape[0] if inputs[0].shape else None
    batch = first if isinstance(first, int) and first > 0 else None
    most = asked.samples or (INVENTED if asked.data == RANDOM else SAMPLES)
    count = most + max(FEWEST, most // 4)
    names = [value.name for value in inputs]
    file = Path(asked.data.removeprefix("npz:")).expanduser()
    if asked.data == RANDOM:
        feed = find_trials(model, open_graph(model).model)[0].feed
        if (nbytes := count * sum(array.nbytes for array in feed.values())) > LARGEST:
            raise PcqError(f"{count} samples of the model's inputs take {nbytes / 1e9:.1f} GB", where=asked.data,
                           allowed=f"up to {LARGEST / 1e9:.1f} GB", todo="Give fewer: --samples N")  # fmt: skip
        everything = invented(feed, count, asked.seed)
        return _divided(everything, most, "random numbers: no real data was seen", asked.data)
    if asked.data.startswith("npz:") and (len(inputs) > 1 or names[0] in listed(file)):
        arrays, said = read_arrays(file, names), f"npz {file}"
    elif len(inputs) == 1:
        x, held, said = draw(asked)
        arrays = {names[0]: np.concatenate([x.numpy(), held.numpy()])}
    else:
        raise PcqError(
            f"a data spec feeds one input, and the model has {len(inputs)} ({', '.join(names)})", where=asked.data,
            todo="Save an array for each and give --calib npz:FILE",
        )  # fmt: skip
    arrays = {value.name: _images(np.asarray(arrays[value.name]), np.dtype(KINDS[value.type])) for value in inputs}
    for value in inputs:
        given = arrays[value.name]
        refuse_kind(given.dtype.kind == "f", np.dtype(KINDS[value.type]), value.name, asked.data, only=len(inputs) == 1)
    arrays = {value.name: arrays[value.name].astype(KINDS[value.type], copy=False) for value in inputs}
    for name, array in arrays.items():
        if array.ndim and array.dtype.kind == "f":  # masks may be infinite
            refuse(torch.from_numpy(np.isnan(array)), "NaN", f"{asked.data}, {name}")
    everything = named(arrays, batch, count, asked.seed, asked.data)
    if (n := max((len(array) for array in arrays.values() if array.ndim), default=0)) >= FEWEST * 5 // 4:
        refuse_more(asked, n)
    return _divided(everything, most, said, asked.data)


def _images(array: "Array", takes: "np.dtype[Any]") -> "Array":
    """8-bit images as everywhere else: divided by 255, channels first; unless the model ``takes`` whole numbers."""
    from pcq.data.inputs import channels_first, is_images

    found = torch.from_numpy(np.array(array)) if array.dtype == np.uint8 else None
    if takes.kind != "f" or found is None or not is_images(found):
        return array
    return (channels_first(found)[0].float() / 255).numpy()


def _divided(everything: "Feeds", most: int, said: str, where: str) -> "tuple[Feeds, Feeds, str]":
    if everything.n < FEWEST * 5 // 4 or len(everything.batches) < 2:
        raise PcqError(f"{everything.n} samples are too few to calibrate with", where=where,
                       allowed=f"{max(FEWEST * 5 // 4, 2 * everything.batch)} or more")  # fmt: skip
    samples, held_out = everything.split(min(most, everything.n * 4 // 5))
    return samples, held_out, f"{samples.n:,} samples of {said}, and {held_out.n:,} others to judge by"
