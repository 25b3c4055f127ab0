"""The streamed second moment: exactness, batches, types, merging, processes, refusals."""

import itertools
import time

import numpy as np
import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st

from shrinkformer.errors import InputError, NumericalError
from shrinkformer.prune.interpolative import pivoted_cholesky
from shrinkformer.prune.moments import Moments
from shrinkformer.utils.precision import fast_products, round_rows
from shrinkformer.utils.processor import SWITCH

LOW_PRECISION = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def collect(rows: torch.Tensor, *batches: int, **options) -> Moments:
    moments = Moments.zeros(rows.shape[1], **options)
    for batch in rows.split(list(batches) or rows.shape[0]):
        moments.update(batch)
    return moments


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("n", [1, 3, 128, 129, 300])
def test_float64_sums_are_exact_and_symmetric(n):
    Z = normal(700, n) + 0.5
    moments = collect(Z, 100, 0, 599, 1)
    assert relative(moments.second, Z.T @ Z) < 1e-14
    assert torch.equal(moments.second, moments.second.T)
    assert relative(moments.mean, Z.mean(0)) < 1e-13
    centred = Z - Z.mean(0)
    assert relative(moments.covariance(), centred.T @ centred) < 1e-12
    assert moments.count == 700
    assert moments.second.dtype == moments.total.dtype == torch.float64


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_rows_round_products_but_not_sums(dtype):
    Z = normal(9000, 40).to(dtype)
    exact = Z.double().T @ Z.double()
    mixed = collect(Z)
    assert 0 < relative(mixed.second, exact) < 1e-6
    assert relative(mixed.total, Z.double().sum(0)) < 1e-5
    assert relative(collect(Z, precision="double").second, exact) < 1e-14


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_few_tokens_are_multiplied_in_double(dtype):
    Z = normal(80, 40).to(dtype)
    assert relative(collect(Z).second, Z.double().T @ Z.double()) < 1e-14
    assert relative(collect(Z, precision="mixed").second, Z.double().T @ Z.double()) > 1e-9


def test_mixed_policy_rounds_float64_rows_and_double_does_not():
    Z = normal(5000, 64)
    assert 1e-10 < relative(collect(Z, precision="mixed").second, Z.T @ Z) < 1e-6
    assert relative(collect(Z).second, Z.T @ Z) < 1e-14


@pytest.mark.parametrize("name", ["medium", "high", "highest"])
def test_global_precision_flags_change_nothing_and_are_left_alone(name):
    before = torch.get_float32_matmul_precision()
    Z = normal(4096, 256).float()
    try:
        torch.set_float32_matmul_precision(name)
        flags = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
        with torch.autocast("cpu", dtype=torch.bfloat16):
            second = collect(Z, precision="mixed").second
        assert torch.get_float32_matmul_precision() == name
        assert flags == (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)
    finally:
        torch.set_float32_matmul_precision(before)
    assert relative(second, Z.double().T @ Z.double()) < 1e-6  # bfloat16 products would give 2e-3


def test_strides_and_gradients_do_not_matter():
    Z = normal(90, 48)
    expected = Z[::2, ::3].T @ Z[::2, ::3]
    assert relative(collect(Z[::2, ::3]).second, expected) < 1e-14
    assert relative(collect(Z.T.contiguous().T).second, Z.T @ Z) < 1e-14
    moments = collect(Z.clone().requires_grad_())
    assert not moments.second.requires_grad
    assert relative(moments.second, Z.T @ Z) < 1e-14


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 300), max_size=6), seed=st.integers(0, 9))
def test_any_partition_and_order_of_the_tokens_is_the_same(cuts, seed):
    Z = normal(300, 24, seed=seed) * torch.linspace(0.2, 3, 24)
    edges = [0, *sorted(cuts), 300]
    whole, parts = collect(Z), collect(Z, *[b - a for a, b in itertools.pairwise(edges)])
    shuffled = collect(Z[torch.randperm(300, generator=torch.Generator().manual_seed(seed))])
    for other in (parts, shuffled):
        assert relative(other.second, whole.second) < 1e-12
        assert other.count == 300
        pivots = [pivoted_cholesky(m.second, rank=12).pivots for m in (whole, other)]
        assert torch.equal(*pivots)


def test_merge_equals_one_pass():
    Z = normal(500, 150)
    left, right = collect(Z[:200]), collect(Z[200:])
    left.merge(right)
    assert relative(left.second, Z.T @ Z) < 1e-13
    assert relative(left.total, Z.sum(0)) < 1e-13
    assert left.count == 500
    left.update(Z)
    assert relative(left.second, 2 * Z.T @ Z) < 1e-13
    with pytest.raises(InputError, match="150 columns into moments of 7"):
        Moments.zeros(7).merge(left)


def test_state_survives_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file

    moments = collect(normal(50, 200))
    save_file(moments.state_dict(), tmp_path / "m.safetensors")
    again = Moments.from_state_dict(load_file(tmp_path / "m.safetensors"))
    assert torch.equal(again.second, moments.second)
    assert torch.equal(again.total, moments.total)
    assert again.count == 50
    with pytest.raises(InputError, match="lack"):
        Moments.from_state_dict({"second": moments.second})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_before_anything_is_added(bad):
    moments = collect(normal(10, 6))
    before = moments.second.clone()
    Z = normal(5000, 6)
    Z[4999, 2] = Z[17, 4] = bad
    with pytest.raises(NumericalError, match=r"2 of 6 columns.*5000 tokens.*load it in"):
        moments.update(Z)
    assert torch.equal(moments.second, before)
    assert moments.count == 10


@pytest.mark.parametrize("power", [-60, 60])
def test_extreme_scales_of_float32_rows(power):
    Z = normal(4000, 20).float()
    scaled = collect(Z * 2.0**power)
    assert relative(scaled.second * 4.0**-power, Z.double().T @ Z.double()) < 1e-7


def test_wrong_input_is_named():
    moments = Moments.zeros(4)
    for rows in (torch.zeros(3, 5), torch.zeros(2, 3, 4), torch.zeros(3, 4, dtype=torch.int64)):
        with pytest.raises(InputError, match=r"\(N, 4\)"):
            moments.update(rows)
    moments.update(torch.zeros(0, 4))
    with pytest.raises(NumericalError, match="at least one token"):
        _ = moments.mean
    with pytest.raises(NumericalError, match="at least one token"):
        moments.covariance()
    with pytest.raises(InputError):
        Moments.zeros(0)
    with pytest.raises(InputError, match="precision"):
        Moments.zeros(2, precision="half")
    with pytest.raises(InputError):
        Moments(torch.zeros(2, 2), torch.zeros(2), 0)
    moments.all_reduce()  # no process group: nothing happens
    assert moments.count == 0


def _reduce(rank: int, world: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    Z = normal(400, 140) * torch.linspace(0.2, 3, 140)
    moments = collect(Z[:150] if rank == 0 else Z[150:])
    moments.all_reduce()
    torch.save(moments.state_dict(), f"{out}{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_sum_to_one(tmp_path):
    torch.multiprocessing.spawn(_reduce, (2, str(tmp_path / "store"), str(tmp_path / "out")), nprocs=2)
    whole = collect(normal(400, 140) * torch.linspace(0.2, 3, 140))
    for rank in range(2):
        moments = Moments.from_state_dict(torch.load(tmp_path / f"out{rank}"))
        assert relative(moments.second, whole.second) < 1e-12
        assert relative(moments.total, whole.total) < 1e-12
        assert moments.count == 400
        pivots = [pivoted_cholesky(m.second, rank=70).pivots for m in (whole, moments)]
        assert torch.equal(*pivots)


@pytest.mark.slow
def test_speed_is_that_of_a_triangular_product():
    threads = torch.get_num_threads()
    Z = normal(8192, 1536).float()
    moments = Moments.zeros(1536, precision="mixed")
    ours, full = [], []
    torch.set_num_threads(1)  # barriers between threads measure the other jobs of a shared machine
    try:
        for _ in range(6):
            start = time.process_time()
            moments.update(Z)
            middle = time.process_time()
            _ = Z.T @ Z
            ours.append(middle - start)
            full.append(time.process_time() - middle)
    finally:
        torch.set_num_threads(threads)
    assert np.median(ours) < np.median(full)  # 9/16 of its flops; the rest is range check, float64 sums and noise


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, *LOW_PRECISION])
def test_cuda_agrees_with_cpu(dtype):
    Z = normal(9000, 300).to(dtype)
    torch.set_float32_matmul_precision("high")
    try:
        moments = Moments.zeros(300, "cuda")
        moments.update(Z.cuda())
    finally:
        torch.set_float32_matmul_precision("highest")
    exact = Z.double().T @ Z.double()
    assert relative(moments.second.cpu(), exact) < (1e-13 if dtype == torch.float64 else 3e-7)


def test_fast_products_of_rounded_rows_are_exact():
    """A column that hardly varies about a large mean would be lost if rows and sums were rounded apart."""
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(2000, 24, generator=generator) * 0.1
    Z[:, 0] += 7.0
    rounded = round_rows(Z)
    moments = collect(rounded, precision="fast")
    # Products are exact, sums are float32: how those round is up to the processor. Rounded apart it would be 1e-3.
    assert relative(moments.second, rounded.double().T @ rounded.double()) < 1e-5
    assert float(torch.linalg.eigvalsh(moments.covariance()).min()) > 0
    assert relative(moments.second, Z.double().T @ Z.double()) < 1e-2


def test_fast_products_leave_flags_alone(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    flags = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    with fast_products(torch.device("cpu")):
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision) == flags


def test_constant_columns_have_no_covariance():
    """Of two columns that only rounding changes, cancellation leaves a matrix with negative eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(50, 3, generator=generator)
    Z[:, :2] = torch.tensor([30.0, -70.0]) * (1 + 5e-8 * torch.randn(50, 2, generator=generator))
    covariance = collect(Z).covariance()
    assert not covariance[:2].any()
    assert not covariance[:, :2].any()
    assert float(covariance[2, 2]) == pytest.approx(49 * float(Z[:, 2].var()))
