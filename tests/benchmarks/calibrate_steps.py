"""What each step of calibration buys, in points of top-1 lost against float: one line of JSON for each run.

    python -m tests.benchmarks.calibrate_steps OUT.jsonl --float FILE --arch SPEC --data SPEC
        [--recipes w4 w3 w2 ternary-all binary-all] [--seeds 0 1 2] [--limit 2500] [--ablate] [--care]
    python -m tests.benchmarks.calibrate_steps OUT.jsonl --table

The steps are those of ``pcq quantize --calib`` with its defaults (512 samples), one after the other: levels nearest to
the weights; scales equalized; channel moments matched; layers reconstructed (``--ablate``: also without matched moments
or corrected targets); blocks refined; BatchNorm statistics taken anew. ``--care``: equalization and matched moments
alone and below reconstruction, and no blocks. Each is scored on ``limit`` evenly spaced test images, which nothing is
chosen by: what the command keeps is settled by samples that were held out. Recipe ``w2+all`` is ``w2`` with all layers
in 2 bits.
"""

import argparse
import time
from collections.abc import Mapping
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from pcq import commands, qtensor
from pcq import tape as tapes
from pcq.calibrate.batchnorm import reestimate
from pcq.calibrate.blocks import blocks, refine
from pcq.calibrate.equalization import equalize, pairs
from pcq.calibrate.layers import find
from pcq.calibrate.oneshot import Settings, batches, calibrate
from pcq.calibrate.steps import MATCHED, compared, outputs
from pcq.commands.calibrating import REFINE, Calibration, draw, float_network
from pcq.data import open_data
from tests.benchmarks import record

RECIPES = ("w4", "w3", "w2", "ternary-all", "binary-all")


def run(args: argparse.Namespace, recipe: str, seed: int) -> dict[str, Any]:
    """All steps for one recipe and seed."""
    planned = commands.plan(args.float, record.recipe(recipe), arch=args.arch)
    network = float_network(planned)
    plan = {e.parameter.name: (e.rows, e.quantizer) for e in planned.plan.quantized}
    samples, held_out, _ = draw(Calibration(args.data, args.samples, seed=seed))
    test = open_data(args.data, "test")
    order = test.order(args.limit)
    x, y = torch.cat([b for b, _ in test.batches(250, order=order)]), test.labels[order]
    own = tapes.state(network)
    exact, aim = outputs(network, {}, x), outputs(network, {}, held_out)
    top1 = 100 * float((exact.argmax(1) == y).float().mean())
    rows: list[dict[str, Any]] = []

    def measure(step: str, tensors: Mapping[str, Tensor], seconds: float) -> None:
        put_out = outputs(network, tensors, x)
        seen, judged = compared(step, put_out, exact), compared(step, outputs(network, tensors, held_out), aim)
        lost = top1 - 100 * float((put_out.argmax(1) == y).float().mean())
        rows.append({"step": step, "lost": lost, "agreement": seen.agreement, "error": seen.error,
                     "held_out_error": judged.error, "cpu_seconds": round(seconds, 1)})  # fmt: skip

    def layer_wise(source: Mapping[str, Tensor] = own, count: int | None = None, **how: Any) -> tuple[Any, float]:
        begun = time.process_time()
        settings = Settings(**{"method": args.method, "seed": seed, **how})
        return calibrate(network, plan, (samples[:count],), settings, source), time.process_time() - begun

    def dense(found: Any) -> dict[str, Tensor]:
        return {**found.changed, **{n: q.dequantize() for n, q in found.quantized.items()}}

    def nearest(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: qtensor.quantize(q, source[n], r).dequantize() for n, (r, q) in plan.items()}

    parts = batches((samples,), Settings().batch)
    tape = tapes.record(network, parts[0])
    layers, _ = find(tape, {n: r.shape for n, (r, _) in plan.items()})
    begun = time.process_time()
    measure("nearest levels", nearest(own), time.process_time() - begun)
    begun = time.process_time()
    equalized = equalize(pairs(tape, layers)[0], own)
    if equalized:
        measure("scales equalized", {**equalized, **nearest({**own, **equalized})}, time.process_time() - begun)
    matched: dict[str, Any] = {"method": "nearest", "corrected": False}
    found, seconds = layer_wise(count=MATCHED, **matched)
    measure(f"means and deviations matched on {MATCHED} samples", dense(found), seconds)
    if args.care:
        found, seconds = layer_wise(count=MATCHED, match="mean", **matched)
        measure(f"means matched on {MATCHED} samples", dense(found), seconds)
    if args.ablate:
        found, seconds = layer_wise(match="none")
        measure("layers reconstructed, nothing matched", dense(found), seconds)
        found, seconds = layer_wise(corrected=False)
        measure("layers reconstructed, targets not corrected", dense(found), seconds)
    found, seconds = layer_wise()
    measure("layers reconstructed", dense(found), seconds)
    if args.care and equalized:
        other, seconds = layer_wise({**own, **equalized})
        measure("layers reconstructed, scales equalized", {**equalized, **dense(other)}, seconds)
    if not args.care:
        begun = time.process_time()
        refined = refine(
            tape, blocks(tape, layers, list(plan)), found.quantized, found.changed, own, parts, REFINE, seed=seed
        )
        measure("blocks refined", dense(refined), time.process_time() - begun)
        begun = time.process_time()
        if fresh := reestimate(tape, {**own, **dense(refined)}, parts):
            measure("BatchNorm statistics taken anew", {**dense(refined), **fresh}, time.process_time() - begun)
    return {
        "data": args.data, "bits": planned.plan.bits, "samples": len(samples), "test": len(y), "float_top1": top1,
        "method": args.method, "steps": rows, "peak_mb": record.peak_mb(),
    }  # fmt: skip


def table(lines: list[record.Row]) -> str:
    """Points lost, mean and deviation over seeds; the samples held out would keep a step whose error is lower."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in lines:
        for step in line["steps"]:
            groups.setdefault((line["float"], line["recipe"], step["step"]), []).append({**step, "seed": line["seed"]})
    rows = []
    for key, found in groups.items():
        seeds = ", ".join(str(each["seed"]) for each in found)
        cells = [record.spread([each[name] for each in found]) for name in ("lost", "agreement")]
        rest = [f"{mean(each['held_out_error'] for each in found):.4f}", f"{mean(e['cpu_seconds'] for e in found):.0f}"]
        rows.append([*key, seeds, *cells, *rest])
    head = "| float | recipe | step | seeds | points lost | agreement % | error held out | CPU s |"
    return record.markdown(head, rows)


def main() -> None:
    parser = record.arguments(__doc__)
    record.network_arguments(parser)
    record.recipe_arguments(parser, RECIPES, seeds=(0, 1, 2))
    record.calibration_arguments(parser, samples=512, method="proxconnect", refine=None)
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--care", action="store_true")
    args = parser.parse_args()
    wanted = [{"float": args.float.name, "recipe": r, "seed": seed} for seed in args.seeds for r in args.recipes]
    record.fill(args, wanted, lambda key: run(args, key["recipe"], key["seed"]), table)


if __name__ == "__main__":
    main()
