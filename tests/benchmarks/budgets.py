"""Byte budgets: the allocation against the best uniform levels within the same bytes, file size against budget.

    python -m tests.benchmarks.budgets OUT.jsonl [--float FILE --arch SPEC --data SPEC] [--budgets 40kB 55kB ...]
    python -m tests.benchmarks.budgets OUT.jsonl --table

Default: the Fashion-MNIST ResNet-20 that comes with pcq (1.08 MB in float). Both are calibrated alike (layers only) and
scored on ``limit`` test images, which nothing is chosen by.
"""

import argparse
import tempfile
import time
from pathlib import Path

import pcq
from pcq.commands import Calibration
from pcq.recipe import Recipe
from tests.benchmarks import record


def run(args: argparse.Namespace, budget: str) -> record.Row:
    """The budget's file, and that of the best uniform levels within it."""
    asked = Calibration(args.data, args.samples, args.method, seed=args.seed, refine=0)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        made = pcq.quantize(args.float, arch=args.arch, out=Path(folder) / "x.safetensors", budget=budget,
                            calibration=asked)  # fmt: skip
        cpu = time.process_time() - start
        allocation = made.allocation
        assert allocation is not None
        line: record.Row = {
            "limit": allocation.limit, "bytes": made.bytes_after,
            "bits": made.bits, "loss": allocation.loss, "gap": allocation.gap, "note": allocation.note,
            "uniformly": allocation.uniformly, "errors": allocation.errors, "cpu_seconds": round(cpu),
            "options": {name: option.text for name, option in allocation.options.items()},
        }  # fmt: skip
        scores = pcq.evaluate(made.path, args.data, arch=args.arch, reference=args.float, limit=args.limit).scores
        line |= {"top1": scores.top1, "agreement": scores.agreement, "float_top1": scores.reference_top1}
        if allocation.uniform:
            best = allocation.uniform[0]
            recipe = Recipe("uniform", "", (best.option.rule(list(allocation.options)),))
            alike = pcq.quantize(args.float, recipe, arch=args.arch, out=Path(folder) / "y.safetensors",
                                 calibration=asked)  # fmt: skip
            scores = pcq.evaluate(alike.path, args.data, arch=args.arch, reference=args.float, limit=args.limit).scores
            line["uniform"] = {"levels": best.option.text, "bytes": alike.bytes_after, "loss": best.loss,
                               "top1": scores.top1, "agreement": scores.agreement}  # fmt: skip
    return line | {"seed": args.seed, "samples": args.samples, "method": args.method, "limit_test": args.limit}


def table(lines: list[record.Row]) -> str:
    """One row a budget."""
    rows = []
    for line in lines:
        other = line.get("uniform", {"levels": "none fits", "bytes": 0, "top1": None, "agreement": None})
        cells = [line["float"], line["budget"], f"{line['bytes']:,}", f"{100 * line['bytes'] / line['limit']:.2f}"]
        cells += [_percent(line["top1"]), _percent(line["agreement"]), other["levels"], f"{other['bytes']:,}"]
        rows.append([*cells, _percent(other["top1"]), _percent(other["agreement"])])
    head = (
        "| float | budget | file, bytes | used % | top-1 | agreement % | uniform levels | bytes | top-1 | agreement % |"
    )
    return record.markdown(head, rows)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main() -> None:
    parser = record.arguments(__doc__)
    record.network_arguments(parser)
    parser.add_argument("--budgets", nargs="+", default=["66kB", "75kB", "90kB", "115kB", "160kB"])
    record.calibration_arguments(parser, samples=256, method="gptq", refine=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=2500)
    args = parser.parse_args()
    wanted = [{"float": args.float.name, "budget": budget} for budget in args.budgets]
    record.fill(args, wanted, lambda key: run(args, key["budget"]), table)


if __name__ == "__main__":
    main()
