"""``--round_to auto``: which multiple is chosen, and what is measured for it."""

import doctest
from typing import Any

import pytest
import torch

from shrinkformer.efficiency import rounding
from shrinkformer.efficiency.rounding import MULTIPLES, Rounding, choose_multiple, odd_multiple
from shrinkformer.errors import InputError


def test_examples_in_the_docstrings() -> None:
    result = doctest.testmod(rounding)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("multiple", MULTIPLES)
@pytest.mark.parametrize("width", [1, 63, 64, 100, 1536, 2047])
def test_odd_multiples_are_near_and_no_rounder_than_they_say(width: int, multiple: int) -> None:
    found = odd_multiple(width, multiple)
    if found == 0:
        assert width < multiple
    else:
        assert width - 2 * multiple < found <= width
        assert found % multiple == 0
        assert found % (2 * multiple) == multiple


def test_the_smallest_multiple_within_the_tolerance() -> None:
    assert Rounding.of({16: 1.0, 1: 1.029}).multiple == 1
    assert Rounding.of({16: 1.0, 1: 1.031}).multiple == 16
    assert Rounding.of({1: 5.0, 8: 4.0, 64: 3.0}, tolerance=0.5).multiple == 8


@pytest.mark.parametrize("gated", [False, True])
def test_time_per_neuron_decides(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where sizes below a multiple of 16 take a quarter more, and the clock jitters upwards."""
    products: list[tuple[int, ...]] = []
    monkeypatch.setattr(rounding, "linear", lambda left, right: products.append((*left.shape, len(right))))

    def clock(calls: dict[tuple[int, float], Any], device: Any, *, repeats: int) -> dict[Any, list[float]]:
        seconds = {}
        for (multiple, share), call in calls.items():
            width = odd_multiple(int(share * 1536), multiple)
            seconds[multiple, share] = [width * (1.25 if multiple < 16 else 1.0) * (1 + n / 7) for n in range(repeats)]
            call()
            assert products[-2:] == [(128, 384, width), (128, width, 384)]
        return seconds

    monkeypatch.setattr(rounding, "time_in_turns", clock)
    found = choose_multiple(384, 1536, gated=gated)
    assert found.multiple == 16
    assert found.costs == pytest.approx({1: 1.25, 4: 1.25, 8: 1.25, 16: 1.0, 32: 1.0, 64: 1.0})
    assert len(products) % (3 if gated else 2) == 0


def test_real_measurements_end_soon_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    found = choose_multiple(32, 100, limit=0.2)
    assert set(found.costs) == {1, 4, 8, 16}  # 30 neurons are less than 32
    assert found.multiple in found.costs
    assert min(found.costs.values()) == 1.0
    assert torch.equal(state, torch.get_rng_state())
    assert set(choose_multiple(8, 3, limit=0.1).costs) == {1}


def test_wrong_sizes() -> None:
    with pytest.raises(InputError, match="0 neurons of 32 inputs: both must be positive"):
        choose_multiple(32, 0)
