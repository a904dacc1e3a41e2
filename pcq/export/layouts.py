"""What the ONNX Runtimes can load, and what is chosen for them.

The facts were measured by running the same files in each version (ONNX.md section 1; tests/benchmarks/ort_matrix.py
runs ours). A version between two that were measured is taken to do what the older one does.
"""

import re
from dataclasses import dataclass

from pcq.errors import PcqError


@dataclass(frozen=True)
class Runtime:
    """What one ONNX Runtime version loads: the newest operator set and the newest IR version."""

    version: tuple[int, int]
    opset: int
    ir_version: int


RUNTIMES = (
    Runtime((1, 17), 20, 9),
    Runtime((1, 20), 21, 10),
    Runtime((1, 22), 22, 10),
    Runtime((1, 23), 23, 11),
    Runtime((1, 24), 25, 13),
    Runtime((1, 25), 26, 13),
    Runtime((1, 30), 26, 13),
    Runtime((1, 32), 28, 14),
)
"""Oldest first."""

OPSET, IR_VERSION = 20, 9
"""Used wherever they load. Opset 20 is the first with Gelu as one operator; 22 and later run up to 2.5 times slower on
ONNX Runtime 1.23 and 1.24."""

LOCAL_FUNCTION_IR = 8
"""The first IR version with model-local functions."""


@dataclass(frozen=True)
class Target:
    """What a file is written for: it runs on every ONNX Runtime from ``ort`` on."""

    ort: str
    opset: int
    ir_version: int


def target(ort: str) -> Target:
    """The operator set and IR version for a file that has to run on ONNX Runtime ``ort``, such as ``1.17``, and later.

    Raises:
        PcqError: no version, one older than any that was tried, or one newer.
    """
    oldest, newest = (".".join(map(str, runtime.version)) for runtime in (RUNTIMES[0], RUNTIMES[-1]))
    known = f"{oldest} to {newest}"
    found = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)?", ort.strip())
    if not found:
        raise PcqError(f"'{ort}' is not an ONNX Runtime version", where="target ORT", allowed=f"{known}, such as 1.23")
    version = int(found[1]), int(found[2])
    if version < RUNTIMES[0].version:
        raise PcqError(
            f"packed weights are not known to run on ONNX Runtime {ort}", where="target ORT", allowed=known,
            todo=f"Update that ONNX Runtime to {oldest} or later",
        )  # fmt: skip
    if version > RUNTIMES[-1].version:
        raise PcqError(
            f"nothing is known about ONNX Runtime {ort}", where="target ORT", allowed=known,
            todo=f"Take {oldest}: newer versions run files made for older ones",
        )  # fmt: skip
    runtime = [runtime for runtime in RUNTIMES if runtime.version <= version][-1]
    return Target(ort.strip(), min(OPSET, runtime.opset), min(IR_VERSION, runtime.ir_version))


def oldest(opset: int, ir_version: int) -> str | None:
    """The oldest ONNX Runtime that is known to load this operator set and IR version; None: no version is."""
    able = (r for r in RUNTIMES if r.opset >= opset and r.ir_version >= ir_version)
    first = next(able, None)
    return None if first is None else ".".join(map(str, first.version))
