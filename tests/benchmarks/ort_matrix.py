"""Do packed files load, fold and compute the same in old and new ONNX Runtimes?

Run by hand: ``python tests/benchmarks/ort_matrix.py --envs DIR [--only PATTERN]``. Files are made once with the
installed torch: for every way rows lie one that holds nothing but unpacking calls, one for each form of grid, and whole
networks with torch's outputs beside them. Each ONNX Runtime then runs all of them in an environment of its own under
``--envs`` (made there with pip if it is missing; 1.17 needs numpy < 2), with and without graph optimisations:

    unpack   the very bits of ``QuantizedTensor.dequantize()``
    network  outputs within 1e-4 of their scale at batches 1 and 3, and nothing left to unpack in the optimised graph
    layers   every layout of pcq.export.layouts, and int8 activations, for every form of grid, operator and rows, one
             output for each form of grid. For each version as target the planner chooses; what it refuses is said, and
             what it makes has to run in that version and all later ones on default settings: outputs within 1e-4 of
             torch's (where activations are rounded, 5e-2 in relative L2), codes packed in memory where that is the
             layout's purpose

The result goes to ``results/ort_matrix.json`` and ``.md``.
"""

import argparse
import datetime
import fcntl
import fnmatch
import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from networks import SMALL, TORCHVISION, prepare
from runtimes import VERSIONS, python_with
from torch import Tensor, nn

from pcq.errors import PcqError
from pcq.export import PackedFile, onnx_file, open_packed, verify, write_int8, write_onnx
from pcq.export.facts import Target
from pcq.export.frame import can_transpose
from pcq.export.layouts import Aim, Layout, Level, Need, Plan
from pcq.export.lowering import lower
from pcq.export.scheme import SATURATING
from pcq.export.tracing import Traced
from pcq.grids import Affine, Codebook, Grid
from pcq.qtensor import QuantizedTensor
from pcq.rows import Rows

RESULTS = Path(__file__).parent / "results"
NETWORKS = [
    *((name, recipe) for name in TORCHVISION for recipe in ("ternary-all", "binary-all")),
    ("resnet50", "ternary"),
    ("mobilenet_v2", "mixed"),
    ("mobilenet_v2", "w8"),
    *((name, recipe) for name in SMALL for recipe in ("ternary-all", "binary-all", "w3", "w4-g64", "codebook4", "nf4")),
]

RUN = """
import json, mmap, os, sys, tempfile
import numpy as np, onnxruntime as ort
ort.set_default_logger_severity(4)
results = {"": ort.__version__}
for path in sys.argv[1:]:
    data = np.load(path[:-5] + ".npz")
    trials = sorted({key.split(".")[0] for key in data})
    worst, left, by_output, packed = 0.0, False, {}, []
    kept = json.load(open(path[:-5] + ".json")) if os.path.exists(path[:-5] + ".json") else None
    try:
        for level in ("ORT_ENABLE_ALL", "ORT_DISABLE_ALL")[: 2 if kept is None else 1]:
            options = ort.SessionOptions()
            options.log_severity_level = 4
            options.intra_op_num_threads = 1
            options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
            with tempfile.TemporaryDirectory() as folder:
                if level == "ORT_ENABLE_ALL":
                    options.optimized_model_filepath = dump = os.path.join(folder, "dump.onnx")
                session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
                if level == "ORT_ENABLE_ALL":
                    with open(dump, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as dumped:
                        left = left or dumped.find(b"/packed") >= 0
                        packed = [name for name in kept or () if dumped.find((name + "/packed").encode()) >= 0]
            for trial in trials:
                feed = {value.name: data[trial + ".in." + value.name] for value in session.get_inputs()}
                for value, got in zip(session.get_outputs(), session.run(None, feed)):
                    want = data[trial + ".out." + value.name]
                    if trial == "bits":
                        same = got.shape == want.shape and (got.view(np.int32) == want.view(np.int32)).all()
                        worst = max(worst, 0.0 if same else 1.0)
                    else:
                        error = float(np.abs(got - want).max() / np.abs(want).max())
                        worst = max(worst, error)
                        before = by_output.get(value.name, (0.0, 0.0, 0.0))
                        off, size = float(np.square(got - want).sum()), float(np.square(want).sum())
                        by_output[value.name] = max(before[0], error), before[1] + off, before[2] + size
        results[path] = {"error": worst, "folded": not left}
        if kept is not None:
            results[path] |= {"by output": by_output, "packed": packed}
    except Exception as error:
        results[path] = {"failed": str(error).splitlines()[0][:200]}
print(json.dumps(results))
"""


def grids(rows: Rows) -> Iterator[tuple[str, Grid]]:
    """Every form of grid, with each way its planes are combined."""
    scale = torch.rand(rows.g) + 0.01
    yield "binary", Affine(scale, 0.5, 2)
    yield "ternary", Affine(scale, 1.0, 3)
    for bits in (2, 3, 4, 5, 6, 7, 8):
        yield f"symmetric {bits} bit", Affine(scale, (2**bits - 1) / 2, 2**bits)
    yield "5 levels", Affine(scale, 2.0, 5)
    yield "255 levels", Affine(scale, 127.0, 255)
    yield "256 levels around 128", Affine(scale, 128.0, 256)
    yield "200 levels from 0", Affine(scale, 0.0, 200)
    for bits in (4, 8):
        zero = torch.randint(0, 2**bits, (rows.g,)).to(torch.uint8)
        yield f"zero point by row {bits} bit", Affine(scale, zero, 2**bits)
    for bits in (2, 3, 4):
        between = torch.randint(0, 2 ** (bits + 1) - 1, (rows.g,)).half() / 2
        yield f"half zero point by row {bits} bit", Affine(scale, between, 2**bits)
    for count in (6, 13, 32, 200):
        yield f"codebook {count}", Codebook(torch.randn(1, count).sort().values)
        yield f"codebook {count} scaled", Codebook(torch.randn(1, count).sort().values, scale)
        yield f"codebook {count} by row", Codebook(torch.randn(rows.g, count).sort().values)
        yield f"codebook {count} by row scaled", Codebook(torch.randn(rows.g, count).sort().values, scale)


FORMS = {
    "per tensor": Rows((6, 4, 3, 3), None),
    "per channel": Rows((6, 4, 3, 3), 0),
    "groups of 12": Rows((6, 4, 3, 3), 0, 1, 12),
    "groups of 10, ragged": Rows((6, 4, 3, 3), 0, 1, 10),
    "transposed conv": Rows((6, 4, 3, 3), 1),
    "transposed conv, 2 groups": Rows((6, 4, 3, 3), 1, 2),
    "transposed conv, groups of 10": Rows((6, 4, 3, 3), 1, 2, 10),
    "matrix": Rows((10, 21), 0),
    "matrix, groups of 7": Rows((10, 21), 0, 1, 7),
    "matrix, groups of 8, ragged": Rows((10, 21), 0, 1, 8),
}


def write_unpackings(folder: Path) -> list[Path]:
    """One file for each form of rows and layout, with an output for each form of grid."""
    paths = []
    for form, rows in FORMS.items():
        for transposed in (False, True) if can_transpose(rows) else (False,):
            nodes, inputs, functions, expected = [], [], {}, {}
            for name, grid in grids(rows):
                codes = torch.randint(0, grid.count, rows.shape, dtype=torch.uint8)
                weight = QuantizedTensor(codes, grid, rows)
                lowered = lower(weight, 20, transposed)
                functions[lowered.function.name] = lowered.function
                parts = [
                    ir.Value(name=f"{name}/{part}", const_value=ir.tensor(array, name=f"{name}/{part}"))
                    for part, array in lowered.arrays.items()
                ]
                inputs += parts
                output = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(lowered.shape))
                attributes = ir.convenience.convert_attributes(lowered.attributes)
                nodes.append(ir.Node("pcq", lowered.function.name, parts, attributes, outputs=[output]))
                values = weight.dequantize().numpy()
                expected[f"bits.out.{name}"] = np.ascontiguousarray(values.T if transposed else values)
            graph = ir.Graph(
                [], [node.outputs[0] for node in nodes], nodes=nodes, initializers=inputs,
                opset_imports={"": 20, "pcq": 1}, name="unpack",
            )  # fmt: skip
            path = folder / f"unpack, {form}{', stored transposed' if transposed else ''}.onnx"
            ir.save(ir.Model(graph, ir_version=9, functions=list(functions.values())), path)
            np.savez(path.with_suffix(".npz"), **expected)
            paths.append(path)
    return paths


def write_network(folder: Path, name: str, recipe: str) -> Path:
    """An exported network and torch's outputs on random inputs at two batch sizes."""
    case = prepare(name, recipe)
    path = folder / f"{name}, {recipe}.onnx"
    report = write_onnx(case.network, case.weights, case.example, path)
    print(f"  {path.name}: {report.nbytes:,} bytes, {report.bits_per_weight:.3f} bits a weight", flush=True)
    model = ir.load(path)
    saved = {}
    for batch in (1, 3):
        (example,) = case.example
        if example.is_floating_point():
            value = torch.randn(batch, *example.shape[1:])
        else:
            value = torch.randint(0, 500, (batch, *example.shape[1:]))
        with torch.no_grad():
            output = case.network(value)
        saved[f"batch{batch}.in.{model.graph.inputs[0].name}"] = value.numpy()
        saved[f"batch{batch}.out.{model.graph.outputs[0].name}"] = output.numpy()
    np.savez(path.with_suffix(".npz"), **saved)
    return path


LAYOUTS = ("exact", "native", "low-memory", "matmulnbits", "matmulnbits level 4", "int8")
WHOLE = {
    (operator, rows): (make, shape, Rows(*cut))
    for operator, make, shape, kernel, axis in (
        ("Conv", lambda: nn.Conv2d(8, 16, 3), (1, 8, 6, 6), (16, 8, 3, 3), 0),
        ("ConvTranspose", lambda: nn.ConvTranspose2d(16, 8, 3), (1, 16, 4, 4), (16, 8, 3, 3), 1),
        ("Gemm", lambda: nn.Linear(96, 32), (1, 96), (32, 96), 0),
        ("MatMul", lambda: nn.Linear(96, 32), (1, 5, 96), (32, 96), 0),
    )
    for rows, cut in {
        "per tensor": (kernel, None), "per channel": (kernel, axis), "groups": (kernel, axis, 1, 24 if axis == 0 and
        len(kernel) == 4 else 32),
    }.items()
}  # fmt: skip
"""Operator and rows -> the layer, its input, and how its weight is cut."""


FORMS_OF_LAYERS = ("binary", "ternary", "symmetric", "255", "256", "zero point", "half zero point", "codebook 13")
"""Of the forms of grid, those that layouts tell apart."""


class Layers(nn.Module):
    """Layers side by side, an output for each."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: layer(x) for name, layer in self.layers.items()}


@dataclass(frozen=True)
class Cell:
    """One form of grid in one layout for one target: a file and the output in it, or why there is none."""

    path: Path | None
    output: str = ""
    weight: str = ""
    stays: bool = False
    rounds: bool = False
    reason: str = ""
    saturates: bool = False


def write_layers(folder: Path, operator: str, rows: str, targets: Sequence[str]) -> dict[tuple[str, str, str], Cell]:
    """(layout, form of grid, target) -> where it is. Equal files are written once, by their first target."""
    torch.manual_seed(0)
    make, shape, cut = WHOLE[operator, rows]
    forms = [(name, grid) for name, grid in grids(cut) if name.startswith(FORMS_OF_LAYERS)]
    named = {f"g{i}": form for i, form in enumerate(forms)}
    network, weights = Layers({key: make() for key in named}).eval(), {}
    for key, (_, grid) in named.items():
        codes = torch.randint(0, grid.count, cut.shape, dtype=torch.uint8)
        weights[f"layers.{key}.weight"] = QuantizedTensor(codes, grid, cut)
        network.get_parameter(f"layers.{key}.weight").data.copy_(weights[f"layers.{key}.weight"].dequantize())
    samples = torch.randn(8, *shape[1:])
    batches = [0.7 * torch.randn(batch, *shape[1:]) for batch in (1, 3)]  # within the ranges that int8 sees on samples
    cells: dict[tuple[str, str, str], Cell] = {}
    traced = once(network, (samples[:1],))

    def expect(path: Path) -> None:
        """Inputs and torch's outputs beside a file, and which weights stay packed in memory."""
        graph, saved = ir.load(path).graph, {}
        for x in batches:
            with torch.no_grad():
                outputs = network(x)
            saved[f"{len(x)}.in.{graph.inputs[0].name}"] = x.numpy()
            for value, y in zip(graph.outputs, outputs.values(), strict=True):
                saved[f"{len(x)}.out.{value.name}"] = y.numpy()
        np.savez(path.with_suffix(".npz"), **saved)
        stays = [w for w, s in open_packed(path).schemes.items() if s.layout in ("low-memory", "matmulnbits")]
        path.with_suffix(".json").write_text(json.dumps(stays))

    def enter(layout: str, ort: str, path: Path, reasons: dict[str, str]) -> None:
        stays = layout.startswith(("low-memory", "matmulnbits"))
        outputs, saturating = [""] * len(named), []
        if path.exists():
            outputs = [value.name or "" for value in ir.load(path).graph.outputs]
            saturating = json.loads(open_packed(path).metadata.get(SATURATING, "[]"))
        for (key, (kind, _)), output in zip(named.items(), outputs, strict=True):
            weight = f"layers.{key}.weight"
            cells[layout, kind, ort] = (
                Cell(None, reason=reasons[weight]) if weight in reasons
                else Cell(path, output, weight, stays, layout in ("int8", "matmulnbits level 4"),
                          saturates=weight in saturating)
            )  # fmt: skip

    for layout, ort in ((layout, ort) for layout in LAYOUTS if layout != "int8" for ort in targets):
        path, name = folder / f"layers, {operator}, {rows}, {layout}, {ort}.onnx", layout.split(" level")[0]
        level = 4 if layout.endswith("4") else 1
        try:
            with traced:
                report = write_onnx(network, weights, (samples[:1],), path, target_ort=ort, layout=name, level=level)  # type: ignore[arg-type]
        except Known as known:
            path, reasons = known.path, known.reasons
        except PcqError as error:
            reasons = dict.fromkeys(weights, f"{error.what} {error.allowed}")
        else:
            reasons = {row.name: row.reason for row in report.tensors if row.layout != name}
            traced.known[-1] = replace(traced.known[-1], path=path, reasons=reasons)
            expect(path)
        enter(layout, ort, path, reasons)
    exact = next(cell.path for (layout, _, _), cell in cells.items() if layout == "exact")
    path = folder / f"layers, {operator}, {rows}, int8.onnx"
    assert exact is not None
    try:
        report8 = write_int8(exact, path, lambda: samples.split(4), [(samples, None)], max_drop=100)
    except PcqError as error:
        reasons = dict.fromkeys(weights, error.what)
    else:
        reasons = {layer.weight: layer.reason for layer in report8.layers if layer.activations is None}
        expect(path)
    for ort in targets:
        enter("int8", ort, path, reasons)
    return cells


class Known(Exception):
    """An equal plan has a file already."""

    def __init__(self, made: "Made") -> None:
        assert made.path is not None, made
        self.path, self.reasons = made.path, made.reasons


@dataclass(frozen=True)
class Made:
    """A plan, the file it became and why weights in it have another layout than was asked for."""

    plan: Plan
    layout: str
    path: Path | None = None
    reasons: dict[str, str] = field(default_factory=dict)


class once:
    """A network is traced once, and its graph copied for each export; equal plans are written once; the proof in the
    installed ONNX Runtime is left out."""

    def __init__(self, network: nn.Module, example: tuple[Tensor, ...]) -> None:
        self.trace, self.plan, self.prove = onnx_file.trace, onnx_file.plan, verify.prove
        self.known: list[Made] = []
        self.traced = self.trace(network, example, 20)
        self.proto = ir.to_proto(self.traced.model)

    def __enter__(self) -> None:
        def copied(network: object, example: object, opset: int) -> Traced:
            return replace(copy(self.traced), model=ir.from_proto(self.proto))

        def planned(needs: list[Need], goal: Target, layout: Layout, aim: Aim | None, level: Level) -> Plan:
            made = self.plan(needs, goal, layout, aim, level)
            for known in self.known:
                if known.path is not None and (known.plan, known.layout) == (made, layout):
                    raise Known(known)
            self.known.append(Made(made, layout))
            return made

        def prove(path: Path, *rest: object) -> tuple[PackedFile, tuple[()]]:
            return open_packed(path), ()

        onnx_file.trace, onnx_file.plan, verify.prove = copied, planned, prove  # type: ignore[assignment]

    def __exit__(self, *error: object) -> None:
        onnx_file.trace, onnx_file.plan, verify.prove = self.trace, self.plan, self.prove


def judge(cell: Cell, ort: str, ran: dict[str, dict[str, dict]]) -> str:
    """``refused``, ``pass`` or ``FAIL``, in the target's version and all later ones; ``saturates`` where the file says
    itself that its outputs are others on a processor without VNNI, and they are."""
    if cell.path is None:
        return "refused"
    for version in [version for version in ran if version_of(version) >= version_of(ort)]:
        got = ran[version][str(cell.path)]
        if "failed" in got:
            return f"FAIL in {version}: {got['failed']}"
        error, off, size = got["by output"][cell.output]
        l2 = (off / size) ** 0.5
        if not (l2 <= 5e-2 if cell.rounds else error <= 1e-4):
            if cell.saturates:
                return "saturates"
            return f"FAIL in {version}: error {error:.1e}, relative L2 {l2:.1e}"
        if cell.stays and cell.weight not in got["packed"]:
            return f"FAIL in {version}: not packed in memory"
    return "pass"


def version_of(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")[:2]))


def cell(result: dict[str, float | str | bool], exact: bool) -> str:
    """One place in the table."""
    if "failed" in result:
        return f"FAIL {result['failed']}"
    if not result["error"] <= (0.0 if exact else 1e-4):  # type: ignore[operator]
        return f"FAIL error {result['error']:.1e}"
    if not result["folded"]:
        return "FAIL not folded"
    return "exact" if exact else f"{result['error']:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path, required=True, help="where the environments are, or will be")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/ort_matrix"), help="where the files go")
    parser.add_argument("--only", default="*", help="file names to take")
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    parser.add_argument("--part", choices=("exact", "layers"), help="make this part anew; the other keeps its results")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS).stdout.strip()
    about = {
        "date": datetime.date.today().isoformat(), "commit": head, "torch": torch.__version__,
        "machine": f"{platform.machine()} {platform.system()}",
    }  # fmt: skip
    made: dict[str, dict[str, dict[str, object]]] = {"exact": {}, "layers": {}}
    if arguments.part != "layers":
        made["exact"] = exact_part(arguments, about)
    if arguments.part != "exact":
        made["layers"] = layers_part(arguments, about)
    if tuple(arguments.versions) == VERSIONS:
        with (RESULTS / "ort_matrix.json").open("r+") as kept:
            fcntl.flock(kept, fcntl.LOCK_EX)
            result = json.load(kept)
            for part, rows in made.items():
                result[part] = result.get(part, {}) | rows
            kept.seek(0)
            kept.write(in_lines(result))
            kept.truncate()
            tables = markdown(result["exact"]) + "\n" + markdown_layers(result["layers"])
            (RESULTS / "ort_matrix.md").write_text(tables)
    if "FAIL" in json.dumps(made):
        print(json.dumps(made, indent=1))
        sys.exit(3)


def in_lines(result: dict[str, dict[str, dict[str, object]]]) -> str:
    """JSON with a line for each row."""
    parts = []
    for part, rows in result.items():
        lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
        parts.append(f"{json.dumps(part)}: {{\n{lines}\n}}")
    return "{" + ",\n".join(parts) + "}\n"


def ran_in(version: str, envs: Path, paths: list[Path]) -> dict[str, dict]:
    """What one ONNX Runtime says to the files."""
    run = subprocess.run([python_with(version, envs), "-c", RUN, *map(str, paths)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads(run.stdout)
    assert results.pop("") == version, results
    return results


def exact_part(arguments: argparse.Namespace, about: dict[str, object]) -> dict[str, dict[str, object]]:
    """Unpacking functions and whole networks in layout exact: file -> about it, and what became of it."""
    paths = [path for path in write_unpackings(arguments.folder) if fnmatch.fnmatch(path.name, arguments.only)]
    for name, recipe in NETWORKS:
        if fnmatch.fnmatch(f"{name}, {recipe}.onnx", arguments.only):
            paths.append(write_network(arguments.folder, name, recipe))
    cells: dict[str, dict[str, str]] = {path.stem: {} for path in paths}
    for version in arguments.versions:
        results = ran_in(version, arguments.envs, paths)
        for path in paths:
            cells[path.stem][version] = cell(results[str(path)], path.name.startswith("unpack"))
        print(version, sum("FAIL" in row[version] for row in cells.values()), "failed of", len(paths), flush=True)
    return {path.stem: about | {"bytes": path.stat().st_size, "cells": cells[path.stem]} for path in paths}


def layers_part(arguments: argparse.Namespace, about: dict[str, object]) -> dict[str, dict[str, object]]:
    """Every layout for every form of grid: operator and rows -> what became of each, by target."""
    groups: dict[str, dict[tuple[str, str, str], Cell]] = {}
    first: dict[Path, tuple[int, ...]] = {}
    for operator, rows in WHOLE:
        if fnmatch.fnmatch(f"layers, {operator}, {rows}", arguments.only):
            groups[f"{operator}, {rows}"] = cells = write_layers(arguments.folder, operator, rows, arguments.versions)
            for (_, _, ort), one in cells.items():
                if one.path is not None:
                    first[one.path] = min(first.get(one.path, version_of(ort)), version_of(ort))
            print(f"  {operator}, {rows}", flush=True)
    ran = {}
    for version in arguments.versions:
        ran[version] = ran_in(version, arguments.envs, [p for p in first if first[p] <= version_of(version)])
        print(version, len(ran[version]), "files", flush=True)
    made: dict[str, dict[str, object]] = {}
    for where, cells in groups.items():
        table: dict[str, dict[str, dict[str, str]]] = {}
        reasons: dict[str, dict[str, str]] = {}
        for (layout, kind, ort), one in cells.items():
            table.setdefault(layout, {}).setdefault(kind, {})[ort] = judge(one, ort, ran)
            if one.path is None:
                reasons.setdefault(layout, {}).setdefault(one.reason, f"{kind}, target {ort}")
        files = len({one.path for one in cells.values() if one.path is not None})
        made[where] = about | {"files": files, "table": table, "refusals, first case": reasons}
    return made


def markdown(rows: dict[str, dict[str, object]]) -> str:
    """The exact part for people."""
    versions = list(next(iter(rows.values()))["cells"])  # type: ignore[call-overload]
    lines = [
        "# Packed files in ONNX Runtime", "",
        "Made by `tests/benchmarks/ort_matrix.py`, CPU provider. Every layout is below.", "",
        "## Layout `exact`, for target 1.17", "",
        f"`unpack` files hold {len(list(grids(Rows((2, 2)))))} forms of grids each; *exact*: the bits of dequantize(), "
        "with and without graph optimisations. Networks: largest error relative to the outputs' scale at batches 1 and "
        "3, with and without graph optimisations, everything folded.", "",
        "| file | made | bytes | " + " | ".join(versions) + " |", "|---|---|---:|" + "---|" * len(versions),
    ]  # fmt: skip
    for name, row in rows.items():
        cells = row["cells"]
        assert isinstance(cells, dict)
        made = f"{row['date']}, {str(row['commit'])[:7]}"
        lines.append(f"| {name} | {made} | {row['bytes']:,} | " + " | ".join(cells[v] for v in versions) + " |")
    return "\n".join(lines) + "\n"


def markdown_layers(groups: dict[str, dict[str, object]]) -> str:
    """The layers for people: each cell counts operators and rows."""
    if not groups:
        return ""
    tables: list[dict[str, dict[str, dict[str, str]]]] = [group["table"] for group in groups.values()]  # type: ignore[misc]
    versions = list(next(iter(next(iter(tables[0].values())).values())))
    dates = sorted({f"{group['date']} at commit {str(group['commit'])[:7]}" for group in groups.values()})
    files = sum(int(str(group["files"])) for group in groups.values())
    lines = [
        "## Every layout, by target", "",
        f"Made on {'; '.join(dates)}: {files} different files. A cell counts {len(groups)} pairs of operator and rows "
        f"({'; '.join(groups)}): *p* pass: the planner took the layout for that version as target, and the file runs "
        "in it and in every later one, within 1e-4 of torch's outputs at batches 1 and 3 on default "
        "settings (5e-2 in relative L2 where activations are rounded: `int8`, `matmulnbits level 4`), packed in "
        "memory where that is the layout's purpose; *r* refused by the planner, which leaves such a weight `exact` or, "
        "if there is no other, writes nothing (the reasons are in the JSON file); *s* runs, but on a processor without "
        "VNNI, as this one, the products of `int8` saturate and outputs are farther off: the file's metadata names "
        "these weights.", "",
    ]  # fmt: skip
    notes = dict.fromkeys(str(group["note"]) for group in groups.values() if "note" in group)
    lines += [line for note in notes for line in (f"Note: {note}.", "")]
    for layout, kinds in tables[0].items():
        lines += [f"### {layout}", "", "| levels | " + " | ".join(versions) + " |", "|---|" + "---|" * len(versions)]
        for kind in kinds:
            said = []
            for version in versions:
                found = [table[layout][kind][version] for table in tables]
                failed = [text for text in found if text.startswith("FAIL")]
                words = [word for word in ("pass", "refused", "saturates") if word in found]
                said.append(", ".join([*(f"{found.count(word)} {word[0]}" for word in words), *failed]))
            lines.append(f"| {kind} | " + " | ".join(said) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
