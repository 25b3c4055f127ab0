"""The number of threads changes rounding, and nothing else."""

import copy
from collections.abc import Iterator

import pytest
import torch

from benchmarks.threads import JOBS, TOLERANCE, Made, difference, make
from tests.conftest import build_model, make_batches

BATCHES = make_batches([3 + index % 18 for index in range(32)], batch_size=16)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def made(job: str, count: int) -> Made:
    torch.set_num_threads(count)
    return make(job, build_model(hidden_size=128, intermediate_size=256), copy.deepcopy(BATCHES), mu=0.5)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("job", [job for job in JOBS if job != "shrink"])
def test_one_thread_or_two(job: str) -> None:
    one = made(job, 1)
    assert difference(one, made(job, 1)) == (True, 0.0, 0.0)
    same, weights, outputs = difference(one, made(job, 2))
    assert same
    assert weights < TOLERANCE
    assert outputs < TOLERANCE


def test_other_plans_are_no_rounding() -> None:
    assert difference(Made("a", {}), Made("b", {}))[0] is False
