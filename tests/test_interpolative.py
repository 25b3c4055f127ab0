"""Interpolation, exchanges and groups, against LAPACK's pivoted QR and Cholesky and against what theory promises."""

import doctest
import math

import pytest
import torch

from shrinkformer.errors import InputError, NumericalError
from shrinkformer.prune import interpolative
from shrinkformer.prune.interpolative import (
    DampingWarning,
    fold,
    group_order,
    interpolation,
    interpolative_decomposition,
    pivoted_cholesky,
    schur_group_errors,
)
from tests.matrices import MATRICES, gelu, geqp3, gram, kahan, left_over, normal, squared


@pytest.mark.parametrize(("n", "greedy", "swapped"), [(40, 0.1917, 3.26e-5), (60, 0.082, 9.3e-8)])
@pytest.mark.parametrize("how", [{"certify": "srrqr"}, {"refine": "swap"}])
def test_kahan_needs_one_exchange(n, greedy, swapped, how):
    Z = kahan(n)
    plain = interpolative_decomposition(gram(Z), n - 1)
    assert math.sqrt(squared(left_over(Z, plain.kept))) == pytest.approx(greedy, rel=0.02)
    better = interpolative_decomposition(gram(Z), n - 1, **how)
    assert math.sqrt(squared(left_over(Z, better.kept))) == pytest.approx(swapped, rel=0.02)
    assert len(set(plain.kept.tolist()) - set(better.kept.tolist())) == 1
    T = torch.linalg.lstsq(Z[:, better.kept], Z[:, better.eliminated], driver="gelsd").solution
    assert float(T.abs().max()) <= 2
    assert float(better.coefficients.abs().max()) <= 2


@pytest.mark.parametrize("name", ["gelu", "gaussian", "cond 1e3"])
@pytest.mark.parametrize("bound", [1.1, 2.0])
def test_certificate_bounds_coefficients_and_singular_values(name, bound):
    Z, k = MATRICES[name], 30
    n = Z.shape[1]
    found = interpolative_decomposition(gram(Z), k, certify="srrqr", bound=bound)
    assert float(found.coefficients.abs().max()) <= bound * (1 + 1e-9)
    smallest = float(torch.linalg.svdvals(Z[:, found.kept])[-1])
    assert smallest >= float(torch.linalg.svdvals(Z)[k - 1]) / math.sqrt(1 + bound**2 * k * (n - k))


@pytest.mark.parametrize("name", MATRICES)
def test_loss_lies_between_eckart_young_and_its_multiple(name):
    Z, k = MATRICES[name], 20
    best = float(torch.linalg.svdvals(Z)[k:].square().sum())
    plain = interpolative_decomposition(gram(Z), k)
    refined = interpolative_decomposition(gram(Z), k, refine="swap")
    losses = [squared(left_over(Z, found.kept)) for found in (plain, refined)]
    assert best * (1 - 1e-9) <= losses[1] <= losses[0] * (1 + 1e-9)
    assert losses[1] <= (k + 1) * best
    for found, loss in zip((plain, refined), losses, strict=True):
        assert found.residual == pytest.approx(loss, rel=1e-6, abs=1e-12 * squared(Z))


def test_refinement_ends_where_no_single_swap_helps_much():
    Z = normal(60, 12) @ torch.diag(torch.linspace(1, 3, 12).double()) @ normal(12, 12, seed=2)
    found = interpolative_decomposition(gram(Z), 4, refine="swap")
    loss = squared(left_over(Z, found.kept))
    for i in range(4):
        for j in found.eliminated.tolist():
            other = found.kept.clone()
            other[i] = j
            assert squared(left_over(Z, other)) >= loss * (1 - 1.1e-4)


# 6, 7, 8: rank deficiency, zeros, NaN


def test_weights_lower_the_output_error_and_refit_never_hurts():
    Z = gelu(4000, 120)
    W = normal(120, 40) * torch.exp(0.8 * normal(120, 1, seed=4))
    G = gram(Z)
    errors = []
    for weights in (None, W.norm(dim=1)):
        kept = interpolative_decomposition(G, 60, weights=weights).kept
        refit, dropped = fold(G, kept, W), W[kept]
        errors.append(squared(Z @ W - Z[:, kept] @ refit))
        assert errors[-1] <= squared(Z @ W - Z[:, kept] @ dropped)
    assert errors[1] < 0.5 * errors[0]


def test_fold_is_least_squares_and_equals_the_explicit_interpolation():
    Z, W = gelu(500, 40), normal(40, 7)
    found = interpolative_decomposition(gram(Z), 15)
    T = torch.zeros(15, 40, dtype=torch.float64)
    T[:, found.kept], T[:, found.eliminated] = torch.eye(15, dtype=torch.float64), found.coefficients
    folded = fold(gram(Z), found.kept, W.float())
    assert torch.allclose(folded, T @ W, atol=1e-5)
    exact = torch.linalg.lstsq(Z[:, found.kept], Z @ W, driver="gelsd").solution
    assert torch.allclose(fold(gram(Z), found.kept, W), exact, atol=1e-9)


def test_duplicates_and_dead_columns_among_the_kept_are_ordinary():
    Z = normal(50, 4)
    Z = torch.cat([Z[:, :2], Z[:, :2], torch.zeros(50, 1), Z], 1)
    kept, rest = torch.arange(5), torch.arange(5, 9)
    T = interpolation(gram(Z), kept, rest).coefficients
    assert float(T.abs().max()) < 10
    assert squared(Z[:, rest] - Z[:, kept] @ T) == pytest.approx(
        squared(left_over(Z[:, rest], torch.arange(2))), rel=1e-6
    )


def test_more_damping_than_asked_for_is_said():
    G = gram(normal(100, 3) @ normal(3, 8, seed=1))
    G -= 1e-8 * G.diagonal().mean() * torch.eye(8)  # as float32 sums would
    with pytest.warns(DampingWarning, match=r"damped by 1e-0[78].*not 1e-10"):
        found = interpolation(G, torch.arange(6), torch.arange(6, 8))
    assert found.damping > 1e-9
    with pytest.raises(NumericalError, match="positive semidefinite"):
        interpolation(G - 10 * G.diagonal().max(), torch.arange(6), torch.arange(6, 8))


# Groups


def test_schur_group_errors_match_their_definition():
    Z, W, size = gelu(600, 24), normal(24, 10), 4
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    errors = schur_group_errors(gram(Z), order, size, W)
    assert errors.shape == (7,)
    assert errors.dtype == torch.float64
    for i in range(7):
        columns = (order[:, None] * size + torch.arange(size)).flatten()
        K, S = columns[: i * size], columns[i * size :]
        rest = (
            torch.cat([left_over(torch.cat([Z[:, K], Z[:, [s]]], 1), torch.arange(len(K)))[:, -1:] for s in S], 1)
            if i < 6
            else Z[:, :0]
        )
        assert float(errors[i]) == pytest.approx(math.sqrt(squared(rest @ W[S])), rel=1e-8, abs=1e-12)


def test_groups_of_singular_and_empty_moments():
    Z, W = normal(40, 2) @ normal(2, 12, seed=1), normal(12, 5)
    errors = schur_group_errors(gram(Z), torch.tensor([1, 0, 2]), 4, W)
    assert float(errors[0]) == pytest.approx(float((Z @ W).norm()), rel=1e-6)
    assert float(errors[1]) <= 1e-5 * float(errors[0])
    assert (errors.diff() <= 0).all()
    nothing = schur_group_errors(torch.zeros(12, 12, dtype=torch.float64), torch.arange(3), 4, W)
    assert torch.equal(nothing, torch.zeros(4, dtype=torch.float64))


def test_group_order_is_the_pivoted_qr_of_stacked_groups():
    Z, size = gelu(500, 36), 6
    stacked = Z.reshape(500, 6, size).permute(0, 2, 1).reshape(-1, 6)
    assert group_order(gram(Z), size).tolist() == geqp3(stacked)[1].tolist()
    assert torch.equal(group_order(gram(Z), 1), pivoted_cholesky(gram(Z)).order)


def test_wrong_input_is_named():
    G = gram(normal(20, 6))
    for call in (
        lambda: pivoted_cholesky(G.float()),
        lambda: pivoted_cholesky(G[:3]),
        lambda: pivoted_cholesky(G, rank=7),
        lambda: pivoted_cholesky(G, candidates=0),
        lambda: pivoted_cholesky(G, weights=-torch.ones(6)),
        lambda: pivoted_cholesky(G, weights=torch.ones(5)),
        lambda: interpolative_decomposition(G, 2, refine="hope"),
        lambda: interpolative_decomposition(G, 2, certify="srrqr", bound=0.5),
        lambda: fold(G, torch.tensor([0, 0]), torch.zeros(6, 1)),
        lambda: fold(G, torch.tensor([6]), torch.zeros(6, 1)),
        lambda: fold(G, torch.tensor([0]), torch.zeros(1, 6)),
        lambda: schur_group_errors(G, torch.tensor([0, 0, 1]), 2, torch.zeros(6, 1)),
        lambda: schur_group_errors(G, torch.arange(3), 2, torch.zeros(5, 1)),
        lambda: group_order(G, 4),
    ):
        with pytest.raises(InputError):
            call()


def test_the_example_in_the_docstring():
    assert doctest.testmod(interpolative).failed == 0
