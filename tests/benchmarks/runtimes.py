"""The ONNX Runtimes that files are tried in, each in an environment of its own.

Plain scripts beside it (``ort_matrix.py``, ``probe_ort.py``) import it by its bare name.
"""

import subprocess
import sys
from pathlib import Path

VERSIONS = ("1.17.3", "1.18.1", "1.20.1", "1.22.1", "1.23.2", "1.24.4", "1.26.0", "1.28.0", "1.30.0", "1.32.0")


def python_with(version: str, envs: Path) -> Path:
    """The interpreter of an environment with that ONNX Runtime, made if it is missing; before 1.19 with numpy < 2."""
    folder = envs / f"ort-{version}"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        numpy = "numpy<2" if tuple(map(int, version.split(".")[:2])) < (1, 19) else "numpy"
        subprocess.run([python, "-m", "pip", "install", "-q", f"onnxruntime=={version}", numpy], check=True)
    return python
