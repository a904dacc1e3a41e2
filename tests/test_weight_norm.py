"""Networks of weight_norm: their weights are put together, quantized, and fit the network from then on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import pcq
from pcq import commands, models
from pcq.errors import PcqError
from pcq.sources import open_source
from pcq.weight_norm import remove

VOCODER = """
import torch
from torch import nn
from torch.nn.utils import weight_norm as old
from torch.nn.utils.parametrizations import weight_norm as new

def build(kind="old"):
    norm = {"old": old, "new": new, "none": lambda layer: layer}[kind]
    torch.manual_seed(0)
    made = nn.Sequential(
        norm(nn.Conv1d(2, 8, 7, padding=3)), nn.LeakyReLU(0.1),
        norm(nn.ConvTranspose1d(8, 6, 4, 2, 1)), nn.LeakyReLU(0.1), norm(nn.Conv1d(6, 4, 3, padding=1)),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(),
    )
    with torch.no_grad():
        for name, value in made.named_parameters():
            if name.endswith(("weight_g", "original0")):
                value *= 1.5
    return made

def samples(split):
    return torch.randn(24, 2, 16, generator=torch.Generator().manual_seed(1))
"""
OLD, NEW = torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm
Net = Callable[[str], nn.Module]


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Net:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(VOCODER)

    def made(kind: str) -> nn.Module:
        found: nn.Module = {}  # type: ignore[assignment]
        exec(VOCODER, found)  # type: ignore[arg-type]
        module: nn.Module = found["build"](kind).eval()  # type: ignore[index]
        torch.save(module.state_dict(), "m.pt")
        return module

    return made


@pytest.mark.parametrize("wrap", [OLD, NEW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("layer", "dim"),
    [
        (lambda: nn.Conv1d(3, 4, 5), 0),
        (lambda: nn.Conv1d(3, 4, 5), 2),  # wav2vec 2.0's positional convolution
        (lambda: nn.ConvTranspose2d(3, 4, 2), 1),
        (lambda: nn.Linear(3, 3), 0),
        (lambda: nn.Linear(3, 3), None),
        (lambda: nn.Conv1d(1, 1, 5), 0),
    ],
)
def test_the_weight_is_the_one_that_torch_computes(
    wrap: Callable[..., nn.Module], dtype: torch.dtype, layer: Callable[[], nn.Module], dim: int, tmp_path: Path
) -> None:
    module = wrap(layer().to(dtype), dim=dim)
    torch.save(module.state_dict(), tmp_path / "m.pt")
    source = open_source(tmp_path / "m.pt")
    assert source.names == ["weight", "bias"]  # as in a layer without
    assert torch.equal(source.tensor("weight"), getattr(module, "weight").detach())  # noqa: B009
    assert source.notes == ("Put 1 weight together from the parts of its weight_norm.",)
    assert remove(module) == 1
    models.load_state(module, source.state_dict())
    assert list(module.state_dict()) == source.names


def test_safetensors_and_prefixes(net: Net, tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in net("new").state_dict().items()}
    save_file(state, tmp_path / "m.safetensors")
    source = open_source(tmp_path / "m.safetensors")
    assert sorted(source.names) == sorted(f"{i}.{name}" for i in (0, 2, 4) for name in ("weight", "bias"))
    assert source.names[:2] == ["0.bias", "0.weight"]  # the file lists by name, and that has to show
    assert source.notes[-1] == "Put 3 weights together from the parts of their weight_norm."


def test_one_weight_under_two_names_stays_one(tmp_path: Path) -> None:
    a, b = OLD(nn.Linear(3, 4)), OLD(nn.Linear(3, 4))
    b.weight_g, b.weight_v = a.weight_g, a.weight_v
    torch.save(nn.ModuleDict({"a": a, "b": b}).state_dict(), tmp_path / "m.pt")
    assert open_source(tmp_path / "m.pt").tied == {"b.weight": "a.weight"}


@pytest.mark.parametrize(
    "state",
    [
        {"a.weight_g": (4, 1), "a.weight_v": (5, 3)},
        {"a.weight_g": (4,), "a.weight_v": (4, 3)},
        {"a.weight_g": (4, 3), "a.weight_v": (4, 3)},
        {"a.weight_g": (1, 1), "a.weight_v": (4, 3)},
        {"a.weight_g": (4, 1), "a.weight_v": (4, 3), "a.weight": (4, 3)},
        {"a.weight_g": (4, 1)},
        {"a.weight_v": (4, 3)},
        {"a.gain_g": (4, 1), "a.gain_v": (4, 3)},
        {"a.parametrizations.weight.original0": (4, 1), "a.parametrizations.weight.original1": (2, 3)},
        {
            "a.parametrizations.weight.original0": (4, 1),
            "a.parametrizations.weight.original1": (4, 3),
            "a.parametrizations.weight.1.scale": (4, 3),
        },
    ],
)
def test_tensors_that_are_only_called_so_are_left_alone(state: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    torch.save({name: torch.randn(shape) for name, shape in state.items()}, tmp_path / "m.pt")
    source = open_source(tmp_path / "m.pt")
    assert source.names == list(state)
    assert source.notes == ()


def test_parts_of_integers_are_left_alone(tmp_path: Path) -> None:
    torch.save({"weight_g": torch.ones(4, 1), "weight_v": torch.ones(4, 3, dtype=torch.int32)}, tmp_path / "m.pt")
    assert open_source(tmp_path / "m.pt").names == ["weight_g", "weight_v"]


@pytest.mark.parametrize("wrap", [OLD, NEW])
def test_a_recurrent_layer_runs_on_the_weights_put_together(wrap: Callable[..., nn.Module], tmp_path: Path) -> None:
    module: nn.Module = nn.LSTM(3, 4, batch_first=True)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        module = wrap(module, name)
    x = torch.randn(2, 5, 3)
    with torch.no_grad():
        module.get_parameter(next(n for n, _ in module.named_parameters() if n.endswith(("_g", "0.original0")))).mul_(2)
        before = module(x)[0]
    torch.save(module.state_dict(), tmp_path / "m.pt")
    source = open_source(tmp_path / "m.pt")
    assert remove(module) == 2
    with torch.no_grad():
        for value in module.parameters():
            value.zero_()
        models.load_state(module, source.state_dict())
        assert torch.allclose(module(x)[0], before, atol=1e-6)
    assert list(module.state_dict()) == source.names


def test_other_parametrizations_stay() -> None:
    module = nn.Sequential(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), NEW(nn.Linear(4, 4)))
    torch.nn.utils.parametrize.register_parametrization(module[1], "weight", nn.Identity())
    before = list(module.state_dict())
    assert remove(module) == 0
    assert list(module.state_dict()) == before


def test_a_pickled_network_is_put_together(net: Net) -> None:
    module = net("old")
    x = torch.randn(1, 2, 16)
    before = module(x)
    torch.save(module, "whole.pt")
    source = open_source("whole.pt", unsafe_pickle=True)
    assert source.notes[-1] == "Put 3 weights together from the parts of their weight_norm."
    assert source.names == list(net("none").state_dict())
    loaded = source.module()
    assert loaded is not None
    assert torch.equal(loaded(x), before)


@pytest.mark.parametrize(("kept", "built"), [("old", "old"), ("old", "new"), ("new", "new"), ("new", "none")])
def test_from_the_checkpoint_to_onnx(net: Net, kept: str, built: str) -> None:
    module = net(kept)
    arch = f"net.py:build?kind={built}"
    float_network = pcq.open_network("m.pt", arch).module
    x = torch.randn(2, 2, 16)
    assert torch.equal(float_network(x), module(x))
    planned = commands.plan("m.pt", "w8", arch=arch)
    assert planned.notes[0] == "Put 3 weights together from the parts of their weight_norm."
    assert [entry.parameter.name for entry in planned.plan.quantized] == ["0.weight", "2.weight", "4.weight"]
    assert [entry.parameter.kind for entry in planned.plan.quantized] == ["conv1d", "conv_transpose1d", "conv1d"]
    result = commands.run(planned)
    assert pcq.quantize("m.pt", "w8", out="without.safetensors").bits == result.bits
    opened = pcq.open_network(result.path).module
    assert (opened(x) - module(x)).norm() < 0.02 * module(x).norm()
    scores = pcq.evaluate(result.path, "net.py:samples", reference="m.pt").scores
    assert scores is not None
    exported = pcq.export_onnx(result.path, input_shape=(2, 16))
    assert exported.path.exists()


def test_analyzed_and_calibrated(net: Net) -> None:
    net("new")
    arch = "net.py:build?kind=new"
    rows = pcq.analyze("m.pt", "ternary-all", calib="net.py:samples", arch=arch).weights
    assert sorted(row.name for row in rows) == ["0.weight", "2.weight", "4.weight"]
    made = pcq.quantize("m.pt", "ternary-all", arch=arch, calibration=commands.Calibration("net.py:samples", 16))
    assert list(pcq.open_network(made.path).module.state_dict())[:2] == ["0.weight", "0.bias"]


def test_first_and_last_are_the_networks(net: Net) -> None:
    net("old")
    for arch in (None, "net.py:build"):
        levels = [entry.text for entry in commands.plan("m.pt", "ternary", arch=arch).plan.quantized]
        assert levels[1].startswith("ternary")
        assert not levels[0].startswith("ternary")
        assert levels[0] == levels[2]


def test_a_state_dict_that_kept_the_parts_still_loads(net: Net) -> None:
    """Artifacts of older versions hold such."""
    module, built = net("old"), models.build("net.py:build")
    x = torch.randn(2, 2, 16)
    state = module.state_dict()
    models.check_shapes(built, {name: tuple(value.shape) for name, value in state.items()})
    models.load_state(built, state)
    assert torch.equal(built.eval()(x), module(x))
    with pytest.raises(PcqError, match=r"1 tensor is missing \(0.bias\)"):
        models.load_state(built, {name: value for name, value in state.items() if name != "0.bias"})
