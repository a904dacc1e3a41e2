"""What a run can go on from, bit by bit: all of its state, gathered and put back."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from pcq import shards
from pcq.errors import PcqError
from pcq.proxconnect import Telemetry
from pcq.train import saving
from pcq.train.job import Epoch, Job
from pcq.train.run import Run, refuse_nan


def save(job: Job, run: Run, measured: saving.Metrics) -> None:
    """Write the run's state to ``job.saved``; of several processes, each gives its part of it.

    Raises:
        PcqError: it cannot be written; an earlier save stays.
        CheckFailed: the loss is not a number any more.
    """
    refuse_nan(job, run)
    here, optimizer = job.ranks.first, run.optimizer.state_dict()
    optimizer["state"] = {
        number: {key: shards.saved(value, here) if isinstance(value, Tensor) else value for key, value in each.items()}
        for number, each in optimizer["state"].items()
    }
    mine = {name: shards.saved(t, here) for name, t in job.module.state_dict().items() if name not in job.weights}
    prox = run.prox.state_dict()
    if not here:
        return
    state = {
        "module": mine,
        "optimizer": optimizer,
        "prox": prox,
        "total": run.total,
        "step": run.step,
        "looked": run.looked,
        "losses": run.losses,
        "counted": run.counted,
        "epochs": [asdict(epoch) for epoch in run.epochs],
        "telemetry": [asdict(seen) for seen in run.telemetry],
        "seconds": run.seconds,
        "metrics": measured.flushed(),
        "activations": None if run.simulation is None else run.simulation.state_dict(),
    }
    try:
        saving.save(job.saved, state, job.fingerprint)
    except PcqError as error:
        if not job.saved.is_file():
            raise
        todo = f"{error.todo}; then the same command with --resume goes on from the last save, which stays"
        raise PcqError(error.what, where=error.where, todo=todo) from error


def restore(run: Run, saved: Mapping[str, Any]) -> None:
    """Put back what :func:`save` gathered, but for the network's tensors and the metrics."""
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    state = {
        number: {
            key: shards.spread(value, parameters[number]) if _of(parameters[number], value) else value
            for key, value in each.items()
        }
        for number, each in saved["optimizer"]["state"].items()
    }
    run.optimizer.load_state_dict({**saved["optimizer"], "state": state})
    run.prox.load_state_dict(saved["prox"])
    run.step, run.looked, run.counted, run.seconds = (saved[k] for k in ("step", "looked", "counted", "seconds"))
    run.losses.copy_(saved["losses"])
    run.epochs = [Epoch(**epoch) for epoch in saved["epochs"]]
    run.telemetry = [Telemetry(**seen) for seen in saved["telemetry"]]
    if run.simulation is not None:
        run.simulation.load_state_dict(saved["activations"])


def _of(parameter: Tensor, value: object) -> bool:
    """Whether a value in the optimizer's state has an element for each of the parameter's."""
    return isinstance(value, Tensor) and value.shape == parameter.shape
