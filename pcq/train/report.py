"""What the measurements of a run mean, in words."""

from pcq.methods import SignSwish
from pcq.prox import BinaryRelax
from pcq.settings import Finetune, method_of
from pcq.train.job import Trained
from pcq.words import counted

FEW_ON_LEVELS = 0.5
"""Share of the weights on their levels just before the hard phase, below which rounding the rest is a shock."""

NEARLY_HARD = 0.9
"""Strength just before the hard phase, below which a pull that never reaches the levels ends in a shock."""

SHORT = 0.05
"""Share of the training that the hard phase should have at least."""

RESTLESS = 1e-4
"""Share of the weights that change their level at each step, above which they have not settled."""


def warnings(trained: Trained, settings: Finetune, fitted: bool = True) -> tuple[str, ...]:
    """One sentence for each thing that went less well than it could.

    ``fitted``: whether the weights have levels that are fitted to them, and could be again while they train.
    """
    found = []
    soft = [seen for seen in trained.telemetry if seen.strength < 1]
    last = trained.telemetry[-1]
    hard = trained.steps - trained.hard_from
    posttraining = trained.unquantized is not None
    prox = method_of(settings).prox
    if soft and not posttraining and isinstance(prox, BinaryRelax | SignSwish):
        off = soft[-1].strength < NEARLY_HARD  # these put no weight on its level before the end
    else:
        off = bool(soft) and not posttraining and soft[-1].on_levels < FEW_ON_LEVELS
    if off:
        found.append(
            f"Only {100 * soft[-1].on_levels:.0f} % of the weights were on their levels when the hard phase began "
            f"at step {trained.hard_from:,} (strength {soft[-1].strength:.2f}): the pull was not converging to the "
            "levels. Let it grow longer or otherwise (finetune.anneal_end, finetune.anneal), or lower the learning "
            "rate."
        )
    if not posttraining and soft and hard < SHORT * trained.steps:
        left = f"Only {counted(hard, 'step')}" if hard else "No step"
        found.append(
            f"{left} came after the anneal: the weights had little time to settle on their levels. Train longer, "
            "or lower finetune.anneal_end."
        )
    if last.flips > RESTLESS and not posttraining:
        found.append(
            f"At the end {100 * last.flips:.3f} % of the weights still changed their level at every step: lower the "
            "learning rate towards the end (finetune.rate: onecycle or cosine), or train longer."
        )
    scores = [(epoch.score, epoch.step) for epoch in trained.epochs]
    best = max(scores, default=(0.0, 0))
    if scores and best[0] - scores[-1][0] > 1 and best[1] >= trained.hard_from:
        found.append(
            f"The held-out score was {best[0]:.2f} % at step {best[1]:,} and {scores[-1][0]:.2f} % at the end: it got "
            "worse while training on the levels. Lower the learning rate (finetune.lr)."
        )
    if fitted and settings.refit == 0 and trained.epochs and trained.epochs[-1].score < 50 and not posttraining:
        found.append(
            "The levels stayed as first fitted (finetune.refit: 0); with refitted levels training goes further."
        )
    return tuple(found)
