"""Memory of ``pcq quantize model.onnx`` on a model above 2 GB with external data.

Run by hand: ``python tests/benchmarks/onnx_reach.py --folder DIR`` (needs about 6 GB of disk). Matrix products in a
row, 570 million weights, 2.3 GB of floats beside the model, are packed by ``w4``. A thread looks every 20 ms at how
much memory the process holds that is not a file's (RssAnon), and at the stage. The result goes to
``results/onnx_reach.json``.
"""

import argparse
import datetime
import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from pcq.commands import quantize_onnx

RESULTS = Path(__file__).parent / "results"
WIDE, NARROW, LAYERS = 4352, 2048, 64


def write_model(path: Path) -> int:
    """The model; returns the bytes of its floats."""
    generator = np.random.default_rng(0)
    data = path.with_name("big.data")
    nodes, tensors, offset, last = [], [], 0, "x"
    with data.open("wb") as file:
        for i in range(LAYERS):
            shape = (NARROW, WIDE) if i % 2 == 0 else (WIDE, NARROW)
            weight = generator.standard_normal(shape, np.float32) / np.sqrt(shape[0], dtype=np.float32)
            file.write(weight.tobytes())
            tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", data.name), ("offset", offset), ("length", weight.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
            offset += weight.nbytes
            nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"y{i}"], name=f"n{i}"))
            last = f"y{i}"
    graph = helper.make_graph(
        nodes, "big", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", NARROW])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, ["n", NARROW])], tensors,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return offset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args().folder / "onnx_reach"
    folder.mkdir(parents=True)
    stage, peaks, over = ["plan"], {}, threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            with open("/proc/self/status") as status:
                held = next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
            peaks[stage[0]] = max(peaks.get(stage[0], 0), held)

    def progress(said: str, done: int, total: int) -> None:
        stage[0] = said.split(" ")[0] if said.startswith("quantizing") else said

    try:
        floats = write_model(folder / "big.onnx")
        threading.Thread(target=watch, daemon=True).start()
        start = time.perf_counter()
        made = quantize_onnx(folder / "big.onnx", "w4", progress=progress)
        seconds = time.perf_counter() - start
        over.set()
        result = {
            "about": f"{datetime.date.today().isoformat()}, ONNX Runtime {onnxruntime.__version__}, recipe w4",
            "float_bytes": floats, "bytes_before": made.bytes_before, "bytes_after": made.proof.nbytes,
            "error": max(run.error for run in made.proof.agreements), "seconds": seconds, "peak_anonymous": peaks,
            "external_data": made.proof.data_path is not None,
        }  # fmt: skip
        print(json.dumps(result, indent=1))
        (RESULTS / "onnx_reach.json").write_text(json.dumps(result, indent=1) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
