"""Every row of the ablation takes something out of the method."""

from dataclasses import replace

import pytest
import torch

from benchmarks.ablation import ALL, VARIANTS
from shrinkformer.prune.pruner import prune_model
from shrinkformer.prune.shrink_config import ShrinkConfig
from tests.conftest import build_model, make_batches
from tests.test_architectures import outputs

BATCHES = make_batches([3 + index % 18 for index in range(64)], batch_size=16)


def found(name: str) -> torch.Tensor:
    variant = VARIANTS[name]
    config = replace(variant.config, search_seconds=min(variant.config.search_seconds, 60.0))
    model = build_model("bert", initializer_range=0.3)
    with variant.patch():
        pruned = prune_model(model, BATCHES, mu=0.4, method="shrink", sequence_length=16, config=config)
    return outputs(pruned.model, BATCHES[0])


@pytest.fixture(scope="module")
def everything() -> torch.Tensor:
    return found(ALL)


def test_nothing_taken_out_is_the_method_itself(everything: torch.Tensor) -> None:
    model = build_model("bert", initializer_range=0.3)
    config = ShrinkConfig(search_seconds=60.0)
    pruned = prune_model(model, BATCHES, mu=0.4, method="shrink", sequence_length=16, config=config)
    assert torch.equal(outputs(pruned.model, BATCHES[0]), everything)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != ALL])
def test_something_is_missing(name: str, everything: torch.Tensor) -> None:
    assert not torch.allclose(found(name), everything, atol=1e-4)
