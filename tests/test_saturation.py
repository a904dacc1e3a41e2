"""Integers of ONNX Runtime's int8 kernels are exact on any processor, as long as pcq says that they are.

The tests are exact on every processor; what they can show depends on it: only x86 without VNNI saturates.
"""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from pcq.commands import inspect
from pcq.export import cpu, open_packed, write_int8, write_onnx
from pcq.export.integers import large
from pcq.export.scheme import SATURATING
from pcq.grids import Affine, Codebook
from pcq.qtensor import QuantizedTensor
from pcq.rows import Rows
from tests.benchmarks.saturation import KERNELS, PRECISE, wrong

PROVOKING = (("one sign", "largest"), ("negative", "large"), ("either end", "uniform"))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("most", "top"), [(64, 255), (127, 127)])
def test_small_integers_and_inputs_of_7_bits_are_exact(kernel: str, most: int, top: int) -> None:
    for weights, inputs in PROVOKING:
        assert wrong(kernel, weights, inputs, most, top) == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_integers_saturate_where_we_say_so(kernel: str) -> None:
    """Also that this processor is judged rightly; and the session option that helps."""
    for weights, inputs in PROVOKING:
        assert wrong(kernel, weights, inputs, 127, options=PRECISE) == 0
        saturates = cpu.saturates()
        if saturates is None:
            pytest.skip(f"on {cpu.described()}; checked: with the session option it is exact")
        spared = "depthwise" in kernel
        assert (wrong(kernel, weights, inputs, 127) > 10) == (saturates and not spared)


def test_processors_are_told_apart() -> None:
    assert cpu.saturates("x86_64", "sse2 avx2") is True
    assert cpu.saturates("AMD64", "sse2 avx2 avx512f avx512_vnni") is False
    assert cpu.saturates("x86_64", "sse2 avx2 avx_vnni") is False
    assert cpu.saturates("x86_64", "") is None
    assert cpu.saturates("aarch64", "asimd asimddp") is None


def test_levels_of_large_integers() -> None:
    one, zeros = torch.ones(3), torch.zeros(3, dtype=torch.uint8)
    assert not large(Codebook(torch.rand(1, 255).sort().values))
    assert not any(large(Affine(one, *form)) for form in ((1.0, 3), (7.5, 16), (zeros, 65), (63.0, 127), (64.0, 129)))
    assert all(large(Affine(one, *form)) for form in ((127.0, 255), (128.0, 256), (zeros, 128), (31.5, 65)))


class Heavy(nn.Module):
    """Large weights of one sign on large inputs: a stem, a depthwise layer, pooling between two layers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.few, self.last, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.few(torch.relu(self.deep(torch.relu(self.stem(x))))))
        x = torch.relu(self.last(torch.max_pool2d(x, 2)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network, weights = Heavy().eval(), {}
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            count = 3 if name.startswith("few") else 255
            codes = torch.randint(count * 7 // 8, count, parameter.shape, dtype=torch.uint8)
            grid = Affine(torch.full((len(codes),), 1e-3), (count - 1) / 2, count)
            weights[name] = QuantizedTensor(codes, grid, Rows(tuple(codes.shape)))
            parameter.data.copy_(weights[name].dequantize())
    path = tmp_path_factory.mktemp("heavy") / "exact.onnx"
    write_onnx(network, weights, (torch.zeros(1, 4, 12, 12),), path)
    return path


def outputs(path: Path, x: Tensor, options: dict[str, str]) -> np.ndarray:
    said = ort.SessionOptions()
    for key, value in options.items():
        said.add_session_config_entry(key, value)
    session = ort.InferenceSession(str(path), said, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def test_a_file_computes_the_same_integers_on_every_processor(heavy: Path, tmp_path: Path) -> None:
    x = torch.rand(8, 4, 12, 12)
    report = write_int8(heavy, tmp_path / "int8.onnx", lambda: [x])
    assert report.seven_bits == ("stem.weight", "last.weight", "head.weight")
    assert report.saturating == ()
    assert np.array_equal(outputs(report.path, x, {}), outputs(report.path, x, PRECISE))
    assert open_packed(report.path).metadata[SATURATING] == "[]"
    assert any("the same integers everywhere" in value for _, value in inspect(report.path).facts)


def test_a_file_for_vnni_says_what_saturates_elsewhere(heavy: Path, tmp_path: Path) -> None:
    x = torch.rand(8, 4, 12, 12)
    report = write_int8(heavy, tmp_path / "int8.onnx", lambda: [x], vnni=True)
    assert report.seven_bits == ()
    assert report.saturating == ("stem.weight", "last.weight", "head.weight")
    assert ("layers that saturate on x86 without VNNI", ", ".join(report.saturating)) in inspect(report.path).facts
    saturates = cpu.saturates()
    if saturates is None:
        pytest.skip(f"on {cpu.described()}; checked: what the report says")
    same = np.array_equal(outputs(report.path, x, {}), outputs(report.path, x, PRECISE))
    assert same is not saturates
