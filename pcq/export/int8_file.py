"""From a packed float ONNX file to one that runs on int8 activations, measured before it is accepted.

The codes in the file stay as they are; what is new are ranges, and the place of each layer: *static*, *dynamic*
(pcq.export.int8) or float. Layers whose int8 costs more than is allowed go back to float, worst first: they are ranked
by how far the network's outputs (where it costs points only, the one that counts) move when that layer alone
runs in int8, and as few of them as suffice go back.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from torch import Tensor

from pcq.activations import FULL, HALF, Range
from pcq.errors import CheckFailed, PcqError
from pcq.export import scheme, verify, writing
from pcq.export.cpu import described
from pcq.export.drop import Batch, Drop, Outputs, Samples, compare, each_input, outputs, token_mask
from pcq.export.int8 import Activations, Converted, Placement, Site, convert, find_sites, place
from pcq.export.integers import expected
from pcq.export.lowering import is_signed
from pcq.export.ranges import Method, observe
from pcq.export.reading import PackedFile, open_packed
from pcq.progress import Progress, silent
from pcq.words import counted

FUSED = {"Conv": "QLinearConv", "Gemm": "QGemm", "MatMul": "DynamicQuantizeMatMul"}
PARTLY_FUSED = "MatMulIntegerToFloat"
"""What MatMul becomes where several read one quantized input."""

NO_SAMPLES = "static int8 needs calibration samples"

UNSEEN = "the training saw no activations of it"

FARTHEST = 0.5
"""Relative L2 distance from the float file beyond which a file is refused, whatever was allowed."""

RANKED_ON = 16
"""Samples on which layers are ranked."""

_UNPACKS = ("Cast", "Mul", "Sub")
"""What is left of unpacking if it is not done when a session is made."""

Batches = Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class Int8Layer:
    """A packed weight and how the layer that it belongs to runs; ``reason`` where that is float."""

    weight: str
    activations: Activations | None
    reason: str = ""


@dataclass(frozen=True)
class Int8Report:
    """What :func:`write_int8` wrote.

    Attributes:
        path: the file.
        data_path: its external data, for models above 2 GB.
        nbytes: bytes of both.
        exact_bytes: bytes of the float file it was made of.
        layers: every packed weight.
        fused: int8 kernels in ONNX Runtime's own graph of the file -> how many.
        unfused: layers that were to run in int8 and that ONNX Runtime did not fuse.
        drop: measured on held-out samples; None: there were none.
        cpu: the processor that measured it, as far as int8 is concerned.
        seven_bits: weights of layers whose input has 7 bits, so that they do not saturate anywhere.
        saturating: weights of layers that can saturate on x86 without VNNI.
        first_drop: with every layer in int8.
        fallen_back: weights of layers that went back to float for the drop, worst first.
        seconds: in all.
    """

    path: Path
    data_path: Path | None
    nbytes: int
    exact_bytes: int
    layers: tuple[Int8Layer, ...]
    fused: dict[str, int]
    unfused: int
    drop: Drop | None
    cpu: str
    seven_bits: tuple[str, ...]
    saturating: tuple[str, ...]
    first_drop: Drop | None
    fallen_back: tuple[str, ...]
    seconds: float


def write_int8(
    exact: Path,
    out: Path,
    calibration: Batches | None,
    held_out: Samples = (),
    *,
    ranges: Method = "mse",
    vnni: bool = False,
    known: Mapping[str, Range] | None = None,
    keep: Sequence[str] = (),
    max_drop: float = 0.5,
    external_above: int = writing.EXTERNAL_ABOVE,
    progress: Progress = silent,
) -> Int8Report:
    """Write ``out``: the packed float ONNX file ``exact`` with int8 activations.

    Args:
        exact: a file of :func:`pcq.export.write_onnx` with ``fold=False``.
        calibration: gives samples to observe ranges on; None: only layers that need none.
        held_out: samples, and labels, to measure on.
        ranges: how they are chosen.
        vnni: the file will run on no x86 processor without VNNI, so that sums that saturate there may have 8 bits.
        known: ranges that the network was trained with, by their names in ``pcq.activations``: used, and none observed.
        keep: weights, or patterns of their names, whose layers stay float; ``first`` and ``last`` are the first and
            last layers that could run in int8.
        max_drop: points that int8 may cost; see :attr:`pcq.export.drop.Drop.points`.

    Raises:
        PcqError: nothing can run in int8, a pattern matches nothing, or samples are missing or do not fit.
        CheckFailed: no layer can run in int8 within ``max_drop``, or the file is not right.
    """
    start = time.perf_counter()
    file = open_packed(exact)
    if known and scheme.FOLDED in file.metadata:
        raise PcqError("BatchNorm is folded into the scales of this file, so its integers would not be those of "
                       "training", where=str(exact), todo="Write it with fold=False")  # fmt: skip
    work = _Work(
        exact, file, ranges=ranges, vnni=vnni, known=known or {}, calibration=calibration, held_out=held_out,
        external_above=external_above,
    )  # fmt: skip
    found = find_sites(ir.load(exact), file.weights)
    reasons = dict(found.left)
    chosen = _without(found.sites, keep, reasons)
    if calibration is None and not known and any(site.activations == "static" for site in chosen):
        reasons |= {site.weight: NO_SAMPLES for site in chosen
                    if site.activations == "static"}  # fmt: skip
        chosen = [site for site in chosen if site.activations == "dynamic"]
    if known:
        unseen = work.unseen(chosen)
        reasons |= {site.weight: UNSEEN for site in unseen}
        chosen = [site for site in chosen if site not in unseen]
    if not chosen and calibration is None and NO_SAMPLES in reasons.values():
        raise PcqError("the layers that can run in int8 need samples to observe ranges on, and none are given",
                       where=str(out), todo="Give some: --calib folder:DIR")  # fmt: skip
    if not chosen:
        raise PcqError("no layer of this network can run in int8", where=str(out),
                       allowed="Conv, Gemm and MatMul with evenly spaced levels per tensor or channel",
                       todo="; ".join(f"{name}: {why}" for name, why in list(reasons.items())[:3]))  # fmt: skip
    spans = work.observe(chosen, progress)
    with writing.draft(out) as path:
        first = measured = work.try_out(path, chosen, spans, progress)
        fallen: list[str] = []
        if measured is not None and not _accepted(measured, max_drop):
            count = None if measured.relative_l2 > FARTHEST else 1
            ranked = work.rank(path, chosen, spans, count, progress)
            low, high = 0, len(ranked)
            best: Drop | None = None
            while high - low > 1:  # low falls short, high serves (all of them back is the exact file)
                middle = (low + high) // 2
                rest = [site for site in chosen if site not in ranked[:middle]]
                tried = work.try_out(path, rest, spans, progress)
                if tried is not None and _accepted(tried, max_drop):
                    high, best = middle, tried
                else:
                    low = middle
            if best is None:
                moved = f"outputs move by {100 * measured.relative_l2:.0f} %", f"up to {100 * FARTHEST:.0f} %"
                costs = f"it costs {measured.points:.2f} points", f"up to {max_drop:g}"
                what, allowed = moved if measured.relative_l2 > FARTHEST else costs
                raise CheckFailed(f"{what} on {measured.n} held-out samples, and no part of it stays within what is "
                                  "allowed", where="int8", allowed=allowed,
                                  todo="Other --ranges, more --samples, or --mode exact")  # fmt: skip
            fallen = [site.weight for site in ranked[:high]]
            reasons |= dict.fromkeys(fallen, "int8 costs more here than is allowed")
            chosen = [site for site in chosen if site not in ranked[:high]]
            measured = work.try_out(path, chosen, spans, progress)
        progress("check int8", 0, 1)
        data, converted, tops = work.write(path, chosen, spans)
        fused = work.prove(path, converted, progress)
        nbytes = open_packed(path).file_bytes
        data = writing.commit(path, data, out)
    kinds = {site.weight: site.activations for site in chosen}
    layers = tuple(Int8Layer(name, kinds.get(name), "" if name in kinds else reasons.get(name, "unused"))
                   for name in file.weights)  # fmt: skip
    return Int8Report(
        Path(out), data, nbytes, file.file_bytes, layers, fused, len(chosen) - sum(fused.values()), measured,
        described(), _with(tops, HALF), _with(tops, FULL), first,
        tuple(fallen), time.perf_counter() - start,
    )  # fmt: skip


def _tops(placement: Placement, spans: Mapping[str, Range]) -> list[tuple[str, int]]:
    """Weights of layers of large integers, and the last code of what enters each."""

    def last(site: Site) -> int:
        source = site.node.inputs[0]
        assert source is not None
        return FULL if site.activations == "dynamic" else spans[placement.same.get(source, source).name or ""].top

    return [(site.weight, last(site)) for site in placement.sites if site.saturates]


def _with(tops: Sequence[tuple[str, int]], top: int) -> tuple[str, ...]:
    """The weights with this last code; FULL: their sums can saturate."""
    return tuple(weight for weight, last in tops if last == top)


def _accepted(drop: Drop, max_drop: float) -> bool:
    return drop.relative_l2 <= FARTHEST and drop.points <= max_drop


def _without(sites: Sequence[Site], keep: Sequence[str], reasons: dict[str, str]) -> list[Site]:
    """The sites that no pattern keeps in float."""
    kept: set[str] = set()
    for pattern in keep:
        named = {"first": [s.weight for s in sites[:1]], "last": [s.weight for s in sites[-1:]]}.get(pattern)
        matched = named if named is not None else [s.weight for s in sites if fnmatchcase(s.weight, pattern)]
        if not matched:
            raise PcqError(f"'{pattern}' matches no layer that could run in int8", where="--float",
                           allowed=", ".join(s.weight for s in sites[:8]))  # fmt: skip
        kept |= set(matched)
    reasons |= dict.fromkeys(kept, "kept in float as asked")
    return [site for site in sites if site.weight not in kept]


@dataclass(frozen=True)
class _Work:
    exact: Path
    file: PackedFile
    ranges: Method
    vnni: bool
    known: Mapping[str, Range]
    calibration: Batches | None
    held_out: Samples
    external_above: int

    @cached_property
    def wanted(self) -> Outputs:
        """The exact file's outputs on the samples held out."""
        return outputs(self.exact, self.held_out)

    @cached_property
    def takes(self) -> list[str]:
        """The names of the inputs."""
        return [value.name for value in onnx.load_model(self.exact, load_external_data=False).graph.input]

    def observe(self, sites: Sequence[Site], progress: Progress) -> dict[str, Range]:
        model, again = self._fresh(sites)
        tops = place(model, again).observed(self.vnni)
        if not tops:
            return {}
        if self.known:
            return self._trained(tops)
        assert self.calibration is not None
        return observe(self.exact, tops, self.calibration, self.ranges, progress)

    def _trained(self, wanted: Iterable[str]) -> dict[str, Range]:
        """The ranges of training."""
        named = self._named()
        if missing := [named[value] for value in wanted if named[value] not in self.known]:
            raise PcqError(f"the training saw no activations '{missing[0]}', which the graph has",
                           where="int8", todo="Keep their layers in float (--float PATTERN)")  # fmt: skip
        return {value: self.known[named[value]] for value in wanted}

    def _named(self) -> dict[str, str]:
        """What training calls the tensors of the graph: as if every layer that can ran in int8."""
        model = ir.load(self.exact)
        placement = place(model, find_sites(model, self.file.weights).sites)
        named = {value.name or "": name for value, name in placement.names.items()}
        return named | {value.name or "": placement.names[root] for value, root in placement.same.items()}

    def unseen(self, sites: Sequence[Site]) -> list[Site]:
        """Those that read or make a tensor of which training has no range: layers that it left in float."""
        named, rest = self._named(), list(sites)
        while True:
            model, again = self._fresh(rest)
            placement = place(model, again)
            lost = {
                value for value in (*placement.whole, *placement.partly) if named[value.name or ""] not in self.known
            }
            apart = [placement.touches(site, lost) for site in again]
            if not any(apart):
                return [site for site in sites if site not in rest]
            rest = [site for site, gone in zip(rest, apart, strict=True) if not gone]

    def _fresh(self, sites: Sequence[Site]) -> tuple[ir.Model, list[Site]]:
        """A new copy of the graph, and the same sites in it."""
        model = ir.load(self.exact)
        wanted = {(site.name, site.weight) for site in sites}
        return model, [s for s in find_sites(model, self.file.weights).sites if (s.name, s.weight) in wanted]

    def write(
        self, path: Path, sites: Sequence[Site], spans: Mapping[str, Range]
    ) -> tuple[Path | None, Converted, list[tuple[str, int]]]:
        """Its external data, what became of the graph, and the last codes of layers of large integers."""
        model, again = self._fresh(sites)
        placement = place(model, again)
        tops = _tops(placement, spans)
        converted = convert(model, self.file.weights, placement, spans)
        functions = {(node.name or "").rsplit("/", 1)[0]: node.op_type for node in model.graph if node.domain == "pcq"}
        schemes = {name: replace(one, function=functions[name]) for name, one in self.file.schemes.items()}
        model.metadata_props[scheme.KEY] = scheme.to_json(schemes)
        model.metadata_props["pcq.mode"] = "int8"
        model.metadata_props["pcq.int8"] = json.dumps({site.weight: site.activations for site in again})
        model.metadata_props[scheme.SATURATING] = json.dumps(_with(tops, FULL))
        for value in model.graph.initializers.values():
            value.type = value.shape = None
        return writing.save(model, path, self.external_above), converted, tops

    def try_out(self, path: Path, sites: Sequence[Site], spans: Mapping[str, Range], progress: Progress) -> Drop | None:
        """Write it and measure it; None without samples."""
        self.write(path, sites, spans)
        if not self.held_out:
            return None
        stage = f"measure {counted(len(sites), 'layer')} in int8"
        seen = self.wanted, outputs(path, self.held_out, stage, progress)
        return compare(*seen, [y for _, y in self.held_out], token_mask(self.takes, self.held_out))

    def rank(
        self, path: Path, sites: Sequence[Site], spans: Mapping[str, Range], count: int | None, progress: Progress
    ) -> list[Site]:
        """Worst first: by how far the first ``count`` outputs (None: all) move where that layer alone runs in int8."""
        few: list[tuple[Batch, Tensor | None]] = []
        left = RANKED_ON
        for x, y in self.held_out:
            if left > 0:
                part = tuple(each[:left] for each in each_input(x))
                few.append((part, None if y is None else y[:left]))
                left -= len(part[0])
        exact, mask = outputs(self.exact, few)[:count], token_mask(self.takes, few)
        moved: dict[int, float] = {}
        for i, site in enumerate(sites):
            progress("rank layers", i, len(sites))
            self.write(path, [site], spans)
            moved[i] = compare(exact, outputs(path, few)[:count], [None] * len(few), mask).relative_l2
        return [sites[i] for i in sorted(moved, key=lambda i: -moved[i])]

    def prove(self, path: Path, converted: Converted, progress: Progress) -> dict[str, int]:
        """The codes are those that were packed; ONNX Runtime unpacks the very integers and scales; what it fused."""
        verify.check_form(path)
        verify.check_codes(path, self.file.weights)
        calls = verify.unpack_calls(path)
        for done, (name, turned, run) in enumerate(calls):
            progress("check unpacking", done, len(calls))
            weight = self.file.weights.get(name) or self.file.weights[name.rsplit("/", 1)[0]]
            got = run()
            if len(got) == 1:
                wanted = weight.dequantize()
                right = np.array_equal(got[0], (wanted.t() if turned else wanted).numpy())
            else:
                q, s = expected(weight, *converted.forms[name])
                right = np.array_equal(got[0], (q.t() if turned else q).numpy()) and np.array_equal(got[1], s)
            if not right:
                raise CheckFailed("ONNX Runtime unpacks other integers than were packed", where=name)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            dump = Path(folder) / "optimised.onnx"
            verify.open_session(str(path), optimised=True, dump=dump)
            graph = onnx.load_model(dump, load_external_data=False).graph
            whole = {name for name, weight in self.file.weights.items() if is_signed(weight.grid)}
            read = {
                key.removesuffix("/packed") for node in graph.node if node.op_type in _UNPACKS for key in node.input
            }
            verify.check_folded(dump, whole - read)  # bytes that are int8 already need no unpacking
            nodes = [node.op_type for node in graph.node]
        counts = {kind: nodes.count(kind) for kind in (*FUSED.values(), PARTLY_FUSED)}
        return {kind: count for kind, count in counts.items() if count}
