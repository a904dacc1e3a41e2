"""Run a packed ONNX file: ``python run.py model.onnx 1x3x224x224 [input.bin]`` (``pip install onnxruntime``).

Prints the outputs as JSON, name -> list of numbers. ``input.bin`` holds float32 numbers; without it the input is zeros.
"""

import json
import sys

import numpy as np
import onnxruntime

path, shape = sys.argv[1], [int(size) for size in sys.argv[2].split("x")]
x = np.fromfile(sys.argv[3], np.float32).reshape(shape) if len(sys.argv) > 3 else np.zeros(shape, np.float32)
session = onnxruntime.InferenceSession(path)  # leave graph optimisation on: it unpacks the weights once, here
names = [output.name for output in session.get_outputs()]
outputs = session.run(names, {session.get_inputs()[0].name: x})
numbers = {name: output.reshape(-1).tolist() for name, output in zip(names, outputs, strict=True)}
print(json.dumps(numbers))  # noqa: T201
