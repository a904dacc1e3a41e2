"""The picture of a prox: a PNG whose curves are the maps, and refusals in words."""

import builtins
import io
import sys
from typing import Any

import pytest
import torch

from pcq.errors import PcqError
from pcq.plots import prox_figure
from pcq.prox import BinaryRelax, Hard, L, Parq, Prox, ProxQuant, proximal

pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")


def curves(monkeypatch: pytest.MonkeyPatch, prox: Prox, levels: list[float], **kwargs: Any) -> tuple[Any, bytes]:
    """The axes that were drawn, and the PNG."""
    from matplotlib.figure import Figure

    drawn = []
    savefig = Figure.savefig

    def spy(self: Figure, *args: Any, **options: Any) -> None:
        drawn.append(self.axes[0])
        savefig(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    png = prox_figure(prox, levels, **kwargs)
    return drawn[0], png


@pytest.mark.parametrize("prox", [Hard(), ProxQuant(), BinaryRelax(), Parq(relative=False), L(1.0, 0.5)])
def test_the_curves_are_the_maps(monkeypatch: pytest.MonkeyPatch, prox: Prox) -> None:
    from PIL import Image

    levels = [1.0, -1.0, -0.3, 0.3]
    axes, png = curves(monkeypatch, prox, levels, strengths=(0.1, 0.6))
    identity, *lines = axes.get_lines()
    assert identity.get_linestyle() == "--"
    assert list(identity.get_xdata()) == list(identity.get_ydata()) == [-1.5, 1.5]
    assert [line.get_label() for line in lines] == ["strength 0.1", "strength 0.6"]
    for line, strength in zip(lines, (0.1, 0.6), strict=True):
        weights = torch.as_tensor(line.get_xdata())[None]
        want = proximal(weights, torch.tensor([sorted(levels)], dtype=torch.float64), prox.shifts(strength))
        assert torch.equal(torch.as_tensor(line.get_ydata()), want[0])
    assert list(axes.get_xticks()) == list(axes.get_yticks()) == sorted(levels)
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    assert image.size == (780, 750)
    assert len(image.convert("RGB").getcolors(maxcolors=2**20) or []) > 50


def test_the_same_picture_is_the_same_bytes_and_pyplot_is_not_touched() -> None:
    before = "matplotlib.pyplot" in sys.modules
    assert prox_figure(Parq(), [-1, 0, 1]) == prox_figure(Parq(), [1, 0, -1, 0])
    assert ("matplotlib.pyplot" in sys.modules) == before


@pytest.mark.parametrize("levels", [[], [1.0], [1.0, 1.0], [0.0, float("nan")], [0.0, float("inf")]])
def test_levels_that_cannot_be_drawn_are_refused(levels: list[float]) -> None:
    with pytest.raises(PcqError, match="two or more different finite numbers"):
        prox_figure(Hard(), levels)


@pytest.mark.parametrize("strengths", [[], [1.5], [float("nan")]])
def test_strengths_that_cannot_be_drawn_are_refused(strengths: list[float]) -> None:
    with pytest.raises(PcqError, match="one or more numbers from 0 to 1"):
        prox_figure(Hard(), [-1, 1], strengths)


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(PcqError, match=r"pcq\[plots\]"):
        prox_figure(Hard(), [-1, 1])
