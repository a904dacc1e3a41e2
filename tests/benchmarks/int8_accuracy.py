"""What int8 activations cost: the float network, the exact and the int8 file of one artifact, scored on test data.

    python -m tests.benchmarks.int8_accuracy NAME ARTIFACT --float CHECKPOINT --test SPEC [SPEC ...] --calib SPEC
        [--arch ARCH] [--input 3x224x224] [--max-drop POINTS] [--vnni]

exports both files (ranges of 256 samples of the split ``train`` of ``--calib``, judged on 256 of ``val``; layers go
back to float until int8 costs no more than ``--max-drop``, half a point), scores them in ONNX Runtime on the split
``test`` of every SPEC, and puts a row for each into ``results/int8_accuracy.json`` and ``.md`` in the place of the old
one. Agreement is equal top-1 with the float network.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pcq
from pcq.commands import Int8
from tests.benchmarks import record

RESULTS = Path(__file__).parent / "results"


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One for each test set."""
    asked = Int8(args.calib, max_drop=args.max_drop, vnni=args.vnni)
    shape = tuple(int(n) for n in args.input.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        exact, int8 = Path(folder) / "exact.onnx", Path(folder) / "int8.onnx"
        pcq.export_onnx(args.artifact, exact, arch=args.arch, input_shape=shape)
        made = pcq.export_onnx(args.artifact, int8, arch=args.arch, input_shape=shape, int8=asked).int8
        assert made is not None
        out = []
        for test in args.test:
            said = {"float": asdict(pcq.evaluate(args.float, test, arch=args.arch, reference=args.float).scores)}
            for name, path in (("exact", exact), ("int8", int8)):
                scores = pcq.evaluate(path, test, arch=args.arch, reference=args.float).scores
                said[name] = asdict(scores) | {"bytes": path.stat().st_size}
            row = {"name": args.name, "test": brief(test), "fused": made.fused, "fallen_back": made.fallen_back}
            row |= {"max_drop": args.max_drop, "vnni": args.vnni, "ranges": asked.ranges}
            out.append(row | said | {"held_out": made.drop and asdict(made.drop)})
    return out


def brief(spec: str) -> str:
    """A data spec without folders and arguments."""
    kind, _, rest = spec.partition(":")
    return f"{Path(kind).stem}:{rest.partition('?')[0]}" if kind.endswith(".py") else kind


def markdown(found: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "# What int8 activations cost\n",
        "Made by `tests/benchmarks/int8_accuracy.py`; percent of the test split, in ONNX Runtime; the dates are in the "
        "JSON.\n",
        "| artifact | test | n | float top-1 | exact | int8 | cost | exact agrees | int8 agrees | bytes | back |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        top = [row[mode]["top1"] for mode in ("float", "exact", "int8")]
        cost = "" if top[2] is None else f"{top[2] - top[1]:+.2f}"
        said = ["" if value is None else f"{value:.2f}" for value in top]
        agree = [f"{row[mode]['agreement']:.2f}" for mode in ("exact", "int8")]
        cells = [row["name"], row["test"], f"{row['int8']['n']:,}", *said, cost, *agree, f"{row['int8']['bytes']:,}"]
        lines.append("| " + " | ".join([*cells, str(len(row["fallen_back"]))]) + " |")
    lines += [
        "",
        "back: layers that went back to float to stay within half a point on held-out samples, if the name does not",
        "say otherwise; vnni: made with `--vnni`, so with inputs of 8 bits.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--float", type=Path, required=True)
    parser.add_argument("--test", nargs="+", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--arch")
    parser.add_argument("--input", required=True)
    parser.add_argument("--max-drop", type=float, default=0.5)
    parser.add_argument("--vnni", action="store_true")
    args = parser.parse_args()
    path = RESULTS / "int8_accuracy.json"
    found = json.loads(path.read_text()) if path.exists() else []
    born = record.certificate("onnxruntime")
    for row in rows(args):
        found = [old for old in found if (old["name"], old["test"]) != (row["name"], row["test"])] + [row | born]
    path.write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
