"""What loading a file costs, measured in a process of its own: code for ``python -c``, free of everything else.

The process prints seconds to load, seconds of the first run, and bytes: the peak of the resident memory during both
over what was resident before. Where the kernel cannot reset the peak, it is that since the process began. Of a run that
fails it prints the reason.
"""

import io
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pcq.errors import CheckFailed, PcqError

Array = npt.NDArray[np.generic]

MEMORY = """
import io, json, sys, time
import numpy
def field(name):
    try:
        with open("/proc/self/status") as file:
            return 1024 * int(next(line for line in file if line.startswith(name)).split()[1])
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
def begin():
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass
    return field("VmRSS"), time.perf_counter()
def end(before, start, loaded, run):
    try:
        run()
    except Exception as error:
        print(json.dumps((str(error).strip() or type(error).__name__).splitlines()[0]))
        return
    print(json.dumps([loaded - start, time.perf_counter() - loaded, max(0, field("VmHWM") - before)]))
given = json.loads(sys.argv[1])
with numpy.load(io.BytesIO(sys.stdin.buffer.read())) as stored:
    feed = dict(zip(given["names"], (stored[name] for name in stored.files)))
"""

ONNX = (
    MEMORY
    + """
import onnxruntime as ort
options = ort.SessionOptions()
options.log_severity_level = 3
before, start = begin()
session = ort.InferenceSession(given["path"], options, providers=["CPUExecutionProvider"])
loaded = time.perf_counter()
end(before, start, loaded, lambda: session.run(None, feed))
"""
)

TORCH = (
    MEMORY
    + """
import torch
from pcq.commands import open_network
feed = {name: torch.from_numpy(x) for name, x in feed.items()}
torch.nn.functional.conv2d(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 3, 3))
before, start = begin()
network = open_network(given["path"], **given["opening"])
loaded = time.perf_counter()
with torch.no_grad():
    end(before, start, loaded, lambda: network.run_named(feed))
"""
)


@dataclass(frozen=True)
class Fresh:
    """Seconds to load, seconds of the first run at batch 1, and bytes of memory that both took at most."""

    load: float
    first: float
    peak: int


def measure(path: Path, runtime: str, opening: Mapping[str, Any], feed: Mapping[str, Array]) -> Fresh:
    """Load and run once in a new process.

    Args:
        path: an ONNX file, or a checkpoint or artifact.
        runtime: ``ONNX Runtime`` or ``torch``.
        opening: how ``open_network`` opens it, for torch.
        feed: what it runs on: an array for each input by its name, in the order of the network's arguments.

    Raises:
        PcqError: it does not run on them.
        CheckFailed: the process ended badly.
    """
    given = json.dumps({"path": str(path), "opening": dict(opening), "names": list(feed)})
    np.savez(arrays := io.BytesIO(), *feed.values())
    code = ONNX if runtime == "ONNX Runtime" else TORCH
    done = subprocess.run(
        [sys.executable, "-c", code, given], input=arrays.getvalue(), capture_output=True, check=False
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").splitlines()
        lines = [line.strip() for line in said if line.strip()] or [f"exit code {done.returncode}"]
        last = next((line for line in reversed(lines) if "Error" in line or "Exception" in line), lines[-1])
        raise CheckFailed(f"a process of its own could not load and run it: {last}", where=str(path))
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    if isinstance(answer, str):
        shapes = ", ".join(f"{name} {'x'.join(map(str, array.shape))}" for name, array in feed.items())
        raise PcqError(f"it does not run on {shapes}: {answer}", where=str(path), todo="Is --input right?")
    load, first, peak = answer
    return Fresh(load, first, int(peak))
