"""Selection of columns, against LAPACK's pivoted QR and Cholesky and against what theory promises."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shrinkformer.errors import NumericalError
from shrinkformer.prune.interpolative import (
    DampingWarning,
    fold,
    group_order,
    interpolation,
    interpolative_decomposition,
    pivoted_cholesky,
    schur_group_errors,
)
from shrinkformer.prune.moments import Moments
from tests.matrices import MATRICES, dpstrf, gelu, geqp3, gram, left_over, normal, squared

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("name", MATRICES)
def test_pivots_are_those_of_lapack(name):
    Z = MATRICES[name]
    factor = pivoted_cholesky(gram(Z))
    R, pivots = geqp3(Z)
    assert factor.rank == min(Z.shape)
    assert factor.pivots.dtype == torch.int64
    assert sorted(factor.order.tolist()) == list(range(Z.shape[1]))
    assert torch.equal(factor.order[: factor.rank], factor.pivots)
    assert (factor.pivots.numpy() == pivots[: factor.rank]).all()
    assert (factor.pivots.numpy() == dpstrf(gram(Z))[0][: factor.rank]).all()
    diagonal = np.abs(np.diag(R))[: factor.rank]
    assert np.allclose(factor.diagonal.numpy(), diagonal, rtol=0, atol=1e-7 * diagonal[0])


@pytest.mark.parametrize("name", MATRICES)
def test_each_pivot_has_the_largest_residual_and_the_trace_is_the_loss(name):
    Z = MATRICES[name] * torch.linspace(0.5, 2, MATRICES[name].shape[1])
    factor = pivoted_cholesky(gram(Z))
    total = squared(Z)
    for s in range(0, factor.rank, 7):
        rest = left_over(Z, factor.pivots[:s])
        variances = rest.square().sum(0)
        assert float(variances[factor.pivots[s]]) >= float(variances.max()) - 1e-12 * total
        assert abs(float(factor.residual[s]) - squared(rest)) <= 1e-10 * total
    assert abs(float(factor.residual[-1])) < 1e-12 * total
    assert (factor.residual.diff() <= 0).all()
    assert (factor.diagonal.diff() <= 1e-12 * factor.diagonal[0] + 1e-9 * factor.diagonal[:-1]).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 20), candidates=st.integers(1, 90), block=st.integers(1, 70), first=st.integers(0, 60))
def test_block_sizes_and_rank_change_speed_only(seed, candidates, block, first):
    G = gram(gelu(300, 60, seed))
    plain = pivoted_cholesky(G)
    blocked = pivoted_cholesky(G, candidates=candidates, max_block=block)
    assert torch.equal(plain.pivots, blocked.pivots)
    assert torch.allclose(plain.residual, blocked.residual, rtol=1e-10, atol=1e-12 * float(plain.residual[0]))
    prefix = pivoted_cholesky(G, rank=first, candidates=candidates)
    assert torch.equal(prefix.pivots, plain.pivots[:first])
    assert torch.equal(pivoted_cholesky(G).residual, plain.residual)  # bitwise, run to run


def test_large_enough_for_several_blocks():
    Z = gelu(3000, 700)
    factor = pivoted_cholesky(gram(Z), rank=500)
    assert (factor.pivots.numpy() == dpstrf(gram(Z))[0][:500]).all()


def test_tolerance_stops_at_the_first_rank_that_meets_it():
    G = gram(gelu(800, 100))
    everything = pivoted_cholesky(G)
    for tolerance in (0.5, 0.1, 0.01):
        factor = pivoted_cholesky(G, tolerance=tolerance, max_block=9)
        errors = (everything.residual / everything.residual[0]).sqrt()
        assert factor.rank == int((errors > tolerance).sum())
        assert torch.equal(factor.pivots, everything.pivots[: factor.rank])
        assert float(factor.residual[-1] / factor.residual[0]) <= tolerance**2
    assert pivoted_cholesky(G, tolerance=1.0).rank == 0


# 5: rank-revealing guarantees


def test_rank_is_reported_never_invented():
    Z = normal(300, 10) @ normal(10, 128, seed=1)
    found = interpolative_decomposition(gram(Z), 40)
    assert found.rank == len(found.kept) == 10
    assert found.coefficients.shape == (10, 118)
    assert found.residual <= 1e-12 * squared(Z)
    assert torch.allclose(Z[:, found.kept] @ found.coefficients, Z[:, found.eliminated], atol=1e-8)
    for how in ({"refine": "swap"}, {"certify": "srrqr"}):
        assert interpolative_decomposition(gram(Z), 40, **how).rank == 10


@pytest.mark.parametrize("candidates", [None, 5])
def test_never_both_copies_of_a_duplicate(candidates):
    half = normal(500, 64)
    Z = torch.cat([half, half], 1)[:, torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    factor = pivoted_cholesky(gram(Z), candidates=candidates)
    assert factor.rank == 64
    assert torch.linalg.matrix_rank(Z[:, factor.pivots]) == 64
    R, _ = geqp3(Z)  # equal residuals at each step, though ties may fall differently
    traces = np.array([np.square(R[s:]).sum() for s in range(65)])
    assert np.allclose(factor.residual.numpy(), traces, rtol=0, atol=1e-10 * traces[0])


def test_ties_go_to_the_lowest_index():
    assert pivoted_cholesky(torch.eye(9, dtype=torch.float64), candidates=3).order.tolist() == list(range(9))
    Z = torch.eye(4, dtype=torch.float64)[:, [2, 0, 0, 2, 1]]
    assert pivoted_cholesky(gram(Z)).order.tolist() == [0, 1, 4, 2, 3]


def test_zero_columns_come_last_and_zeros_have_no_rank():
    Z = gelu(200, 30)
    Z[:, [3, 11]] = 0
    factor = pivoted_cholesky(gram(Z))
    assert factor.rank == 28
    assert factor.order[-2:].tolist() == [3, 11]
    found = interpolative_decomposition(torch.zeros(5, 5, dtype=torch.float64), 3, refine="swap", certify="srrqr")
    assert (found.rank, found.residual) == (0, 0.0)
    assert found.coefficients.shape == (0, 5)
    T = interpolation(torch.zeros(5, 5, dtype=torch.float64), torch.tensor([1]), torch.tensor([0, 2])).coefficients
    assert torch.equal(T, torch.zeros(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(bad):
    G = gram(normal(20, 6))
    G[2] = G[:, 2] = bad
    for call in (
        lambda: pivoted_cholesky(G),
        lambda: interpolative_decomposition(G, 2),
        lambda: fold(G, torch.tensor([0]), torch.zeros(6, 2)),
        lambda: interpolation(G, torch.tensor([0]), torch.tensor([1])),
        lambda: group_order(G, 2),
    ):
        with pytest.raises(NumericalError, match="1 of 6 columns"):
            call()


# 9, 10, 11: scaling, sizes, permutations


@pytest.mark.parametrize("power", [-60, -7, 60])
def test_scales_by_powers_of_two_change_no_bit(power):
    Z = gelu(300, 50)
    w = torch.linspace(1, 3, 50)
    plain = pivoted_cholesky(gram(Z), weights=w)
    moments = Moments.zeros(50)
    moments.update(Z * 2.0**power)
    scaled = pivoted_cholesky(moments.second, weights=w * 2.0**-power)
    assert torch.equal(plain.pivots, scaled.pivots)
    assert torch.equal(plain.residual, scaled.residual)
    unweighted = pivoted_cholesky(gram(Z)), pivoted_cholesky(moments.second)
    assert torch.equal(unweighted[0].pivots, unweighted[1].pivots)
    assert torch.equal(unweighted[0].diagonal * 2.0**power, unweighted[1].diagonal)


def test_column_scales_are_undone_by_weights():
    Z, scales = gelu(400, 60), torch.exp(2 * normal(60, seed=9))
    plain = interpolative_decomposition(gram(Z), 20)
    scaled = interpolative_decomposition(gram(Z * scales), 20, weights=1 / scales)
    assert torch.equal(plain.kept, scaled.kept)
    assert scaled.residual == pytest.approx(plain.residual, rel=1e-9)


def test_sizes_at_the_edge():
    Z = gelu(100, 9)
    G = gram(Z)
    W = normal(9, 4)
    none, everything = interpolative_decomposition(G, 0), interpolative_decomposition(G, 9)
    assert none.kept.shape == (0,)
    assert none.coefficients.shape == (0, 9)
    assert none.residual == pytest.approx(squared(Z))
    assert fold(G, none.kept, W).shape == (0, 4)
    assert everything.coefficients.shape == (9, 0)
    assert everything.residual <= 1e-12 * squared(Z)
    assert torch.equal(fold(G, everything.kept, W), W[everything.kept])
    one = interpolative_decomposition(torch.tensor([[3.0]], dtype=torch.float64), 1)
    assert (one.kept.tolist(), one.rank, one.residual) == ([0], 1, 0.0)
    few = interpolative_decomposition(gram(normal(5, 12)), 12)
    assert few.rank == 5
    assert Moments.zeros(3).second.shape == (3, 3)
    assert pivoted_cholesky(Moments.zeros(3).second).order.tolist() == [0, 1, 2]


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(24)))
def test_permuting_columns_permutes_the_pivots(order):
    Z = gelu(150, 24)
    moved = pivoted_cholesky(gram(Z[:, list(order)])).pivots
    assert torch.equal(torch.tensor(order)[moved], pivoted_cholesky(gram(Z)).pivots)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 12), columns=st.integers(1, 9), seed=st.integers(0, 99), rank=st.integers(0, 9))
def test_small_integer_matrices_of_any_rank(rows, columns, seed, rank):
    Z = torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DampingWarning)
        found = interpolative_decomposition(gram(Z), min(rank, columns), refine="swap", certify="srrqr")
    true_rank = int(torch.linalg.matrix_rank(Z)) if rows else 0
    assert found.rank == min(rank, columns, true_rank)
    both = torch.cat([found.kept, found.eliminated]).tolist()
    assert sorted(both) == list(range(columns))
    error = squared(Z[:, found.eliminated] - Z[:, found.kept] @ found.coefficients)
    assert error == pytest.approx(squared(left_over(Z, found.kept)), abs=1e-8)
    assert found.residual == pytest.approx(error, abs=1e-8)


# 13: the next layer


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_chooses_the_same(device):
    Z, W = gelu(1000, 300), normal(300, 20)
    there = interpolative_decomposition(gram(Z).to(device), 150, weights=W.norm(dim=1))
    here = interpolative_decomposition(gram(Z), 150, weights=W.norm(dim=1))
    assert there.kept.device.type == device
    assert torch.equal(there.kept.cpu(), here.kept)
    assert torch.allclose(fold(gram(Z).to(device), there.kept, W).cpu(), fold(gram(Z), here.kept, W), atol=1e-9)
    order = group_order(gram(Z).to(device), 20)
    assert torch.equal(order.cpu(), group_order(gram(Z), 20))
    errors = schur_group_errors(gram(Z).to(device), order, 20, W.to(device)).cpu()
    assert torch.allclose(errors, schur_group_errors(gram(Z), order.cpu(), 20, W), rtol=1e-9)
