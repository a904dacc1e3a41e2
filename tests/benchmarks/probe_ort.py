"""What can each ONNX Runtime load, fold and keep packed? Makes the table that the planner reads.

Run by hand: ``python tests/benchmarks/probe_ort.py --envs DIR``. Hundreds of tiny models are made once; each ONNX
Runtime runs all of them in an environment of its own under ``--envs`` (made there with pip if it is missing; 1.17 and
1.18 need numpy < 2), on default settings and one thread, and saves its optimised graph, which is what the answers come
from:

    opset, ir      a convolution of each operator set and IR version: does it load, and in which blocked layout
    cast           Cast and Mul of 2- and 4-bit initializers: right, and folded
    dequantize     DequantizeLinear per tensor, per channel and by blocks, before each operator: right, still packed,
                   and not turned into int8 arithmetic unasked (MatMulNBits with accuracy level 4)
    matmulnbits    the contributed operator by bits, block, zero points and accuracy level: its error against float

Answers go to ``pcq/export/facts.json`` (what the planner reads) and ``results/probe_ort.json`` (every model).
"""

import argparse
import datetime
import json
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from runtimes import VERSIONS, python_with

ROOT = Path(__file__).parents[2]
FACTS = ROOT / "pcq" / "export" / "facts.json"
RESULTS = Path(__file__).parent / "results"
OPSETS, IRS = range(18, 29), range(8, 15)
TYPES = {
    "int8": (np.int8, -128, 127), "uint8": (np.uint8, 0, 255),
    "int4": (ml_dtypes.int4, -8, 7), "uint4": (ml_dtypes.uint4, 0, 15),
    "int2": (ml_dtypes.int2, -2, 1), "uint2": (ml_dtypes.uint2, 0, 3),
}  # fmt: skip
FIRST = {"int8": 13, "uint8": 13, "int4": 21, "uint4": 21, "int2": 25, "uint2": 25}
"""The first operator set in which DequantizeLinear takes the type."""
GRAINS = ("tensor", "channel", "block16", "block32", "block128")
OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
EXACT = 1e-5
"""Errors up to this, relative to the outputs' scale, are float rounding; int8 arithmetic shows 1e-3 and more."""
IR_OF = {18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12, 25: 13, 26: 13, 27: 13, 28: 14}
"""The IR version that came with each operator set."""

RUN = """
import json, os, sys
import numpy as np, onnxruntime as ort
ort.set_default_logger_severity(4)
results = {"": ort.__version__}
for line in open(sys.argv[1]):
    path = line.strip()
    data = np.load(path[:-5] + ".npz")
    dump = os.path.join(sys.argv[2], os.path.basename(path))
    try:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.optimized_model_filepath = dump
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {"x": data["x"]})
        results[path] = {"error": float(np.abs(got - data["y"]).max() / np.abs(data["y"]).max())}
    except Exception as error:
        results[path] = {"failed": str(error).splitlines()[0][:160]}
print(json.dumps(results))
"""

Array = np.ndarray


def conv(x: Array, w: Array) -> Array:
    """A 1x1 convolution of ``x [n, c, h, w]`` in double precision."""
    return np.einsum("nchw,oc->nohw", x.astype(np.float64), w.reshape(w.shape[:2]).astype(np.float64))


def save(
    folder: Path, name: str, opset: int, ir: int, nodes: list[onnx.NodeProto], held: dict[str, Array], x: Array,
    y: Array, contrib: bool = False,
) -> None:  # fmt: skip
    """One model of input ``x`` and output ``y``, and the arrays beside it."""
    tensors = [numpy_helper.from_array(array, key) for key, array in held.items()]
    sides = [helper.make_tensor_value_info(key, TensorProto.FLOAT, value.shape) for key, value in (("x", x), ("y", y))]
    graph = helper.make_graph(nodes, "probe", sides[:1], sides[1:], tensors)
    imports = [helper.make_opsetid("", opset)] + ([helper.make_opsetid("com.microsoft", 1)] if contrib else [])
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=ir), folder / f"{name}.onnx")
    np.savez(folder / f"{name}.npz", x=x.astype(np.float32), y=y.astype(np.float32))


def make(folder: Path) -> list[Path]:
    """All models."""
    random = np.random.default_rng(0)
    image = random.normal(size=(1, 32, 6, 6)).astype(np.float32)
    kernel = random.normal(size=(32, 32, 1, 1)).astype(np.float32)
    plain = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Relu", ["c"], ["y"])]
    for opset in OPSETS:
        save(folder, f"opset {opset}", opset, IR_OF[opset], plain, {"w": kernel}, image, conv(image, kernel).clip(0))
    for ir in IRS:
        save(folder, f"ir {ir}", 18, ir, plain, {"w": kernel}, image, conv(image, kernel).clip(0))
    for kind in ("int4", "uint4", "int2", "uint2"):
        for opset in (o for o in OPSETS if o >= FIRST[kind]):
            dtype, low, high = TYPES[kind]
            q = random.integers(low, high + 1, (32, 32, 1, 1)).astype(dtype)
            scale = random.uniform(0.5, 1, (32, 1, 1, 1)).astype(np.float32)
            nodes = [helper.make_node("Cast", ["q"], ["f"], to=TensorProto.FLOAT),
                     helper.make_node("Mul", ["f", "s"], ["w"]), plain[0], plain[1]]  # fmt: skip
            y = conv(image, q.astype(np.float32) * scale).clip(0)
            save(folder, f"cast {kind} {opset}", opset, IR_OF[opset], nodes, {"q": q, "s": scale}, image, y)
    for kind, operator, grain in ((k, o, g) for k in TYPES for o in OPERATORS for g in GRAINS):
        for opset in (o for o in OPSETS if o >= max(FIRST[kind], 21 if "block" in grain else 0)):
            dequantize(folder, random, kind, operator, grain, opset)
    for bits, block, zero, level in ((b, k, z, a) for b in (2, 4, 8) for k in (16, 32, 128)
                                     for z in ("none", "integer", "float") for a in (0, 1, 4)):  # fmt: skip
        multiply(folder, random, bits, block, zero, level)
    return sorted(folder.glob("*.onnx"))


def dequantize(folder: Path, random: np.random.Generator, kind: str, operator: str, grain: str, opset: int) -> None:
    """``DequantizeLinear -> operator``, with 256 inputs to sum over."""
    dtype, low, high = TYPES[kind]
    convolves = operator.startswith("Conv")
    across = (
        1 if operator in ("ConvTranspose", "MatMul") else 0
    )  # the axis of output channels; the other is summed over
    q = random.integers(low, high + 1, (64, 256) if across == 0 else (256, 64)).astype(dtype)
    if grain == "tensor":
        s, given = np.asarray(np.float32(0.7)), {}
    elif grain == "channel":
        s, given = random.uniform(0.5, 1, 64).astype(np.float32), {"axis": across}
    else:
        size = int(grain.removeprefix("block"))
        s = random.uniform(0.5, 1, (64, 256 // size) if across == 0 else (256 // size, 64)).astype(np.float32)
        given = {"axis": 1 - across, "block_size": size}
    z = random.integers(0, high + 1, s.shape).astype(dtype)

    def spread(each: Array) -> Array:
        """One number for each row, repeated for each weight."""
        if grain == "channel":
            return each[:, None] if across == 0 else each
        return np.repeat(each, given["block_size"], 1 - across) if given else each

    signed = not kind.startswith("u")  # unsigned codes have zero points
    w = (q.astype(np.float32) - (0 if signed else spread(z.astype(np.float32)))) * spread(s)
    if convolves:
        q, x = q[:, :, None, None], random.normal(size=(1, 256, 5, 5)).astype(np.float32)
        if grain.startswith("block"):
            s, z = s[:, :, None, None], z[:, :, None, None]
        y = conv(x, w if across == 0 else w.T)
    else:
        x = random.normal(size=(4, 256)).astype(np.float32)
        y = x.astype(np.float64) @ (w.T if across == 0 else w)
    held = {"q": q, "s": s} | ({} if signed else {"z": z})
    turned = {"transB": 1} if operator == "Gemm" else {}
    nodes = [
        helper.make_node("DequantizeLinear", [*held], ["w"], **given),
        helper.make_node(operator, ["x", "w"], ["y"], **turned),
    ]
    save(folder, f"dequantize {kind} {operator} {grain} {opset}", opset, IR_OF[opset], nodes, held, x, y)


def multiply(folder: Path, random: np.random.Generator, bits: int, block: int, zero: str, level: int) -> None:
    """``MatMulNBits`` of 200 inputs (the last block is not full) and 64 outputs."""
    k, n = 200, 64
    blocks = -(-k // block)
    q = random.integers(0, 2**bits, (n, blocks * block)).astype(np.uint8)
    digits = q.reshape(n, blocks, -1, 8 // bits)
    packed = (digits.astype(np.uint32) << (bits * np.arange(8 // bits, dtype=np.uint32))).sum(-1).astype(np.uint8)
    scale = random.uniform(0.5, 1, (n, blocks)).astype(np.float32)
    held = {"q": packed, "s": scale.reshape(-1)}
    if zero == "none":
        z = np.full((n, blocks), 2.0 ** (bits - 1))
    elif zero == "float":
        z = np.full((n, blocks), (2**bits - 1) / 2)
        held["z"] = z.reshape(-1).astype(np.float32)
    else:
        z = random.integers(0, 2**bits, (n, blocks))
        padded = np.pad(z, ((0, 0), (0, -blocks % (8 // bits)))).reshape(n, -1, 8 // bits).astype(np.uint32)
        held["z"] = (padded << (bits * np.arange(8 // bits, dtype=np.uint32))).sum(-1).astype(np.uint8).reshape(-1)
    w = (q - np.repeat(z, block, 1)) * np.repeat(scale, block, 1)
    x = random.normal(size=(3, k)).astype(np.float32)
    node = helper.make_node("MatMulNBits", ["x", *held], ["y"], domain="com.microsoft", K=k, N=n, bits=bits,
                            block_size=block, accuracy_level=level)  # fmt: skip
    y = x.astype(np.float64) @ w[:, :k].T
    save(folder, f"matmulnbits {bits} {block} {zero} {level}", 20, 9, [node], held, x, y, contrib=True)


def look(dump: Path) -> Iterator[str]:
    """The operators of an optimised graph, with the domain of those that are not ONNX's."""
    for node in onnx.load_model(dump, load_external_data=False).graph.node:
        yield f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


def run(version: str, envs: Path, folder: Path, paths: list[Path]) -> dict[str, dict[str, object]]:
    """What one ONNX Runtime made of every model."""
    dumps = folder / f"dumps-{version}"
    dumps.mkdir(exist_ok=True)
    listing = folder / "listing"
    listing.write_text("".join(f"{path}\n" for path in paths))
    done = subprocess.run([python_with(version, envs), "-c", RUN, listing, dumps], check=True, capture_output=True)
    results = json.loads(done.stdout)
    assert results.pop("") == version
    made = {}
    for path in paths:
        entry = results[str(path)]
        if "failed" not in entry:
            entry["operators"] = list(look(dumps / path.name))
        made[path.stem] = entry
    return made


def facts(found: dict[str, dict[str, object]]) -> dict[str, object]:
    """What the planner needs to know of one version."""

    def right(name: str) -> bool:
        return "failed" not in found[name] and found[name]["error"] <= EXACT  # type: ignore[operator]

    def operators(name: str) -> list[str]:
        return found[name]["operators"]  # type: ignore[return-value]

    def dequantizes(kind: str, operator: str, grain: str, opset: int) -> bool:
        name = f"dequantize {kind} {operator} {grain} {opset}"
        return name in found and right(name) and "DequantizeLinear" in operators(name)

    def span(able: list[int]) -> list[int]:
        """The first and the last operator set of those between which all serve."""
        assert able == list(range(able[0], able[-1] + 1)), able
        return [able[0], able[-1]]

    opsets = [o for o in OPSETS if right(f"opset {o}")]
    return {
        "opset": max(opsets),
        "ir_version": max(i for i in IRS if right(f"ir {i}")),
        "fast_opset": max(o for o in opsets if any("nchwc" in op for op in operators(f"opset {o}"))),
        "folded_casts": {
            kind: span(able) for kind in ("int4", "uint4", "int2", "uint2")
            if (able := [o for o in OPSETS if (name := f"cast {kind} {o}") in found and right(name)
                         and "Cast" not in operators(name)])
        },
        "dequantizes": {
            operator: {
                kind: able for kind in TYPES
                if (able := {grain: span(kept) for grain in ("tensor", "channel")
                             if (kept := [o for o in OPSETS if dequantizes(kind, operator, grain, o)])})
            }
            for operator in OPERATORS
        },
        "matmulnbits": {
            str(bits): {
                zero: {str(level): float(f"{max(errors):.1e}") for level in (0, 1, 4)
                       if None not in (errors := [found[f"matmulnbits {bits} {block} {zero} {level}"].get("error")
                                                  for block in (16, 32, 128)])}
                for zero in ("none", "integer", "float")
            }
            for bits in (2, 4, 8)
        },
    }  # fmt: skip


def outcomes(found: dict[str, dict[str, dict[str, object]]], name: str) -> dict[str, list[str]]:
    """What became of one model -> the versions in which it did."""
    made: dict[str, list[str]] = {}
    for version, entries in found.items():
        entry = entries[name]
        if "failed" in entry:
            said = f"fails: {entry['failed']}"
        else:
            error = float(entry["error"])  # type: ignore[arg-type]
            said = ("right: " if error <= EXACT else f"off by {error:.1e}: ") + " ".join(entry["operators"])  # type: ignore[arg-type]
        made.setdefault(said, []).append(version)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path, required=True, help="where the environments are, or will be")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/probe_ort"), help="where the models go")
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    paths = make(arguments.folder)
    print(len(paths), "models", flush=True)
    found, table = {}, {}
    for version in arguments.versions:
        found[version] = run(version, arguments.envs, arguments.folder, paths)
        table[version] = facts(found[version])
        print(version, sum("failed" in entry for entry in found[version].values()), "do not load", flush=True)
        print(json.dumps(table[version]), flush=True)
    if tuple(arguments.versions) != VERSIONS:
        return
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    about = {
        "made by": "tests/benchmarks/probe_ort.py", "date": datetime.date.today().isoformat(),
        "commit": head.stdout.strip(), "onnx": onnx.__version__, "machine": f"{platform.machine()} {platform.system()}",
    }  # fmt: skip
    lines = ",\n".join(f" {json.dumps(version)}: {json.dumps(entry)}" for version, entry in table.items())
    FACTS.write_text(f'{{"about": {json.dumps(about)},\n"runtimes": {{\n{lines}\n}}}}\n')
    models = ",\n".join(f" {json.dumps(path.stem)}: {json.dumps(outcomes(found, path.stem))}" for path in paths)
    (RESULTS / "probe_ort.json").write_text(f'{{"about": {json.dumps(about)},\n"models": {{\n{models}\n}}}}\n')


if __name__ == "__main__":
    main()
