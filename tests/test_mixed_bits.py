"""Layers with different numbers of bits in one model."""

from pathlib import Path

import pytest
import torch
from torch import nn

from shrinkformer.errors import InputError
from shrinkformer.quantize.checkpoint import load, save
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.formats import FORMATS
from shrinkformer.quantize.quantizer import quantize_
from shrinkformer.quantize.scheme import Scheme
from tests.conftest import build_model, make_batches

BATCHES = make_batches([5, 9, 7, 12, 3, 8], batch_size=3)
IDS = torch.arange(5, 15)[None]


def alternating(model: nn.Module) -> dict[str, int]:
    """4, 2 and 8 bits in turn, by site; the second site of every block stays as it is."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = {}
    for name in linears:
        block = int(next((part for part in name.split(".") if part.isdigit()), "-1"))
        if any(part in name for part in ("query", "key", "value", "q_proj", "k_proj", "v_proj")):
            found[name] = (4, 2)[block % 2]
        elif any(part in name for part in ("intermediate", "fc1")):
            found[name] = 8
        elif "fc2" in name or ("output.dense" in name and "attention" not in name):
            found[name] = (2, 3)[block % 2]
    return found


@pytest.mark.parametrize(("family", "head"), [("bert", "pooler.dense"), ("opt", None)])
def test_come_back_to_the_last_bit(family: str, head: str | None, tmp_path: Path) -> None:
    model = build_model(family)
    outside = {f"{family}.{head}": 4} if head else {}
    wanted = alternating(model) | outside
    before = {name: module.weight.clone() for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    config = QuantizeConfig(group_size=16, also=("head",) if head else (), bits_of=wanted, scale_dtype=torch.float32)
    found = quantize_(model, BATCHES, config)
    assert {name: weight.grid.scheme.bits for name, weight in found.weights.items()} == wanted
    assert sorted(row.bits for row in found.layers) == sorted(wanted.values())
    for name, weight in before.items():
        assert torch.equal(model.get_submodule(name).weight, weight) == (name not in wanted)
    again = load(save(model, found.weights, tmp_path / "mixed", dtype=torch.float32))
    assert torch.equal(again(input_ids=IDS)[0], model(input_ids=IDS)[0])


def test_bits_in_words() -> None:
    assert QuantizeConfig(3).amount == "3 bits"
    assert QuantizeConfig(bits_of={"a": 2, "b": 8, "c": 4}).amount == "2 to 8 bits"
    assert QuantizeConfig(bits_of={"a": 4, "b": 4}).amount == "4 bits"
    assert not QuantizeConfig(bits_of={"a": 2, "b": 8}).fast  # 8 bits would notice


def test_unknown_bits_are_refused() -> None:
    with pytest.raises(InputError, match="--bits 5: choose one of"):
        QuantizeConfig(bits_of={"a": 5})


def test_gptq_files_hold_one_number_of_bits() -> None:
    schemes = {"model.layers.0.q": Scheme(4, 32), "model.layers.0.k": Scheme(2, 32)}
    with pytest.raises(InputError, match="--format gptq holds one number of bits"):
        FORMATS["gptq"].config(schemes, [])
