"""Where the integers of an exported int8 file differ from the simulated ones, and whether a rounding tie is why.

    python -m tests.benchmarks.exact_match OUT.jsonl [--artifact FILE --data SPEC]
    python -m tests.benchmarks.exact_match OUT.jsonl --table

takes the two networks of tests/test_activations.py with 64 random samples each, and an artifact of ``pcq finetune
--activations 8`` with up to 256 samples of the test split of a data spec. Compared are all codes of all tensors that
are quantized, torch's simulation beside ONNX Runtime's fused kernels, once with float biases in the simulation and once
with biases rounded as in the file (``pcq.train.biases``).

For each sample that differs it takes the first tensor that does. Up to there the codes are equal, so the number before
rounding is a function of the same integers in three arithmetics: the simulation's in float32, the same in float64, and
the file's, run without fusing. The difference is explained by a tie if one lies between the simulation's number and the
file's; errors are those against float64, and all distances are in levels.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

import pcq
from pcq.activations import Range
from pcq.commands.networks import load_network
from pcq.data import open_data
from pcq.export import verify, write_int8, write_onnx
from pcq.export.int8 import find_sites, place
from pcq.qtensor import QuantizedTensor
from pcq.train.activations import Simulation, onto, weights8
from tests.benchmarks.record import Row, arguments, fill, markdown
from tests.test_activations import Before, Residual, quantized, simulated

Array = np.ndarray[Any, Any]
MADE = {make.__name__: make for make in (Residual, Before)}
SIMULATION, FILE = "simulation's error", "file's error"
SLACK = 255 * 2.0**-23
"""Levels by which float32 arithmetic between the two numbers and their codes may be off."""


def codes(rounded: Array, span: Range) -> Array:
    return np.rint(rounded.astype(np.float64) / float(span.scale)).astype(int) + int(span.zero_point)


def watch(simulation: Simulation, seen: dict[str, tuple[Array, Array]], fixed: dict[str, Array] | None = None) -> None:
    """Keep every tensor before and after rounding; ``fixed``: give these as rounded ones."""

    def rounded(x: Tensor, name: str) -> Tensor:
        made = onto(x, simulation.ranges[name]) if fixed is None else torch.from_numpy(fixed[name]).double()
        seen[name] = x.numpy().copy(), made.numpy().copy()  # both may be written in place
        return made

    simulation.rounded = rounded  # type: ignore[method-assign]


def run(model: onnx.ModelProto, wanted: dict[str, int], x: Array, optimised: bool) -> dict[str, Array]:
    """The file's outputs with these tensors of it, of ONNX's types."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known = {output.name for output in copy.graph.output}
    copy.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in wanted.items() if name not in known
    )
    session = verify.open_session(copy.SerializeToString(), optimised)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: x}), strict=True))


def study(
    network: nn.Module,
    weights: dict[str, QuantizedTensor],
    simulation: Simulation,
    x: Tensor,
    folder: Path,
    final: bool,
) -> dict[str, Any]:
    """All of it for one network."""
    exact, out = folder / "exact.onnx", folder / "int8.onnx"
    simulation.detach()
    write_onnx(network, weights, (torch.zeros(1, *x.shape[1:]),), exact, fold=False)
    write_int8(exact, out, None, known=simulation.ranges)
    model = ir.load(exact)
    named = {name: value.name or "" for value, name in place(model, find_sites(model, weights).sites).names.items()}
    forms = {name: (weight.grid, weight.rows) for name, weight in weights.items()}
    known = weights8(dict(network.named_parameters()), forms)
    levels = {name: weight.grid for name, weight in weights.items()} if final else None
    again = Simulation(network, known, simulation.ranges, levels=levels)
    again.look(x[:1])
    with torch.no_grad():
        simulated_: dict[str, tuple[Array, Array]] = {}
        watch(again, simulated_)
        ours = network(x).numpy()
        precise: dict[str, tuple[Array, Array]] = {}
        watch(again, precise, {name: rounded for name, (_, rounded) in simulated_.items()})
        network.double()(x.double())
        network.float()
    file = onnx.load_model(out)
    theirs = run(file, {f"{value}/codes": onnx.TensorProto.UINT8 for value in named.values()}, x.numpy(), True)
    plain = run(file, {}, x.numpy(), True)
    result = next(iter(plain))
    assert np.array_equal(plain[result], theirs[result]), "looking at the codes changes the output"
    inner = {name: value for name, value in named.items() if value not in plain and value != file.graph.input[0].name}
    loose = run(file, dict.fromkeys(inner.values(), onnx.TensorProto.FLOAT), x.numpy(), False)
    first: dict[int, dict[str, Any]] = {}
    equal = total = 0
    for name, (before, rounded) in simulated_.items():
        span = simulation.ranges[name]
        scale = float(span.scale)
        mine, its = codes(rounded, span), theirs[f"{named[name]}/codes"].astype(int)
        equal, total = equal + int((mine == its).sum()), total + mine.size
        for i in set(np.nonzero(mine != its)[0].tolist()) - first.keys():
            at = (i, *(axis[0] for axis in np.nonzero(mine[i] != its[i])))
            ideal = float(precise[name][0][at]) / scale
            told = {"simulation": float(before[at]) / scale}
            told["file"] = float(loose[named[name]][at]) / scale if name in inner else told["simulation"]
            tie = np.floor(ideal) + 0.5
            low, high = sorted(told.values())
            first[i] = {
                "tensor": name,
                "codes": [int(mine[at]), int(its[at])],
                "ideal to tie": abs(ideal - tie),
                SIMULATION: abs(told["simulation"] - ideal),
                FILE: abs(told["file"] - ideal),
                "tie between": bool(low - SLACK <= tie <= high + SLACK),
            }
    scale = float(np.abs(plain[result]).max())
    off = np.abs(ours - plain[result]).reshape(len(x), -1).max(1) / scale
    same = np.array([i not in first for i in range(len(x))])
    return {
        "samples": len(x),
        "codes": total,
        "codes that are equal": equal / total,
        "samples whose codes are all equal": int(same.sum()),
        "outputs within 1e-4": int((off < 1e-4).sum()),
        "furthest output where all codes are equal": float(off[same].max(initial=0.0)),
        "furthest output": float(off.max()),
        "explained by a tie": sum(one["tie between"] for one in first.values()),
        "first differences": [first[i] for i in sorted(first)],
    }


def run_one(key: Row, artifact: Path, data: str) -> Row:
    final = key["biases"] == "rounded"
    with tempfile.TemporaryDirectory() as folder:
        if key["network"] in MADE:
            torch.manual_seed(0)
            network = MADE[key["network"]]()
            weights = quantized(network)
            x = torch.randn(64, 3, 12, 12)
            return study(network, weights, simulated(network, weights, x), x, Path(folder), final)
        stored = pcq.read_artifact(artifact)
        network = load_network(stored, artifact, None).module.float().eval()
        samples = open_data(data, "test")
        x = samples.take(list(range(min(256, samples.n))))
        return study(
            network, dict(stored.quantized), Simulation(network, {}, stored.activations), x, Path(folder), final
        )


def table(rows: list[Row]) -> str:
    head = (
        "| network | biases | samples | codes | equal | samples with all codes equal | outputs within 1e-4 | furthest "
        "where all codes are equal | furthest | first differences, of them at a tie | furthest from a tie, levels | "
        "error there: simulation, file |"
    )

    def most(row: Row, key: str) -> float:
        return float(max((one[key] for one in row["first differences"]), default=0.0))

    return markdown(head, ([
        row["network"], row["biases"], row["samples"], row["codes"], f"{100 * row['codes that are equal']:.4f} %",
        row["samples whose codes are all equal"], row["outputs within 1e-4"],
        f"{row['furthest output where all codes are equal']:.1e}", f"{row['furthest output']:.1e}",
        f"{len(row['first differences'])}, {row['explained by a tie']}", f"{most(row, 'ideal to tie'):.1e}",
        f"{most(row, SIMULATION):.1e}, {most(row, FILE):.1e}",
    ] for row in rows))  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--data", default="digits")
    args = parser.parse_args()
    names = (*MADE, *([] if args.artifact is None else [args.artifact.name]))
    wanted = [{"network": name, "biases": biases} for name in names for biases in ("float", "rounded")]
    fill(args, wanted, lambda key: run_one(key, args.artifact, args.data), table, "onnxruntime")


if __name__ == "__main__":
    main()
