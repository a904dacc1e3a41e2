"""Where nothing can be written is said before any work."""

from collections.abc import Callable
from pathlib import Path

import pytest

import pcq
from pcq import commands
from pcq.errors import PcqError

DIGITS = Path(pcq.__file__).parent / "demo" / "digits-resnet8.safetensors"
ARCH = "pcq.demo.nets:resnet8?num_classes=10&in_channels=1"

Work = Callable[[Path], object]


def quantized(out: Path, **how: str) -> object:
    return commands.quantize(DIGITS, "w4", arch=ARCH, out=out, **how)  # type: ignore[arg-type]


WORK: dict[str, tuple[str, Work, str]] = {
    "calibrated": ("x.safetensors", lambda out: quantized(out, calibration="digits"), "quantizing.calibrated"),
    "budget": ("x.safetensors", lambda out: quantized(out, budget="30kB"), "quantizing.allocate"),
    "analyzed": ("x.png", lambda out: commands.analyze(DIGITS, "w4", arch=ARCH, plot=out), "analyzing.plan"),
    "benched": ("x.png", lambda out: commands.bench([DIGITS], arch=ARCH, plot=out), "benching.open_files"),
}


@pytest.mark.parametrize(("name", "work", "inner"), WORK.values(), ids=WORK)
def test_before_any_work(name: str, work: Work, inner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def began(*_: object, **__: object) -> None:
        pytest.fail("work began")

    monkeypatch.setattr(f"pcq.commands.{inner}", began)
    with pytest.raises(PcqError, match="there is no folder"):
        work(tmp_path / "no" / name)
    with pytest.raises(PcqError, match=r"Let it end in \."):
        work(tmp_path / "x.onnx")
    theirs = tmp_path / name
    theirs.write_text("mine")
    with pytest.raises(PcqError, match="there is a file already, and pcq did not write it"):
        work(theirs)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
