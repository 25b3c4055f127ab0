"""Embeddings and heads, quantized by choice."""

import copy
import re
from pathlib import Path

import pytest
import torch

from shrinkformer.efficiency.size import folder_bytes
from shrinkformer.errors import InputError
from shrinkformer.prune.streamed import tied_weights
from shrinkformer.quantize.checkpoint import load, save
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.formats import FORMATS
from shrinkformer.quantize.outside import Outside, require_outside
from shrinkformer.quantize.quantizer import quantize_
from shrinkformer.quantize.scheme import Scheme
from tests.conftest import FAMILIES, build_model, make_batches

BATCHES = make_batches([5, 9, 7, 12, 3, 8], batch_size=3)
BOTH = ("embeddings", "head")
IDS = torch.arange(5, 15)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_stored_and_comes_back(family: str, tmp_path: Path) -> None:
    model = build_model(family)
    expected = copy.deepcopy(model)(input_ids=IDS)[0]
    found = quantize_(model, BATCHES, QuantizeConfig(8, 16, also=BOTH, scale_dtype=torch.float32))
    outside = [report.name for report in found.layers if report.layer is None]
    assert model.get_submodule(outside[0]) is model.get_input_embeddings()
    got = model(input_ids=IDS)[0]
    assert not torch.equal(got, expected)
    assert (got - expected).norm() < 0.1 * expected.norm()
    for name in outside:
        assert torch.equal(model.get_submodule(name).weight, found.weights[name].decode())
    kind = "float" if family == "gpt2" else "compressed-tensors"
    again = load(save(model, found.weights, tmp_path / "saved", format=kind, dtype=torch.float32))
    assert torch.equal(again(input_ids=IDS)[0], got)


def test_a_matrix_with_two_uses_is_solved_once_and_written_twice(tmp_path: Path) -> None:
    model = build_model("opt")
    ((head, embeddings),) = tied_weights(model).items()
    found = quantize_(model, BATCHES, QuantizeConfig(4, 16, also=BOTH, scale_dtype=torch.float32))
    codes = [found.weights[name.removesuffix(".weight")].codes for name in (head, embeddings)]
    assert torch.equal(*codes)
    assert len([report for report in found.layers if report.layer is None]) == 1
    folder = save(model, found.weights, tmp_path / "saved", dtype=torch.float32)
    again = load(folder)
    assert not again.config.tie_word_embeddings
    assert torch.equal(again(input_ids=IDS)[0], model(input_ids=IDS)[0])


def test_a_matrix_with_two_uses_is_written_once_for_ourselves(tmp_path: Path) -> None:
    model = build_model("opt")
    found = quantize_(model, BATCHES, QuantizeConfig(4, 16, also=BOTH, scale_dtype=torch.float32))
    folders = [
        save(model, found.weights, tmp_path / str(once), dtype=torch.float32, tied_once=once) for once in (False, True)
    ]
    assert folder_bytes(folders[1]) < folder_bytes(folders[0])
    again = load(folders[1])
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(again(input_ids=IDS)[0], model(input_ids=IDS)[0])


@pytest.mark.parametrize("family", ["bert", "opt", "gpt2"])
def test_positions_by_choice(family: str, tmp_path: Path) -> None:
    model = build_model(family)
    found = quantize_(model, BATCHES, QuantizeConfig(8, 16, also=("positions",), scale_dtype=torch.float32))
    names = [report.name for report in found.layers if report.layer is None]
    assert {name.rpartition(".")[2] for name in names} <= {
        "position_embeddings", "token_type_embeddings", "embed_positions", "wpe"
    }  # fmt: skip
    assert names
    kind = "float" if family == "gpt2" else "compressed-tensors"
    again = load(save(model, found.weights, tmp_path / "saved", format=kind, dtype=torch.float32))
    assert torch.equal(again(input_ids=IDS)[0], model(input_ids=IDS)[0])


def test_a_head_is_solved_for_what_reaches_it() -> None:
    """Look-ahead lowers the error of the logits; nearest codes lower that of the weight."""
    dense = build_model("llama")
    layer = dense.lm_head
    rows = torch.cat([dense.model(**batch).last_hidden_state[batch["attention_mask"].bool()] for batch in BATCHES])
    errors = {}
    for quantizer in ("shrink", "rtn"):
        model = copy.deepcopy(dense)
        config = QuantizeConfig(3, 16, quantizer=quantizer, also=("head",))
        into = quantize_(copy.deepcopy(dense), BATCHES, config)
        into.weights.clear()
        Outside(model, BATCHES, config).behind(into)  # behind blocks that are not quantized
        assert list(into.weights) == ["lm_head"]
        errors[quantizer] = float((rows @ (model.lm_head.weight - layer.weight).T).detach().norm())
    assert errors["shrink"] < 0.9 * errors["rtn"]


def test_nothing_else_is_touched_without_it() -> None:
    model = build_model("opt")
    before = model.get_input_embeddings().weight.clone()
    quantize_(model, BATCHES, QuantizeConfig(4, 16))
    assert torch.equal(model.get_input_embeddings().weight, before)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("opt", {"also": ("head",)}, "--also head: lm_head and model.decoder.embed_tokens are one matrix"),
        ("opt", {"also": ("embeddings",)}, "pass --also embeddings head, or leave it out"),
        ("bert", {"also": ("head",), "group_size": 500}, "--group_size 500: larger than"),
    ],
)
def test_what_cannot_be_is_refused(family: str, config: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        require_outside(build_model(family), QuantizeConfig(**{"bits": 4, "group_size": 16, **config}))  # type: ignore[arg-type]


def test_a_model_without_head_is_refused() -> None:
    with pytest.raises(InputError, match="--also head: OPTModel has no layer behind its blocks"):
        require_outside(build_model("opt").model, QuantizeConfig(4, 16, also=("head",)))


def test_a_model_without_positions_is_refused() -> None:
    with pytest.raises(InputError, match="--also positions: LlamaForCausalLM has no position embeddings"):
        require_outside(build_model("llama"), QuantizeConfig(4, 16, also=("positions",)))


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(InputError, match=r"--also 'tail': choose among embeddings, head, positions"):
        QuantizeConfig(4, 16, also=("tail",))


def test_gptq_files_hold_blocks_only() -> None:
    schemes = dict.fromkeys(("model.layers.0.mlp.up_proj", "lm_head"), Scheme(4, 32))
    with pytest.raises(InputError, match="lm_head: --format gptq holds layers of one list of blocks only"):
        FORMATS["gptq"].config(schemes, [])
