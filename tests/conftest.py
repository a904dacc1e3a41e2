"""What every test runs in: one thread a process, its own random numbers, torch.onnx's translations parsed once."""

import ctypes
import gc
import os
import random
from collections.abc import Iterator
from functools import cache

import pytest

# Before torch is imported, and for the processes that tests start: two workers of two threads each wait for one another
# on two cores, for several times as long as they compute. Tests of threads set their own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """What is there by now stays: the collector need not walk it again and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test and the fixtures made for it draw the same numbers, whichever tests ran before in the process."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _translations_once() -> Iterator[None]:
    """torch.onnx parses its 500 translations anew in every export: half of what a small network's takes."""
    from onnxscript._framework_apis import torch_2_5

    parse = torch_2_5.get_torchlib_ops

    @cache
    def translations() -> object:
        found = parse()
        pytest_collection_finish()  # they stay too, and all that the first export imported
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_2_5, "get_torchlib_ops", translations)
        yield


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    """The GPU's kernels, compiled for the CPU: a library for each ``.cu`` file."""
    from tests.kernel_source import compiled

    return compiled(tmp_path_factory.mktemp("kernel"))
