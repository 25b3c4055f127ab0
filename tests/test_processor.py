"""Results on any kind of CPU: with AMX examples pass in bfloat16, without it they do not. A switch plays either."""

from typing import Any

import pytest
import torch

from shrinkformer.errors import InputError
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.methods import METHOD_NAMES
from shrinkformer.prune.pruner import calibrate
from shrinkformer.prune.shrink_config import ShrinkConfig
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.quantizer import quantize_
from shrinkformer.utils.precision import fast_products, half_precision, round_rows
from shrinkformer.utils.processor import SWITCH, Processor
from tests.conftest import build_model, make_batches

CPU = torch.device("cpu")
BATCHES = make_batches([3 + index % 18 for index in range(24)], batch_size=8)
HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32)


def small(family: str, dtype: torch.dtype) -> Any:
    return build_model(family, num_hidden_layers=1).to(dtype)


@pytest.fixture(params=["0", "1"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Without AMX, and with it."""
    monkeypatch.setenv(SWITCH, request.param)
    return str(request.param)


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch).logits.float().flatten() for batch in BATCHES])


class TestSwitch:
    def test_it_sets_everything(self, either: str) -> None:
        assert Processor.here() == Processor(bf16_products=either == "1", bf16_autocast=either == "1")
        with fast_products(CPU):
            assert torch.backends.mkldnn.matmul.fp32_precision == ("bf16" if either == "1" else "ieee")
        for dtype in (*DTYPES, torch.float64):
            with half_precision(CPU, dtype):
                assert torch.is_autocast_enabled("cpu") == (either == "1" and dtype == torch.float32)

    @pytest.mark.parametrize("amx", [False, True])
    def test_without_it_the_processor_decides(self, amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(SWITCH, raising=False)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx, "num_logical_cores": 2})
        assert Processor.here() == Processor(bf16_products=True, bf16_autocast=amx)

    def test_other_values_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(SWITCH, "on")
        with pytest.raises(InputError, match=r"SHRINKFORMER_BF16=on: set it to 1 .* or 0"):
            Processor.here()

    def test_products_of_rounded_rows_differ_in_the_order_of_sums_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = round_rows(torch.randn(300, 64, generator=torch.Generator().manual_seed(0)))
        exact = rows.double().T @ rows.double()
        for switch in "01":
            monkeypatch.setenv(SWITCH, switch)
            with fast_products(CPU):
                found = rows.T @ rows
            # A sum of n terms in float32 errs by n * 2^-24 of the sum of their sizes at most.
            assert float((found - exact).abs().max()) < 300 * 2**-24 * float(exact.diagonal().max())


class TestEveryTypeInBothPositions:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("method", METHOD_NAMES)
    def test_methods(self, method: str, dtype: torch.dtype, either: str) -> None:
        model = small("bert" if either == "0" else "llama", dtype)
        pruned = calibrate(model, BATCHES, method=method, config=ShrinkConfig(search_seconds=0)).prune(Budget(0.6, 12))
        assert pruned.model.dtype == dtype
        assert bool(outputs(pruned.model).isfinite().all())

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("family", ["bert", "opt", "llama"])
    def test_our_quantizer(self, family: str, dtype: torch.dtype, either: str) -> None:
        model, dense = small(family, dtype), small(family, dtype)
        quantize_(model, BATCHES, QuantizeConfig(bits=8, group_size=16))
        assert model.dtype == dtype
        # 8 bits: half a step is 1/255 of the largest weight of a group, about 1e-2 of a typical one.
        assert float((outputs(model) - outputs(dense)).norm() / outputs(dense).norm()) < 0.03

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_half_precision_computes_in_its_own_type_in_both(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        codes = []
        for switch in "01":
            monkeypatch.setenv(SWITCH, switch)
            found = quantize_(small("bert", dtype), BATCHES, QuantizeConfig(group_size=16))
            codes.append({name: weight.codes.int() for name, weight in found.weights.items()})
        for name, one in codes[0].items():  # a sum in another order may move a code that stood at an edge
            assert float((one - codes[1][name]).ne(0).float().mean()) < 0.02, name
