"""An interrupted quantization goes on where it stopped, and ends as if nothing had happened."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from shrinkformer.architectures import layer_views
from shrinkformer.errors import InputError
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.quantizer import quantize_
from shrinkformer.quantize.resume import QuantizedBlocks
from tests.conftest import build_model, make_batches

FAMILIES = ("bert", "opt", "llama")
BATCHES = make_batches([5, 9, 7, 12, 3, 8], batch_size=3)


@pytest.mark.parametrize("quantizer", ["shrink", "gptq", "rtn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_resuming_ends_bit_by_bit_as_without_a_break(family: str, quantizer: str, tmp_path: Path) -> None:
    dense, config = build_model(family), QuantizeConfig(3, 16, quantizer=quantizer)
    whole = copy.deepcopy(dense)
    expected = quantize_(whole, BATCHES, config)

    broken = copy.deepcopy(dense)
    store = QuantizedBlocks(tmp_path, "key")
    write = store.write

    def write_then_fail(block: int, layers: Any) -> None:
        write(block, layers)
        if block == 1:
            raise KeyboardInterrupt

    store.write = write_then_fail  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        quantize_(broken, BATCHES, config, store=store)

    written, store = [], QuantizedBlocks(tmp_path, "key")
    write = store.write
    store.write = lambda block, layers: (written.append(block), write(block, layers))[1]  # type: ignore[method-assign]
    again = copy.deepcopy(dense)
    found = quantize_(again, BATCHES, config, store=store)

    assert written == list(range(2, len(layer_views(dense))))
    assert [report.name for report in found.layers] == [report.name for report in expected.layers]
    assert [report.error for report in found.layers] == [report.error for report in expected.layers]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    for name, weight in expected.weights.items():
        assert torch.equal(weight.codes, found.weights[name].codes)
        assert torch.equal(weight.grid.scale, found.weights[name].grid.scale)
        assert weight.grid.scheme == found.weights[name].grid.scheme


def test_other_options_are_refused(tmp_path: Path) -> None:
    model = build_model("opt")
    quantize_(model, BATCHES, QuantizeConfig(4, 16), store=QuantizedBlocks(tmp_path, "4 bits"))
    with pytest.raises(InputError, match=r"--resume: .* other weights, calibration examples or options"):
        QuantizedBlocks(tmp_path, "3 bits")
