"""Kill a short fine-tune at random moments (SIGKILL), go on each time, and compare the artifact's bytes in the end.

    python -m tests.benchmarks.kill_finetune [--kills 50] [--out tests/benchmarks/results/kill.json]

A run is ternary digits, ResNet-8, with a save every third step. Runs are repeated until there were enough kills; each
must end with the bytes of a run that was left alone.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import random
import signal
import tempfile
import time
from pathlib import Path

import torch

import pcq
from pcq.demo import HERE

ARCH = "pcq.demo.nets:resnet8?num_classes=10&in_channels=1"
STEPS = 40


def run(path: str) -> None:
    """One process's work: the run, from its beginning or from where it was killed."""
    torch.set_num_threads(1)
    resume = Path(path).with_suffix(".resume").exists()
    pcq.finetune(
        HERE / "digits-resnet8.safetensors", "ternary", "digits", out=path, arch=ARCH, steps=STEPS, save_every=3,
        resume=resume,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kill.json")
    args = parser.parse_args()
    chance, context = random.Random(args.seed), multiprocessing.get_context("fork")
    kills = runs = equal = before_first_save = 0
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "wanted.safetensors")
        start = time.perf_counter()
        child = context.Process(target=run, args=(str(wanted),))
        child.start()
        child.join()
        assert child.exitcode == 0
        whole = time.perf_counter() - start
        while kills < args.kills:
            path = Path(folder, f"run{runs}.safetensors")
            while not path.exists():
                child = context.Process(target=run, args=(str(path),))
                child.start()
                child.join(chance.uniform(0.2, 1.0) * whole if kills < args.kills else None)
                if child.is_alive():
                    assert child.pid is not None
                    os.kill(child.pid, signal.SIGKILL)
                    child.join()
                    kills += 1
                    before_first_save += not path.with_suffix(".resume").exists()
                else:
                    assert child.exitcode == 0, child.exitcode
            runs += 1
            equal += path.read_bytes() == wanted.read_bytes()
            print(f"{kills} kills, {runs} runs, {equal} equal to the byte", flush=True)
    record = {
        "kills": kills,
        "of them before the first save or after the artifact": before_first_save,
        "runs": runs,
        "artifacts equal to the uninterrupted run's": equal,
        "steps": STEPS,
        "seed": args.seed,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "hardware": f"{platform.machine()}, 1 thread, CPU",
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    assert equal == runs, record


if __name__ == "__main__":
    main()
