"""What every test runs in: one thread a process, and torch.onnx's translations parsed once a process."""

import gc
import os
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
