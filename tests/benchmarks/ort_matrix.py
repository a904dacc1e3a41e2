"""Do packed files load, fold and compute the same in old and new ONNX Runtimes?

Run by hand: ``python tests/benchmarks/ort_matrix.py --envs DIR [--only PATTERN]``. Files are made once with the
installed torch: for every way rows lie one that holds nothing but unpacking calls, one for each form of grid, and whole
networks with torch's outputs beside them. Each ONNX Runtime then runs all of them in an environment of its own under
``--envs`` (made there with pip if it is missing; 1.17 needs numpy < 2), with and without graph optimisations:

    unpack   the very bits of ``QuantizedTensor.dequantize()``
    network  outputs within 1e-4 of their scale at batches 1 and 3, and nothing left to unpack in the optimised graph

The result goes to ``results/ort_matrix.json`` and ``.md``.
"""

import argparse
import datetime
import fnmatch
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from networks import SMALL, TORCHVISION, prepare

from pcq.export import write_onnx
from pcq.export.frame import can_transpose
from pcq.export.lowering import lower
from pcq.grids import Affine, Codebook, Grid
from pcq.qtensor import QuantizedTensor
from pcq.rows import Rows

VERSIONS = ("1.17.3", "1.18.1", "1.20.1", "1.22.1", "1.23.2", "1.24.4", "1.26.0", "1.28.0", "1.30.0", "1.32.0")
RESULTS = Path(__file__).parent / "results"
NETWORKS = [
    *((name, recipe) for name in TORCHVISION for recipe in ("ternary-all", "binary-all")),
    ("resnet50", "ternary"),
    ("mobilenet_v2", "mixed"),
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
    worst, left = 0.0, False
    try:
        for level in ("ORT_ENABLE_ALL", "ORT_DISABLE_ALL"):
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
            for trial in trials:
                feed = {value.name: data[trial + ".in." + value.name] for value in session.get_inputs()}
                for value, got in zip(session.get_outputs(), session.run(None, feed)):
                    want = data[trial + ".out." + value.name]
                    if trial == "bits":
                        same = got.shape == want.shape and (got.view(np.int32) == want.view(np.int32)).all()
                        worst = max(worst, 0.0 if same else 1.0)
                    else:
                        worst = max(worst, float(np.abs(got - want).max() / np.abs(want).max()))
        results[path] = {"error": worst, "folded": not left}
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
    yield "200 levels from 0", Affine(scale, 0.0, 200)
    for bits in (4, 8):
        zero = torch.randint(0, 2**bits, (rows.g,)).to(torch.uint8)
        yield f"zero point by row {bits} bit", Affine(scale, zero, 2**bits)
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


def python_with(version: str, envs: Path) -> Path:
    """The interpreter of an environment with that ONNX Runtime, made if it is missing."""
    folder = envs / f"ort-{version}"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        numpy = "numpy<2" if tuple(map(int, version.split(".")[:2])) < (1, 19) else "numpy"
        subprocess.run([python, "-m", "pip", "install", "-q", f"onnxruntime=={version}", numpy], check=True)
    return python


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
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    paths = [path for path in write_unpackings(arguments.folder) if fnmatch.fnmatch(path.name, arguments.only)]
    for name, recipe in NETWORKS:
        if fnmatch.fnmatch(f"{name}, {recipe}.onnx", arguments.only):
            paths.append(write_network(arguments.folder, name, recipe))
    table: dict[str, dict[str, str]] = {path.stem: {} for path in paths}
    for version in arguments.versions:
        python = python_with(version, arguments.envs)
        run = subprocess.run([python, "-c", RUN, *map(str, paths)], check=True, capture_output=True, text=True)
        results = json.loads(run.stdout)
        assert results.pop("") == version, results
        for path in paths:
            table[path.stem][version] = cell(results[str(path)], path.name.startswith("unpack"))
        print(version, sum("FAIL" in row[version] for row in table.values()), "failed of", len(paths), flush=True)

    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS).stdout.strip()
    about = {
        "date": datetime.date.today().isoformat(), "commit": head, "torch": torch.__version__,
        "machine": f"{platform.machine()} {platform.system()}",
        "forms of grids in each unpack file": len(list(grids(Rows((2, 2))))),
        "bytes": {path.stem: path.stat().st_size for path in paths},
    }  # fmt: skip
    if arguments.only == "*":
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "ort_matrix.json").write_text(json.dumps({"about": about, "table": table}, indent=1) + "\n")
        (RESULTS / "ort_matrix.md").write_text(markdown(about, table, arguments.versions))
    if any("FAIL" in value for row in table.values() for value in row.values()):
        print(json.dumps(table, indent=1))
        sys.exit(3)


def markdown(about: dict[str, object], table: dict[str, dict[str, str]], versions: list[str]) -> str:
    """The table for people."""
    lines = [
        "# Packed files in ONNX Runtime", "",
        f"Made by `tests/benchmarks/ort_matrix.py` on {about['date']} at commit {str(about['commit'])[:10]}, "
        f"torch {about['torch']}, {about['machine']}, CPU provider.", "",
        f"`unpack` files hold {about['forms of grids in each unpack file']} forms of grids each; *exact*: the bits of "
        "dequantize(), with and without graph optimisations. Networks: largest error relative to the outputs' scale "
        "at batches 1 and 3, with and without graph optimisations, everything folded. The planner refuses none of "
        "these (it refuses targets older than 1.17), so a cell either passes or says FAIL.", "",
        "| file | bytes | " + " | ".join(versions) + " |", "|---|---:|" + "---|" * len(versions),
    ]  # fmt: skip
    sizes = about["bytes"]
    assert isinstance(sizes, dict)
    for name, row in table.items():
        lines.append(f"| {name} | {sizes[name]:,} | " + " | ".join(row[version] for version in versions) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
