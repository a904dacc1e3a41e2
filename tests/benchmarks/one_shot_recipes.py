"""Every shipped recipe, one-shot, on the demo's ResNet-20 for Fashion-MNIST: the figures in the recipes' comments.

    python tests/benchmarks/one_shot_recipes.py [--limit 2000] [NAME ...]

Quantization uses no data and no random numbers, so the figures are the same in every run.
"""

import argparse
import tempfile
from pathlib import Path

import pcq
from pcq.recipe import shipped_recipes

DEMO = Path(pcq.__file__).parent / "demo"
FLOAT = DEMO / "fashion-mnist-resnet20.safetensors"
ARCH = "pcq.demo.nets:resnet20?num_classes=10&in_channels=1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="recipes; all shipped ones if none is given")
    parser.add_argument("--limit", type=int, default=2000, help="test images, from the first on")
    args = parser.parse_args()
    scores = pcq.evaluate(FLOAT, "fashion-mnist", arch=ARCH, limit=args.limit).scores
    print(f"| recipe | top-1 of {scores.n} | bits a weight | times smaller |\n|---|---|---|---|")
    print(f"| float | {scores.top1:.1f} | 32 | 1.0 |")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.names or [each.name for each in shipped_recipes()]:
            made = pcq.quantize(FLOAT, name, arch=ARCH, out=Path(folder) / f"{name}.safetensors")
            plan = made.planned.plan
            top1 = pcq.evaluate(made.path, "fashion-mnist", limit=args.limit).scores.top1
            print(f"| {name} | {top1:.1f} | {made.bits:.2f} | {plan.bytes_before / plan.bytes_after:.1f} |", flush=True)


if __name__ == "__main__":
    main()
