"""What commands say of checkpoints that cannot be used as they are: one line, cause and remedy, before loading."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shrinkformer.commands import opt_eval, prune_opt
from shrinkformer.quantize.checkpoint import save
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.quantizer import quantize_
from tests.conftest import build_model, build_tokenizer, make_batches
from tests.test_opening import checkpoint
from tests.test_prune_opt import call, read_records, write_corpora

MIXED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("data"))


def tiny(folder: Path, family: str, head: str | None = None, **sizes: Any) -> Path:
    build_tokenizer().save_pretrained(checkpoint(folder / "mine", family, head, **sizes))
    return folder / "mine"


def said(
    main: Any, data_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """Exit code, standard output, and the last line of standard error."""
    out = str(folder.parent / "out")
    code = call(main, data_dir, "--model_name", str(folder), "--output_dir", out, *arguments)
    found = capsys.readouterr()
    return code, found.out, (found.err.strip().splitlines() or [""])[-1]


def test_mixed_attention_is_evaluated_and_not_pruned(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny(tmp_path, "qwen2", **MIXED)
    assert said(opt_eval.main, data_dir, folder, capsys)[0] == 0
    for main, arguments, verb in (
        (prune_opt.main, ("--mu", "0.5"), "to prune or quantize, take"),
        (opt_eval.main, ("--max_memory", "0.0001"), "to pass it block by block, which --max_memory makes necessary"),
    ):
        code, out, line = said(main, data_dir, folder, capsys, *arguments)
        assert (code, "loading" in out) == (2, False)
        assert f"--model_name {folder}" in line or "--model_name mine" in line
        assert verb in line


def test_attention_to_a_second_input_is_refused(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny(tmp_path, "gpt2", add_cross_attention=True)
    code, out, line = said(prune_opt.main, data_dir, folder, capsys, "--mu", "0.5", "--dry_run")
    assert (code, out) == (2, "")
    assert "layer 0, crossattention.c_attn.weight and 8 others" in line


def test_quantized_models_are_not_taken_block_by_block(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = build_model("llama"), tmp_path / "mine"
    found = quantize_(model, make_batches([9, 5], batch_size=2), QuantizeConfig(group_size=16, quantizer="rtn"))
    save(model, found.weights, folder, tokenizer=build_tokenizer())
    code, out, line = said(opt_eval.main, data_dir, folder, capsys, "--max_memory", "0.0001")
    assert (code, "loading" in out) == (2, False)
    assert "--max_memory: weights of a quantized model are decoded as a whole" in line


@pytest.mark.parametrize("lazily", [(), ("--max_memory", "0.0001")])
def test_weights_beyond_a_type_are_not_called_broken(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str], lazily: tuple[str, ...]
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    folder = tiny(tmp_path, "llama", change=lambda state: state | {name: state[name] * 1e7})
    arguments = ("--dtype", "float16", "--method", "stat", "--mu", "0.9", *lazily)
    code, _, line = said(prune_opt.main, data_dir, folder, capsys, *arguments)
    assert code == 1
    assert "stored in float32 and overflow in float16, whose range ends at 65,504: leave float16 out" in line
    assert "broken" not in line


@pytest.mark.parametrize(
    ("entries", "line"),
    [
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            "quant_method 'awq' in config.json cannot be read",
        ),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping is 30.0, which transformers"),
    ],
)
def test_entries(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str], entries: dict[str, Any], line: str
) -> None:
    folder = tiny(tmp_path, "llama", config=entries)
    code, out, last = said(opt_eval.main, data_dir, folder, capsys)
    assert (code, out) == (2, "")
    assert line in last


def test_a_head_that_is_not_in_the_file(tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny(tmp_path, "llama", "Model", config={"architectures": ["LlamaForCausalLM"]})
    for main, arguments in ((opt_eval.main, ()), (prune_opt.main, ("--mu", "0.5", "--dry_run"))):
        code, out, line = said(main, data_dir, folder, capsys, *arguments)
        assert (code, "loading" in out) == (2, False)
        assert "the weight files lack lm_head.weight, which config.json describes" in line


def test_without_a_class_the_tensors_tell(tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny(tmp_path, "llama", config={"architectures": ...})
    assert said(opt_eval.main, data_dir, folder, capsys)[0] == 0
    assert read_records(tmp_path / "out")[0]["dense"]["metrics"]["perplexity"] > 0


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_to_be_merged(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str], whole: bool
) -> None:
    folder = tiny(tmp_path, "llama")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    torch.save({}, folder / "adapter_model.bin")
    if not whole:
        (folder / "config.json").unlink()
    code, out, line = said(opt_eval.main, data_dir, folder, capsys)
    assert (code, out) == (2, "")
    assert "holds an adapter (adapter_config.json); merge it into its model" in line
