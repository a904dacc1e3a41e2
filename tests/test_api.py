"""The Python interface: the names people import, pinned, and what importing costs."""

import pkgutil
import subprocess
import sys
from collections.abc import Callable

import pytest

import pcq
from pcq.commands import Calibration, Int8


def test_names_are_pinned() -> None:
    assert pcq.__all__ == [
        "CheckFailed",
        "PcqError",
        "analyze",
        "bench",
        "evaluate",
        "export_onnx",
        "finetune",
        "inspect",
        "load_network",
        "load_recipe",
        "open_network",
        "quantize",
        "read_artifact",
    ]


@pytest.mark.parametrize("name", pcq.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    assert (getattr(pcq, name).__doc__ or "").strip()


def test_no_room_takes_a_public_name() -> None:
    """Importing pcq.x sets the attribute x of the package, which would hide a function of that name."""
    rooms = {module.name for module in pkgutil.iter_modules(pcq.__path__)}
    assert not rooms & set(pcq.__all__)


def test_modules_are_there_too() -> None:
    code = "import sys, pcq; assert 'torch' not in sys.modules; pcq.commands.plan; pcq.proxconnect.ProxConnect"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "ask",
    [
        lambda: Int8(ranges="foo"),  # type: ignore[arg-type]
        lambda: Calibration("digits", method="foo"),  # type: ignore[arg-type]
        lambda: pcq.export_onnx("x", layout="foo"),  # type: ignore[arg-type]
        lambda: pcq.export_onnx("x", aim="foo"),  # type: ignore[arg-type]
        lambda: pcq.export_onnx("x", level=2),  # type: ignore[arg-type]
        lambda: pcq.analyze("x", "ternary", samples=8),
    ],
)
def test_a_wrong_choice_is_a_pcq_error(ask: Callable[[], object]) -> None:
    with pytest.raises(pcq.PcqError, match=r"there is no ('foo'|2)\. Allowed: |about samples, and none were asked for"):
        ask()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        pcq.quantise  # noqa: B018


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"], ["--version"], []])
def test_help_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from pcq.cli import run; code = run(sys.argv[1:]);"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules);"
        "print(sorted(heavy), file=sys.stderr); sys.exit(bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pcq" in done.stdout + done.stderr
