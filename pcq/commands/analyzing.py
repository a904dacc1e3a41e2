"""``analyze(model, recipe)``: which weights a recipe hurts, measured one by one, and what to write against it."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from pcq import checkpoint, qtensor
from pcq.budget import Option, literal
from pcq.commands.calibrating import RANDOM, Calibration, draw_inputs, float_network, painted
from pcq.commands.drawing import drawn
from pcq.commands.quantizing import Planned, plan
from pcq.errors import PcqError, raise_all
from pcq.plan import Quantized
from pcq.plots import bars, require_matplotlib
from pcq.progress import Progress, silent
from pcq.quantizers import Uniform
from pcq.recipe import Recipe

if TYPE_CHECKING:
    from pcq.qtensor import QuantizedTensor
    from pcq.sensitivity import Bench, Drift, Local, WeightNoise

SAMPLES = 128
SAFE = Uniform(8)
"""What the overrides give the weights that hurt most."""


@dataclass(frozen=True)
class AnalyzedWeight:
    """One quantized weight; what needs data, or a layer that calibration knows, is None without.

    Attributes:
        name, shape, levels: as in the ledger.
        bits, nbytes: what it takes, scales and tables included.
        sqnr: ``10 log10(sum w^2 / sum (w - w_q)^2)`` in dB, infinite where it is exact.
        weight: noise, lost signs and outliers.
        local: what it does to its layer's output.
        alone: the network with only this weight quantized.
        spared: the network with all weights quantized but this one.
        damage: what the table is ranked by: the output error of ``alone``, without data the noise's share.
        override: whether the overrides name it.
    """

    name: str
    shape: tuple[int, ...]
    levels: str
    bits: float
    nbytes: int
    sqnr: float
    weight: "WeightNoise"
    local: "Local | None"
    alone: "Drift | None"
    spared: "Drift | None"
    damage: float
    override: bool


@dataclass(frozen=True)
class AnalyzeResult:
    """What :func:`analyze` found.

    Attributes:
        planned: what was asked about.
        data: the samples in words; invented ones are called so; empty without.
        samples: how many.
        weights: from the most to the least harmful.
        whole: the network with all weights quantized; None without data.
        overrides: rules to paste before a recipe's own; empty where there is nothing to gain.
        added: bytes they would add to the tensors.
        plot: the picture, if one was asked for.
    """

    planned: Planned
    data: str
    samples: int
    weights: tuple[AnalyzedWeight, ...]
    whole: "Drift | None"
    overrides: str
    added: int
    plot: Path | None


def analyze(
    model: str | Path,
    recipe: str | Path | Recipe,
    *,
    calib: str | None = None,
    samples: int | None = None,
    seed: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    arch: str | None = None,
    overrides: Sequence[str] = (),
    key: str | None = None,
    allow_globals: Sequence[str] = (),
    unsafe_pickle: bool = False,
    plot: str | Path | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> AnalyzeResult:
    """Round every weight as the recipe says, and measure what each does to the network; nothing is quantized for good.

    Args:
        model: a checkpoint in any form of the README's table.
        recipe: a recipe file, the name of a shipped one, or a loaded one.
        calib: a data spec, whose split ``train`` is used without labels; or ``random``: invented samples. None: only
            what the weights alone tell.
        samples: how many; default 128, or four fifths of what is there.
        seed: which samples are drawn; default 0.
        input_shape: one sample's shape, for ``random`` where the architecture does not tell.
        arch, overrides, key, allow_globals, unsafe_pickle: as for :func:`pcq.quantize`.
        plot: a PNG to draw.
        force: replace a file at ``plot`` that pcq did not draw.
        progress: called after each measurement.

    Raises:
        PcqError: a weight is not finite, or the model, the recipe, the samples or the plot's path are not usable.
    """
    given = {"--samples": samples, "--seed": seed, "--input": input_shape}
    if calib is None and (asked := [option for option, value in given.items() if value is not None]):
        todo = "Say which: --calib folder:DIR, or --calib random"
        raise PcqError("this is about samples, and none were asked for", where=asked[0], todo=todo)
    if plot is not None:
        require_matplotlib()
        checkpoint.refuse_overwrite(plot, ".png", inputs=[Path(model)], force=force)
    planned = plan(
        model, recipe, arch=arch, overrides=overrides, key=key, allow_globals=allow_globals, unsafe_pickle=unsafe_pickle
    )
    if planned.recipe.budget is not None:
        todo = "Leave it out to analyze the levels that its rules give; `pcq quantize --dry-run` shows those it chooses"
        what = f"the recipe has a budget, {planned.recipe.budget}, which chooses the levels"
        raise PcqError(what, where="budget", todo=todo)
    chosen = [entry for entry in planned.plan.quantized if entry.parameter.tied_to is None]
    if not chosen:
        raise PcqError("the recipe quantizes nothing, so there is nothing to analyze", where=planned.recipe.name)
    names = [entry.parameter.name for entry in chosen]
    raise_all(checkpoint.non_finite_problems(planned.source, names))
    bench, said = (None, "") if calib is None else open_bench(planned, calib, samples, seed or 0, input_shape)
    rows, whole = measured(planned, chosen, bench, progress)
    ranked = sorted(rows, key=lambda row: -row.damage)
    safe = Option(SAFE)
    better = {
        e.parameter.name: replace(e, quantizer=SAFE, rows=safe.rows(e.parameter)).nbytes - e.nbytes for e in chosen
    }
    marked = {row.name for row in ranked[: worst([row.damage for row in ranked])] if better[row.name] > 0}
    for rule in {entry.rule for entry in chosen}:  # a rule that nothing is left for is a mistake in a recipe
        own = {e.parameter.name for e in chosen if e.rule == rule}
        marked -= own if own <= marked else set()
    ranked = [replace(row, override=row.name in marked) for row in ranked]
    named = [row.name for row in ranked if row.override]
    result = AnalyzeResult(
        planned,
        said,
        0 if bench is None else bench.samples,
        tuple(ranked),
        whole,
        paste(named),
        sum(better[name] for name in named),
        None,
    )
    return result if plot is None else drawn(result, Path(plot), _picture)


def open_bench(
    planned: Planned,
    calib: str,
    samples: int | None,
    seed: int,
    shape: tuple[int, ...] | None,
    usual: int | None = None,
) -> "tuple[Bench, str]":
    """The float network on its samples, and those in words; ``usual``: how many, where nothing else is asked for.

    Raises:
        PcqError: the network is not known or does not take the samples, or there are too few of them.
    """
    from pcq.care import invented
    from pcq.sensitivity import Bench

    asked = Calibration(calib, samples, seed=seed, input_shape=shape)
    network = float_network(planned)
    if calib == RANDOM:
        shape = painted(planned, network, shape)
        x, teacher = invented(network, shape, samples or usual, seed)
        said = f"{len(x)} invented samples of {'x'.join(map(str, shape))}: no real data was seen"
        return Bench.of(network, (x,), teacher), said
    drawn, _, said = draw_inputs(asked, network, usual or SAMPLES)
    return Bench.of(network, drawn), said.partition(", and ")[0] + "; labels unused"


def measured(
    planned: Planned, chosen: list[Quantized], bench: "Bench | None", progress: Progress
) -> "tuple[list[AnalyzedWeight], Drift | None]":
    """Every weight's row, in the plan's order, and the network with all of them quantized."""
    from pcq.sensitivity import drift, weight_noise

    rounded: dict[str, QuantizedTensor] = {}
    noises: dict[str, WeightNoise] = {}
    floats: dict[str, Tensor] = {}
    for index, entry in enumerate(chosen):
        progress("weights", index, len(chosen))
        name = entry.parameter.name
        weight = planned.source.tensor(name).float()
        rounded[name] = qtensor.quantize(entry.quantizer, weight, entry.rows)
        noises[name] = weight_noise(weight, rounded[name])
        if bench is not None:
            floats[name] = weight
    local: dict[str, list[Local]] = {}
    alone: dict[str, Drift] = {}
    spared: dict[str, Drift] = {}
    whole = None
    if bench is not None:
        values = {name: q.dequantize() for name, q in rounded.items() if name in bench.tensors}
        whole = drift(bench.outputs(values), bench.aim)
        local = bench.local({name: [q.dequantize] for name, q in rounded.items() if name in values}, progress)
        alone = bench.one_by_one({}, values, "one quantized", progress)
        spared = bench.one_by_one(values, {name: floats[name] for name in values}, "one left float", progress)
    rows = []
    for entry in chosen:
        name = entry.parameter.name
        noise = noises[name]
        rows.append(
            AnalyzedWeight(
                name,
                entry.parameter.shape,
                entry.text,
                entry.bits,
                entry.nbytes,
                -10 * math.log10(noise.share) if noise.share > 0 else math.inf,
                noise,
                local[name][0] if name in local else None,
                alone.get(name),
                spared.get(name),
                alone[name].error if name in alone else noise.share,
                False,
            )
        )
    return rows, whole


def worst(damages: Sequence[float], share: float = 0.5) -> int:
    """How many of the damages (descending) make up ``share`` of their sum; at most a quarter of them, at least one."""
    total, so_far = sum(damages), 0.0
    if total <= 0:
        return 0
    for index, damage in enumerate(damages):
        so_far += damage
        if so_far >= share * total or index + 1 >= max(1, len(damages) // 4):
            return index + 1
    return len(damages)


def paste(names: Sequence[str]) -> str:
    """Rules in YAML that give the weights ``names`` 8 bits."""
    if not names:
        return ""
    quoted = ", ".join(_literal(name) for name in names)
    return f"  - match: {{name: [{quoted}]}}\n    levels: {{kind: uniform, bits: {SAFE.bits}}}\n"


def _literal(name: str) -> str:
    """``name`` as a pattern that matches it, in a double-quoted YAML string."""
    return json.dumps(literal(name), ensure_ascii=False)


def _picture(result: AnalyzeResult) -> bytes:
    """A bar for each weight."""
    measure = "noise / signal of the weight" if result.whole is None else "output error with only this weight quantized"
    title = f"{result.planned.model.name}, {result.planned.recipe.name}"
    return bars([(row.name, row.damage, row.override) for row in result.weights], title, measure)
