"""The last table of a fine-tune: each network's scores, side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from pcq import checkpoint, qtensor
from pcq.commands import starting
from pcq.commands.networks import load_network
from pcq.commands.quantizing import Planned
from pcq.commands.students import original_or_new
from pcq.data.inputs import bind_as
from pcq.models import versioned
from pcq.progress import Progress

if TYPE_CHECKING:
    from pcq.scores import Scores
    from pcq.train.job import Job


@dataclass(frozen=True)
class FinetuneRow:
    """One network of the final table: its scores on the samples held out and on the test split, if there is one."""

    weights: str
    val: "Scores"
    test: "Scores | None"


def table(
    job: "Job",
    planned: Planned,
    original: nn.Module,
    begin: starting.Start | None,
    artifact: Path,
    progress: Progress,
) -> tuple[FinetuneRow, ...]:
    """Score the float network, its one-shot and calibrated quantizations, and the file that was written, read back."""
    from pcq.scores import module_predictor
    from pcq.train.activations import simulate

    device = job.ranks.device
    oneshot = original_or_new(planned, original.cpu(), None)
    parameters = dict(oneshot.named_parameters(remove_duplicate=False))
    for entry in planned.plan.quantized:
        if entry.parameter.tied_to is None:
            data = parameters[entry.parameter.name].data
            data.copy_(qtensor.quantize(entry.quantizer, data, entry.rows).dequantize())
    name8 = "fine-tuned, 8-bit activations"
    again = checkpoint.read_artifact(artifact) if job.ranks.first else None
    if again is not None:
        tuned = load_network(again, artifact, planned.arch).module.float()
        bind_as(tuned, original)
    else:
        tuned = original_or_new(planned, original, None)
    job.ranks.share(tuned.state_dict().values())
    sets = [each for each in (job.splits.val, job.splits.test) if each is not None]
    labelled = job.splits.val.labels is not None
    reference = module_predictor(original.to(device))
    networks = {"float": original, "one-shot": oneshot}
    if begin is not None:
        networks["calibrated"] = original_or_new(planned, original, None)
        networks["calibrated"].load_state_dict(versioned(networks["calibrated"], begin.tensors), strict=False)
        job.ranks.share(networks["calibrated"].state_dict().values())
    rows = []
    last = [("fine-tuned", tuned)]
    if job.weights8 is not None:
        last += [(name8, tuned)]
        quantized, known = job.ranks.agree(None if again is None else (again.quantized, again.activations)) or ({}, {})
    for name, module in (*networks.items(), *last):
        if name == name8:
            simulate(module, quantized, known, *(x.to(device) for x in job.splits.val.given([0])))
        if name == "float" and not labelled:
            continue
        compared = None if name == "float" else reference
        scores = [
            job.ranks.evaluate(
                module_predictor(module.to(device)),
                each,
                reference=compared,
                batch=job.settings.at_once,
                progress=labelled_by(name, progress),
            )
            for each in sets
        ]
        rows.append(FinetuneRow(name, scores[0], scores[1] if len(scores) > 1 else None))
    return tuple(rows)


def labelled_by(name: str, progress: Progress) -> Progress:
    """``progress`` of scoring the network ``name``."""

    def told(stage: str, done: int, total: int) -> None:
        progress(f"{stage} {name}", done, total)

    return told
