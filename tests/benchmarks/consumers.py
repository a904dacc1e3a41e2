"""The examples of examples/onnx in Python, Node and a headless browser, on packed files of every kind of level.

Run by hand: ``python tests/benchmarks/consumers.py --modules FOLDER [--chromium NAME]``; FOLDER holds ``node_modules``
with onnxruntime-node and onnxruntime-web (``npm install --ignore-scripts onnxruntime-node onnxruntime-web``). The
demo's ResNet-20 is quantized by several recipes and exported; outputs on random numbers are compared with torch's,
``max |y - y0| / max |y0|``. The result goes to ``results/consumers.json``.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue

import numpy as np
import torch

from pcq.commands import export_onnx, open_network, quantize
from pcq.demo import HERE

RESULTS = Path(__file__).parent / "results"
EXAMPLES = Path(__file__).parents[2] / "examples" / "onnx"
ARCH = "pcq.demo.nets:resnet20?num_classes=10&in_channels=1"
RECIPES = ("ternary-all", "binary-all", "w3", "w4", "w4-g64", "w8", "codebook4", "nf4")
SHAPE = (2, 1, 28, 28)


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; what is posted goes to a queue."""

    results: "Queue[str]" = Queue()

    def do_POST(self) -> None:
        self.results.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def in_browser(chromium: str, folder: Path, query: str, port: int) -> dict[str, list[float]]:
    """What the page posts."""
    while not Handler.results.empty():
        Handler.results.get()
    profile = folder / "profile"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--no-first-run"]
    browser = subprocess.Popen(
        [chromium, *flags, f"http://127.0.0.1:{port}/page.html?{query}&report=/report"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        found: dict[str, list[float]] = json.loads(Handler.results.get(timeout=120))
    finally:
        browser.terminate()
        browser.wait(20)
        shutil.rmtree(profile, ignore_errors=True)
    return found


def version(modules: Path, name: str) -> str:
    """Of an npm package."""
    return str(json.loads((modules / "node_modules" / name / "package.json").read_text())["version"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", type=Path, required=True)
    parser.add_argument("--chromium", default="chromium")
    arguments = parser.parse_args()
    modules = arguments.modules.resolve()
    rows = []
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for example in EXAMPLES.iterdir():
            shutil.copy(example, folder)
        (folder / "node_modules").symlink_to(modules / "node_modules")
        x.tofile(folder / "input.bin")
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        shape = "x".join(map(str, SHAPE))
        for recipe in RECIPES:
            source = HERE / "fashion-mnist-resnet20.safetensors"
            made = quantize(source, recipe, out=folder / f"{recipe}.safetensors", arch=ARCH).path
            path = export_onnx(made, folder / f"{recipe}.onnx", input_shape=SHAPE[1:]).path
            with torch.no_grad():
                right = open_network(made).module(torch.from_numpy(x)).numpy().reshape(-1)
            row: dict[str, object] = {"recipe": recipe, "bytes": path.stat().st_size}
            commands = {"python": [sys.executable, "run.py"], "node": ["node", "run.mjs"]}
            found = {}
            for name, command in commands.items():
                done = subprocess.run(
                    [*command, path.name, shape, "input.bin"], cwd=folder, capture_output=True, text=True, check=False,
                    env={**os.environ},
                )  # fmt: skip
                found[name] = json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr[-300:]}
            query = f"model={path.name}&shape={shape}&input=input.bin"
            found["browser"] = in_browser(arguments.chromium, folder, query, server.server_port)
            for name, outputs in found.items():
                if "error" in outputs:
                    row[name] = outputs["error"]
                    continue
                (values,) = outputs.values()
                row[name] = float(np.abs(np.asarray(values) - right).max() / np.abs(right).max())
            rows.append(row)
            print(row, flush=True)
        server.shutdown()
    import onnxruntime

    browser = subprocess.run(
        [arguments.chromium, "--version"], capture_output=True, text=True, check=False
    ).stdout.strip()
    node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    about = {
        "date": datetime.date.today().isoformat(), "python": f"onnxruntime {onnxruntime.__version__}",
        "node": f"Node {node}, onnxruntime-node {version(modules, 'onnxruntime-node')}",
        "browser": f"{browser}, onnxruntime-web {version(modules, 'onnxruntime-web')} (wasm, one thread)",
    }  # fmt: skip
    (RESULTS / "consumers.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
