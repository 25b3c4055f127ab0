"""Grids and codes against brute force, and what must hold for every weight."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shrinkformer.errors import InputError
from shrinkformer.quantize.grid import Grid, QuantizedWeight, fit_grid, storable
from shrinkformer.quantize.layer import quantize_weight, quantize_weights
from shrinkformer.quantize.recipe import RECIPES
from shrinkformer.quantize.scheme import BITS, Scheme
from shrinkformer.quantize.solver import Hessian, descend, output_error, refit_scales, round_ahead, round_following

HALF = torch.float16


def weight(outputs: int = 6, inputs: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def second(inputs: int = 40, seed: int = 1, tokens: int = 400) -> torch.Tensor:
    """Moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + torch.eye(inputs)
    rows = (torch.randn(tokens, inputs, generator=generator) @ mixing).double()
    return rows.T @ rows


def total(found: QuantizedWeight, wanted: torch.Tensor, moments: torch.Tensor) -> float:
    return float(output_error((wanted - found.decode()).double(), moments).sum())


class TestScheme:
    def test_stored_bits(self) -> None:
        assert Scheme(4, 128).stored_bits(10, 256) == 10 * (256 * 4 + 2 * 16)
        assert Scheme(3, -1, symmetric=False).stored_bits(10, 100) == 10 * (100 * 3 + 16 + 3)

    def test_groups_of_a_ragged_weight(self) -> None:
        scheme = Scheme(4, 16)
        assert (scheme.groups(40), scheme.group_of(40).tolist()) == (3, [0] * 16 + [1] * 16 + [2] * 8)

    @pytest.mark.parametrize(
        ("inputs", "size", "fitting"),
        [(256, 128, 128), (160, 128, 32), (176, 128, 16), (331, 128, 128), (99, -1, -1), (32, 128, 32), (99, 128, 99)],
    )
    def test_a_group_that_divides(self, inputs: int, size: int, fitting: int) -> None:
        assert Scheme(4, size).fitting(inputs).group_size == fitting


class TestGrid:
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("group", [16, -1, 7])
    def test_searching_helps_and_codes_survive(self, bits: int, symmetric: bool, group: int) -> None:
        if bits == 1 and not symmetric:
            return
        wanted, scheme = weight(), Scheme(bits, group, symmetric)
        errors = []
        for search in (False, True):
            grid = fit_grid(wanted, scheme, dtype=HALF, search=search)
            codes = grid.encode(wanted)
            assert int(codes.max()) <= scheme.highest
            assert torch.equal(grid.encode(grid.decode(codes)), codes)
            assert torch.equal(grid.scale, grid.scale.half().float())
            assert symmetric == bool((grid.zero == scheme.middle).all()) or bits == 1
            errors.append(float((grid.decode(codes) - wanted).abs().pow(2.4).sum()))
        assert errors[1] <= errors[0] * 1.0001

    def test_the_sign_of_a_scale_serves_the_larger_side(self) -> None:
        for sign in (1.0, -1.0):
            grid = fit_grid(sign * torch.tensor([[-1.0, 0.75, 0.5, -0.25]]), Scheme(3, -1), dtype=HALF)
            assert float(grid.scale) == sign * 0.25
            assert grid.encode(sign * torch.tensor([[-1.0, 0.75, 0.5, -0.25]])).tolist() == [[0, 7, 6, 3]]

    @pytest.mark.parametrize("value", [0.0, 1e-30, 7e4, -3.0])
    def test_constant_groups(self, value: float) -> None:
        for symmetric in (True, False):
            wanted = torch.full((2, 8), value)
            grid = fit_grid(wanted, Scheme(4, 4, symmetric), dtype=HALF)
            decoded = grid.decode(grid.encode(wanted))
            assert torch.isfinite(decoded).all()
            assert float((decoded - wanted).abs().max()) <= max(1e-4, abs(value) / 15)

    def test_scales_that_a_file_can_hold(self) -> None:
        stored = storable(torch.tensor([0.0, 1e-9, -1e-9, 1e9, -0.1]), HALF)
        assert torch.equal(stored, stored.half().float())
        assert (stored != 0).all()
        assert torch.isfinite(stored).all()


class TestHessian:
    def test_ahead_is_the_cholesky_factor_of_the_inverse(self) -> None:
        moments = second()
        prepared = Hessian.of(moments, damping=0.01)
        scaled = moments / moments.diagonal().mean()
        scaled.diagonal().add_(prepared.damping)
        inverse = torch.linalg.inv(scaled[prepared.order][:, prepared.order])
        expected = torch.linalg.cholesky(inverse, upper=True)
        torch.testing.assert_close(prepared.ahead.double(), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.filterwarnings("ignore::shrinkformer.prune.cholesky.DampingWarning")
    def test_singular_dead_and_zero(self) -> None:
        moments = second(tokens=5)
        moments[3] = moments[:, 3] = 0
        for some in (moments, torch.zeros(40, 40, dtype=torch.float64)):
            found = quantize_weight(weight(), Hessian.of(some), Scheme(3, 16), RECIPES["shrink"], dtype=HALF)
            assert torch.isfinite(found.weight.decode()).all()


def brute_force(wanted: torch.Tensor, moments: torch.Tensor, grid: Grid) -> float:
    """Least error over all codes, row by row."""
    least = 0.0
    for row in range(len(wanted)):
        one = Grid(grid.scheme, grid.scale[[row]], grid.zero[[row]], grid.inputs)
        codes = torch.tensor(list(itertools.product(range(grid.scheme.highest + 1), repeat=grid.inputs)))
        decoded = one.columns[0] * (codes - one.columns[1])
        least += float(output_error((wanted[row] - decoded).double(), moments).min())
    return least


class TestCodes:
    def test_between_rounding_and_the_best_of_all_codes(self) -> None:
        sums = torch.zeros(4)
        for seed in range(8):
            wanted, moments = weight(4, 5, seed), second(5, seed)
            grid = fit_grid(wanted, Scheme(2, -1), dtype=HALF)
            prepared = Hessian.of(moments, damping=1e-9)
            ahead = round_ahead(wanted, prepared, grid)
            settled = descend(wanted, prepared, grid, ahead, sweeps=20)
            found = [total(QuantizedWeight(codes, grid), wanted, moments) for codes in (settled, ahead)]
            nearest = total(QuantizedWeight(grid.encode(wanted), grid), wanted, moments)
            best = brute_force(wanted, moments, grid)
            assert best * (1 - 1e-4) <= found[0] <= found[1] * (1 + 1e-4)
            sums += torch.tensor([best, *found, nearest])
        assert sums[1] < 1.6 * sums[0]
        assert sums[2] < sums[3]

    def test_rounding_ahead_is_the_published_loop(self) -> None:
        wanted, moments = weight(3, 24), second(24)
        prepared = Hessian.of(moments, damping=0.01, by_activity=False)
        grid = fit_grid(wanted, Scheme(3, 8), dtype=HALF)
        left, codes = wanted.double().clone(), torch.zeros(3, 24, dtype=torch.uint8)
        ahead = prepared.ahead.double()
        for column in range(24):
            own = torch.zeros_like(wanted)
            own[:, column] = left[:, column]
            codes[:, column] = grid.encode(own)[:, column]
            error = (left[:, column] - grid.decode(codes).double()[:, column]) / ahead[column, column]
            left[:, column:] -= error[:, None] * ahead[column, column:]
        assert torch.equal(codes, round_ahead(wanted, prepared, grid))

    def test_groups_that_follow_see_what_the_columns_before_left(self) -> None:
        wanted, moments = weight(5, 32), second(32)
        prepared = Hessian.of(moments, by_activity=False)
        found = round_following(wanted, prepared, Scheme(3, 8), dtype=HALF, search=False)
        first = fit_grid(wanted[:, :8], Scheme(3, 8), dtype=HALF, search=False)
        assert torch.equal(found.grid.scale[:, :1], first.scale)
        assert not torch.equal(found.grid.scale, fit_grid(wanted, Scheme(3, 8), dtype=HALF, search=False).scale)

    def test_refitted_scales_are_the_best(self) -> None:
        wanted, moments = weight(), second()
        prepared = Hessian.of(moments)
        grid = fit_grid(wanted, Scheme(3, 16), dtype=HALF)
        codes = round_ahead(wanted, prepared, grid)
        better = refit_scales(wanted, prepared, grid, codes, dtype=HALF)
        before, after = (output_error(wanted - some.decode(codes), prepared.damped) for some in (grid, better))
        assert (after <= before).all()
        for factor in (0.99, 1.01):
            other = Grid(grid.scheme, better.scale * factor, better.zero, grid.inputs)
            moved = output_error(wanted - other.decode(codes), prepared.damped)
            assert float(moved.sum()) > float(after.sum())

    @given(
        outputs=st.integers(1, 5),
        inputs=st.integers(2, 40),
        bits=st.sampled_from(BITS),
        group=st.sampled_from([-1, 2, 8, 32]),
        symmetric=st.booleans(),
        seed=st.integers(0, 100),
    )
    @settings(max_examples=60, deadline=None)
    def test_never_worse_than_rounding(
        self, outputs: int, inputs: int, bits: int, group: int, symmetric: bool, seed: int
    ) -> None:
        scheme = Scheme(bits, group, symmetric or bits == 1)
        wanted, prepared = weight(outputs, inputs, seed), Hessian.of(second(inputs, seed))
        found = quantize_weight(wanted, prepared, scheme, RECIPES["shrink"], dtype=HALF)
        assert found.error <= found.nearest_error * (1 + 1e-4)
        assert int(found.weight.codes.max()) <= scheme.highest
        assert found.weight.codes.shape == wanted.shape

    def test_more_attempts_are_better_row_by_row(self) -> None:
        wanted, prepared = weight(24, 64), Hessian.of(second(64))
        recipe = replace(RECIPES["shrink"], rounds=0)
        errors = []
        for attempts in (1, 5, 17):  # odd numbers try the size that one attempt has
            found = quantize_weight(
                wanted, prepared, Scheme(3, 16), replace(recipe, attempts=attempts), dtype=HALF
            ).weight
            errors.append(output_error(wanted - found.decode(), prepared.damped))
        assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
        assert (errors[2] <= errors[1] * (1 + 1e-5)).all()
        assert float(errors[2].sum()) < 0.95 * float(errors[0].sum())

    def test_layers_with_one_input_are_solved_as_if_alone(self) -> None:
        parts, prepared = [weight(8, 64, seed) for seed in range(3)], Hessian.of(second(64))
        metrics = [second(8, seed).float() for seed in range(3)]
        for given_metrics in (None, metrics):
            together = quantize_weights(
                parts, prepared, Scheme(3, 16), RECIPES["shrink"], dtype=HALF, metrics=given_metrics
            )
            for index, (part, found) in enumerate(zip(parts, together, strict=True)):
                metric = None if given_metrics is None else given_metrics[index]
                alone = quantize_weight(part, prepared, Scheme(3, 16), RECIPES["shrink"], dtype=HALF, metric=metric)
                assert torch.equal(found.weight.codes, alone.weight.codes)
                assert found.error == pytest.approx(alone.error)

    def test_more_bits_and_smaller_groups_are_better(self) -> None:
        wanted, prepared = weight(32, 64), Hessian.of(second(64))
        errors = [
            quantize_weight(wanted, prepared, Scheme(*arguments), RECIPES["shrink"], dtype=HALF).error
            for arguments in [(1, 64), (2, 64), (2, 16), (3, 16), (4, 16), (8, 16)]
        ]
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "message"), [((5,), "--bits 5"), ((4, 1), "--group_size 1"), ((4, -2), "--group_size -2")]
)
def test_bad_schemes(arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Scheme(*arguments)
