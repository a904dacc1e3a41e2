"""Pieces on threads: in order, without gradients, and torch's own setting as it was."""

import os
from threading import Thread, current_thread
from time import sleep

import pytest
import torch

from pcq.threads import each, pieces_only

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.mark.parametrize("pieces", [0, 1, 7])
def test_results_are_in_order_and_each_is_computed_alone(threads: int, pieces: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = each(lambda i: (i, torch.get_num_threads(), torch.is_grad_enabled()), range(pieces), CPU)
        assert found == [(i, 1, False) for i in range(pieces)]
        assert torch.get_num_threads() == threads
        later: list[int] = []
        thread = Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [threads]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("pieces", [1, 7])
def test_a_failure_comes_out_and_leaves_the_setting(threads: int, pieces: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with pytest.raises(ZeroDivisionError):
            each(lambda i: 1 // (i - pieces + 1), range(pieces), CPU)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_only_pieces_use_several_threads(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with pieces_only():
            assert torch.get_num_threads() == 1
            names = each(lambda i: sleep(0.05) or current_thread().name, range(6), CPU)
            assert len(set(names)) == threads
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_the_suite_computes_on_as_many_threads_as_it_is_told() -> None:
    """One, unless the environment has another number: tests/conftest.py says so before torch is imported."""
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
