"""Calibration of an ONNX model: layer by layer as pcq.calibrate does it, with ONNX Runtime computing what enters.

Layers are taken in the order in which the graph computes, a few at a time (*stage*). For a stage two models are cut off
at what enters its layers: the float one, and the one with everything before the stage quantized; both run on the same
batches, and for each layer the second moments are taken that its quadratic is made of (pcq.calibrate.oneshot). Where a
layer has a bias of its own, channel means are made equal through it, and moments are centred; where it has none, the
quadratic is that of the moments about zero, so that means count as errors.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort
import torch
from torch import Tensor

from pcq import qtensor
from pcq.atomic import scratch
from pcq.calibrate.layers import patches
from pcq.calibrate.moments import Moments, Sums
from pcq.calibrate.oneshot import LayerReport, Settings, View, bounded, centred, match, quadratic, solve
from pcq.calibrate.padding import altered, unreached
from pcq.calibrate.steps import Outcome, Step, agreement, better, counting, squares
from pcq.data.inputs import named_mask
from pcq.errors import PcqError, first_line
from pcq.export import verify, writing
from pcq.logits import main_name
from pcq.onnx_input.feeds import Array, Feeds
from pcq.onnx_input.graph import Opened, open_graph
from pcq.onnx_input.inventory import Inventory, take_inventory
from pcq.onnx_input.packing import reference
from pcq.onnx_input.sites import Site, find_sites
from pcq.onnx_input.trials import QUIET
from pcq.progress import Progress, silent
from pcq.qtensor import QuantizedTensor, Quantizer
from pcq.rows import Rows

STAGES = 16
"""Layers are taken in as many portions: each costs two runs of the network up to there."""

MOMENTS = 2**30
"""Bytes of second moments that a stage may hold at once."""

Real = dict[tuple[str, int], Tensor | None]
"""A weight and the number of a batch -> which rows that enter its layer are not padded tokens'; None: all count."""


def calibrate(
    path: Path,
    plan: Mapping[str, tuple[Rows, Quantizer]],
    samples: Feeds,
    held_out: Feeds,
    settings: Settings,
    progress: Progress = silent,
) -> Outcome:
    """Quantize the weights of ``plan`` so that the layers of the model at ``path`` keep their outputs on ``samples``.

    Args:
        path: the float model.
        plan: name of a weight -> how it is cut into rows, and what chooses the levels.
        samples: what the moments are taken from.
        held_out: others, to judge the result by: if it is no better than rounding to nearest, that is returned.
        settings: see ``pcq.calibrate.oneshot.Settings``; ``match`` other than ``none`` means biases.
        progress: called once a stage.

    Raises:
        PcqError: the model does not run on the samples.
    """
    opened = open_graph(path)
    inventory = take_inventory(opened)
    sites, refused = find_sites(opened.model, inventory, plan)
    start = time.perf_counter()
    nearest = {name: qtensor.quantize(q, inventory.weights[name].read(), rows) for name, (rows, q) in plan.items()}
    seconds = time.perf_counter() - start
    with scratch() as folder:
        work = _Work(path, opened, inventory, plan, nearest, samples, folder)
        aim = work.outputs(FLOAT, held_out)
        best = work.compared("nearest levels", _Tensors(nearest), held_out, aim, seconds)
        steps, kept = [best], _Tensors(nearest)
        layers: tuple[LayerReport, ...] = ()
        for each in (replace(settings, corrected=False), settings) if settings.corrected else (settings,):
            start = time.perf_counter()
            tensors, reports = work.reconstruct(sites, each, progress)
            seconds = time.perf_counter() - start
            aimed = "errors before in view" if each.corrected else "each layer alone"
            step = work.compared(f"reconstruction ({each.method}), {aimed}", tensors, held_out, aim, seconds)
            if better(step, best):
                best, kept, layers = step, tensors, reports
                steps = [steps[0], *map(_beaten, steps[1:]), step]
            else:
                steps.append(replace(step, reason="not kept: the error is not lower"))
    return Outcome(kept.weights, kept.biases, {}, tuple(steps), layers, refused, samples.n, held_out.n)


def _beaten(step: Step) -> Step:
    return step if step.reason else replace(step, reason="not kept: the next one is better")


@dataclass(frozen=True)
class _Tensors:
    """What stands for the float model's own: its weights, quantized, and its biases."""

    weights: Mapping[str, QuantizedTensor]
    biases: Mapping[str, Tensor] = field(default_factory=dict)


FLOAT = _Tensors({})


@dataclass(frozen=True)
class _Work:
    """A model that is calibrated.

    Attributes:
        path: the float model.
        opened, inventory: its graph and its weights.
        plan: name of a weight -> its rows and quantizer.
        nearest: each at its nearest levels.
        samples: what moments are taken from.
        folder: for drafts.
        real: filled as batches are seen.
    """

    path: Path
    opened: Opened
    inventory: Inventory
    plan: Mapping[str, tuple[Rows, Quantizer]]
    nearest: Mapping[str, QuantizedTensor]
    samples: Feeds
    folder: Path
    real: Real = field(default_factory=dict)

    def reconstruct(
        self, sites: Sequence[Site], settings: Settings, progress: Progress
    ) -> tuple[_Tensors, tuple[LayerReport, ...]]:
        """Every layer in turn: codes and levels of all weights, new biases, and what each layer loses."""
        weights = {name: self.nearest[name] for name in self.plan.keys() - {site.layer.weight for site in sites}}
        biases: dict[str, Tensor] = {}
        reports: list[LayerReport] = []
        portions = list(_stages(sites, self.inventory))
        for done, stage in enumerate(portions):
            progress("calibrating", done, len(portions))
            found = self.moments(stage, _Tensors(weights, biases), settings)
            for site, moments in zip(stage, found, strict=True):
                name = site.layer.weight
                weight, bias = self.inventory.weights[name].read(), _bias(self.opened.model, site)
                fitted, report, fresh = _layer(
                    site, weight, bias, moments, self.nearest[name], self.plan[name], settings
                )
                weights[name] = fitted
                biases |= fresh
                reports.append(report)
        progress("calibrating", len(portions), len(portions))
        return _Tensors({name: weights[name] for name in self.plan}, biases), tuple(reports)

    def moments(self, stage: Sequence[Site], tensors: _Tensors, settings: Settings) -> list[Moments]:
        """Second moments of what enters each layer of the stage, in the float model and in the one of ``tensors``."""
        graph = self.opened.model.graph
        inputs = {value.name for value in graph.inputs} - graph.initializers.keys()
        weights = self.inventory.weights
        wanted = {site.x: weights[site.layer.weight].operands[0].chain.dtype for site in stage if site.x not in inputs}
        pair = [self.session(each, wanted) for each in (FLOAT, tensors)] if wanted else []
        sums = [_Entering(site, self.inventory, self.samples, settings) for site in stage]
        for index, batch in enumerate(self.samples.batches):
            seen = [{**batch, **dict(zip(wanted, run(session, batch, self.path), strict=True))} for session in pair]
            seen = seen or [dict(batch)] * 2
            if any((site.layer.weight, index) not in self.real for site in stage):
                other, padded = _otherwise(batch)
                if padded and pair:
                    other = {**other, **dict(zip(wanted, run(pair[0], other, self.path), strict=True))}
                for one in sums:
                    rows = one.counted(seen[0][one.site.x], other[one.site.x], padded) if padded else None
                    self.real[one.site.layer.weight, index] = rows
            for one in sums:
                x, name = one.site.x, one.site.layer.weight
                one.add(seen[0][x], seen[1][x], index, self.real[name, index])
        return [one.sums.moments() for one in sums]

    def session(self, tensors: _Tensors, wanted: Mapping[str, ir.DataType] | None = None) -> ort.InferenceSession:
        """The model with these tensors, cut off at the values ``wanted`` (None: its own outputs)."""
        model = reference(open_graph(self.path), tensors.weights, tensors.biases, lazy=wanted is None)
        if wanted is not None:
            known = {value.name: value for node in model.graph for value in node.outputs}
            known |= {value.name: value for value in (*model.graph.inputs, *model.graph.initializers.values())}
            model.graph.outputs.clear()
            for name, dtype in wanted.items():
                value = known[name]
                value.type = ir.TensorType(dtype)
                model.graph.outputs.append(value)
            common.RemoveUnusedNodesPass()(model)
        cut = self.folder / "cut.onnx"
        data = writing.save(model, cut, 1_500_000_000)
        session = verify.open_session(str(cut), optimised=True)
        cut.unlink()
        if data is not None:
            data.unlink()
        return session

    def outputs(self, tensors: _Tensors, feeds: Feeds) -> list[list[Array]]:
        """Batch by batch; of what is put out for each token only those that count."""
        session, found = self.session(tensors), []
        for batch in feeds.batches:
            put_out = run(session, batch, self.path)
            inputs, at = _mask(batch)
            if at is not None:
                put_out = [counting(torch.from_numpy(np.array(y)), inputs, at).numpy() for y in put_out]
            found.append(put_out)
        return found

    def compared(
        self, name: str, tensors: _Tensors, held_out: Feeds, aim: Sequence[Sequence[Array]], seconds: float
    ) -> Step:
        """``E ||y_q - y||^2 / E ||y - E y||^2`` over all float outputs, each about its mean; and the agreement of the
        one called ``logits``, else the first."""
        ours = self.outputs(tensors, held_out)
        floats = [i for i, array in enumerate(aim[0]) if np.issubdtype(array.dtype, np.floating)]
        if not floats:
            todo = "Leave --calib out, or give the model without its last ArgMax: onnx.utils.extract_model cuts it off"
            raise PcqError("it has no float output to judge by", where=str(self.path), todo=todo)
        error = variance = 0.0
        for i in floats:
            want, got = (torch.from_numpy(np.concatenate([_flat(part[i]) for part in parts])) for parts in (aim, ours))
            if want.shape != got.shape:
                return Step(name, float("inf"), None, "", seconds)
            if len(want) == 1:
                want, got = want.reshape(-1, 1), got.reshape(-1, 1)
            apart, each = squares(got, want)
            error, variance = error + apart, variance + each
        names = [value.name or "" for value in self.opened.model.graph.outputs]
        i = names.index(main_name([names[i] for i in floats]))
        joined = (np.concatenate([np.atleast_1d(part[i]) for part in parts]) for parts in (ours, aim))
        return Step(name, error / max(variance, 1e-300), agreement(*map(torch.from_numpy, joined)), "", seconds)


def run(session: ort.InferenceSession, batch: Mapping[str, Array], path: Path) -> list[Array]:
    """All outputs for one batch; inputs that the session does not have are left out.

    Raises:
        PcqError: the model does not take the samples.
    """
    inputs = session.get_inputs()
    names = {value.name for value in inputs}
    try:
        found: list[Array] = session.run(None, {name: batch[name] for name in batch if name in names}, QUIET)
    except Exception as error:  # onnxruntime's exceptions share no class of their own
        shapes = ", ".join(f"{name} {'x'.join(map(str, array.shape))}" for name, array in batch.items())
        told = first_line(error)
        todo = "Give an array for each input as the model wants it: --calib npz:FILE"
        allowed = ", ".join(f"{value.name} {'x'.join(map(str, value.shape))}" for value in inputs)
        raise PcqError(f"the model does not take the samples ({shapes}): {told}", where=str(path), allowed=allowed,
                       todo=todo) from error  # fmt: skip
    return found


def _stages(sites: Sequence[Site], inventory: Inventory) -> Iterator[list[Site]]:
    """Portions of layers, in order."""
    most = -(-len(sites) // STAGES)
    stage: list[Site] = []
    size = 0
    for site in sites:
        rows = site.layer.channels(inventory.weights[site.layer.weight].parameter.shape)
        need = 16 * site.layer.groups * rows.length**2
        if stage and (len(stage) == most or size + need > MOMENTS):
            yield stage
            stage, size = [], 0
        stage.append(site)
        size += need
    if stage:
        yield stage


def _mask(batch: Mapping[str, Array]) -> tuple[list[Tensor], int | None]:
    """The batch's arrays, and which of them masks tokens."""
    tensors = [torch.from_numpy(np.array(array)) for array in batch.values()]
    return tensors, named_mask(list(batch), tensors)


def _otherwise(batch: Mapping[str, Array]) -> tuple[dict[str, Array], int]:
    """The batch with other tokens behind its mask, and how many are masked."""
    tensors, at = _mask(batch)
    if at is None:
        return dict(batch), 0
    other = altered(tensors, at)
    return {name: x.numpy() for name, x in zip(batch, other, strict=True)}, int((tensors[at] == 0).sum())


class _Entering:
    """Sums over batches of what enters one layer."""

    def __init__(self, site: Site, inventory: Inventory, samples: Feeds, settings: Settings) -> None:
        self.site, self.settings = site, settings
        weight = inventory.weights[site.layer.weight].read()
        rows = site.layer.channels(tuple(weight.shape))
        split = rows.split(weight).reshape(site.layer.groups, -1, rows.length)
        self.sums = Sums(split, centred(site.layer, settings), bounded(site.layer), settings.corrected)
        self.count = settings.count(site.layer.groups, rows.length, len(samples.batches))

    def counted(self, plain: Array, other: Array, padded: int) -> Tensor | None:
        """Which rows count of what enters the float network, ``other`` with other tokens behind the mask; None: all."""
        if self.site.layer.geometry is not None:
            return None
        return unreached(self._entering(plain), self._entering(other), padded)

    def add(self, float_: Array, quantized: Array, index: int, rows: Tensor | None) -> None:
        """One batch of what enters in the float and in the quantized network, of which these rows count."""
        entering = [self._entering(x) for x in (float_, quantized)]
        if not all(bool(x.isfinite().all()) for x in entering):
            what = "NaN or infinity enters its layer on the samples"
            raise PcqError(what, where=self.site.layer.weight, todo="Give others: --calib npz:FILE")
        entering = entering if rows is None else [x[rows] for x in entering]
        layer = self.site.layer
        self.sums.add(*(patches(layer, x, self.count, self.settings.generator(layer.op, index)) for x in entering))

    def _entering(self, x: Array) -> Tensor:
        return self.site.entering(torch.from_numpy(np.array(x, np.float32)))


def _bias(model: ir.Model, site: Site) -> dict[str, Tensor]:
    if site.layer.bias is None:
        return {}
    stored = model.graph.initializers[site.layer.bias].const_value
    assert stored is not None, site
    return {site.layer.bias: torch.from_numpy(np.array(stored.numpy(), np.float32))}


def _layer(
    site: Site,
    weight: Tensor,
    bias: Mapping[str, Tensor],
    found: Moments,
    nearest: QuantizedTensor,
    plan: tuple[Rows, Quantizer],
    settings: Settings,
) -> tuple[QuantizedTensor, LayerReport, dict[str, Tensor]]:
    """Codes and levels of one layer, what it loses, and its new bias."""
    rows, quantizer = plan
    view = View.of(site.layer, rows)
    q = quadratic(view.split(weight), found, settings)
    codes = solve(q, rows, quantizer, view, settings)
    new = codes.decode()
    scale = max(float(found.y_var.sum()), 1e-30)
    lost = [float(q.loss(each).sum()) / scale for each in (view.split(nearest.dequantize()), new)]
    result = QuantizedTensor(view.weight(codes.codes), codes.grid, rows)
    fresh = match(site.layer, bias, found, new, settings)
    return result, LayerReport(site.layer.weight, *lost), fresh


def _flat(array: Array) -> Array:
    """``[samples, everything else]``, float64."""
    return array.astype(np.float64).reshape(array.shape[0] if array.ndim else 1, -1)
