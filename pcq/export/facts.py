"""What the ONNX Runtimes can do: one table, ``facts.json`` beside this file, which tests/benchmarks/probe_ort.py makes.

A version between two that were measured is taken to do what the older one does. A file for a target has to run on
every later version too, so a layout serves only if it does in all of them.
"""

import json
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from pcq.errors import PcqError

Span = tuple[int, int]
"""The first and the last operator set that serve."""


@dataclass(frozen=True)
class Runtime:
    """What one ONNX Runtime version does.

    Attributes:
        version: such as ``(1, 20)``.
        opset: the newest operator set that it loads.
        ir_version: the newest IR version that it loads.
        fast_opset: the newest operator set whose convolutions it runs in its blocked layout.
        folded_casts: types of 2 and 4 bits that it casts to float when a session is made.
        dequantizes: operator -> type -> grain (``tensor``, ``channel``) -> where DequantizeLinear before that operator
            is right, keeps the codes packed, and is not turned into int8 arithmetic.
        matmulnbits: bits -> zero points (``none``: 2 ** (bits - 1), ``integer``, ``float``) -> accuracy level -> its
            error on random numbers, relative to the outputs' scale; missing: it does not run.
    """

    version: tuple[int, int]
    opset: int
    ir_version: int
    fast_opset: int
    folded_casts: dict[str, Span]
    dequantizes: dict[str, dict[str, dict[str, Span]]]
    matmulnbits: dict[str, dict[str, dict[str, float]]]

    @property
    def name(self) -> str:
        return ".".join(map(str, self.version))


def _read() -> tuple[Runtime, ...]:
    table: dict[str, dict[str, Any]] = json.loads(files("pcq.export").joinpath("facts.json").read_text())["runtimes"]
    return tuple(
        Runtime(version=(int(name.split(".")[0]), int(name.split(".")[1])), **entry) for name, entry in table.items()
    )


RUNTIMES = _read()
"""Oldest first."""

OPSET, IR_VERSION = 20, 9
"""Used wherever nothing newer is needed. Opset 20 is the first with Gelu as one operator; of 22 and later, ONNX Runtime
1.23 and 1.24 run convolutions up to 2.5 times slower."""

IR_VERSIONS = {20: 9, 21: 10, 25: 13}
"""The operator sets that are written -> the IR version that came with each: types of 4 bits came with 21, of 2 with 25.
What changed between 20 and 25 are types, but for GroupNormalization."""

LOCAL_FUNCTION_IR = 8
"""The first IR version with model-local functions."""

EXACT = 1e-5
"""Errors in the table up to this are rounding of floats."""


@dataclass(frozen=True)
class Target:
    """What a file is written for: it runs on every ONNX Runtime from ``ort`` on.

    Attributes:
        ort: the version.
        runtimes: what is known of it and of the later ones.
    """

    ort: str
    runtimes: tuple[Runtime, ...]

    @property
    def opset(self) -> int:
        return min(OPSET, *(runtime.opset for runtime in self.runtimes))

    @property
    def ir_version(self) -> int:
        return min(IR_VERSION, *(runtime.ir_version for runtime in self.runtimes))

    def loads(self, opset: int) -> bool:
        """Whether all load a file of this operator set and run it at full speed."""
        return all(
            opset <= min(runtime.opset, runtime.fast_opset) and IR_VERSIONS[opset] <= runtime.ir_version
            for runtime in self.runtimes
        )

    def folds(self, kind: str, opset: int) -> bool:
        """Whether all cast initializers of this type to float when a session is made."""
        return all(_within(opset, runtime.folded_casts.get(kind)) for runtime in self.runtimes)

    def dequantizes(self, operator: str, kind: str, grain: str, opset: int) -> bool:
        """Whether all run DequantizeLinear of this type in float before this operator."""
        return all(
            _within(opset, runtime.dequantizes.get(operator, {}).get(kind, {}).get(grain)) for runtime in self.runtimes
        )

    def multiplies(self, bits: int, zero: str, level: int) -> float | None:
        """The largest error of MatMulNBits in any of them; None: one does not run it."""
        errors = [runtime.matmulnbits.get(str(bits), {}).get(zero, {}).get(str(level)) for runtime in self.runtimes]
        return None if None in errors else max(error for error in errors if error is not None)


def target(ort: str) -> Target:
    """What has to run on ONNX Runtime ``ort``, such as ``1.17``, and later.

    Raises:
        PcqError: no version, one older than any that was tried, or one newer.
    """
    oldest, newest = RUNTIMES[0].name, RUNTIMES[-1].name
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
    first = max(i for i, runtime in enumerate(RUNTIMES) if runtime.version <= version)
    return Target(ort.strip(), RUNTIMES[first:])


def oldest(opset: int, ir_version: int) -> str | None:
    """The oldest ONNX Runtime that is known to load this operator set and IR version; None: no version is."""
    able = (r for r in RUNTIMES if r.opset >= opset and r.ir_version >= ir_version)
    first = next(able, None)
    return None if first is None else first.name


def _within(opset: int, span: Span | None) -> bool:
    return span is not None and span[0] <= opset <= span[1]
