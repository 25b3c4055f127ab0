"""What a checkpoint says is taken, or said to be left out: entries of config.json, and tensors of its files."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

import shrinkformer
from shrinkformer.commands.locate import Source, load_model
from shrinkformer.errors import CheckpointError, ShrinkformerWarning
from shrinkformer.prune.lazy import load_lazily
from shrinkformer.prune.opening import load_pretrained, open_config
from shrinkformer.prune.tensors import require_stored, wholes_of
from shrinkformer.quantize.checkpoint import save
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.quantizer import quantize_
from tests.conftest import FAMILIES, build_model, make_batches

State = dict[str, Tensor]

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def checkpoint(
    folder: Path,
    family: str = "bert",
    head: str | None = None,
    *,
    change: Callable[[State], State] | None = None,
    as_bin: bool = False,
    config: dict[str, Any] | None = None,
    **sizes: Any,
) -> Path:
    """A tiny checkpoint whose tensors and entries were changed; an entry of ``...`` is taken away."""
    build_model(family, head, **sizes).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    if change is not None:
        save_file(state := change(state), folder / "model.safetensors", metadata={"format": "pt"})
    if as_bin:
        torch.save(state, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    file = folder / "config.json"
    entries = json.loads(file.read_text()) | (config or {})
    file.write_text(json.dumps({name: value for name, value in entries.items() if value is not ...}))
    return folder


def added(name: str, *shape: int) -> Callable[[State], State]:
    return lambda state: state | {name: torch.zeros(shape or (4,))}


class TestEntries:
    @pytest.mark.parametrize(
        ("family", "name", "value"),
        [
            ("bert", "position_embedding_type", "relative_key"),
            ("roberta", "position_embedding_type", "relative_key_query"),
            ("electra", "adapters", {"adapters": {"sst": "houlsby"}, "config_map": {}}),
            ("llama", "attn_logit_softcapping", 50.0),
            ("llama", "residual_multiplier", 0.22),
            ("llama", "sliding_window", 16),
            ("qwen2", "is_causal", False),
            ("llama", "quantization", {"group_size": 64, "bits": 4}),
            ("bert", "position_embedding_type", "rope"),
            ("gpt2", "position_embedding_type", "rotary"),
            ("bert", "rotary_value", True),
            ("gpt2", "rope_scaling", {"type": "linear", "factor": 2.0}),
            ("opt", "rope_theta", 1e4),
            ("opt", "rotary_pct", 0.25),
            ("llama", "partial_rotary_factor", 0.5),
            ("mistral", "rope_interleaved", True),
            ("qwen2", "rope_ratio", 8),
            ("llama", "rope_position_offset", 4),
        ],
    )
    def test_what_transformers_would_forget_is_refused(
        self, family: str, name: str, value: Any, tmp_path: Path
    ) -> None:
        folder = checkpoint(tmp_path, family, config={name: value})
        with pytest.raises(CheckpointError, match=f"{name} is .* does not read for '{family}'"):
            open_config(folder)

    @pytest.mark.parametrize(
        ("family", "entries"),
        [
            (
                "bert",
                {"position_embedding_type": "absolute", "adapters": {"adapters": {}}, "use_cache": True},
            ),
            ("distilbert", {"tie_weights_": True, "output_past": True, "is_decoder": False, "seed_dropout": 0.1}),
            ("llama", {"attention_multiplier": None, "residual_multiplier": 1.0, "rope_theta": 1e4, "min_length": 3}),
            ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": ...}),
            ("llama", {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": ...}),
            ("mistral", {"rope_theta": 1e6, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
            ("qwen2", {"rope_theta": 1e6, "rope_scaling": YARN, "rope_parameters": ..., "use_mrope": False}),
            ("qwen3", {"rope_theta": 1e6, "rope_scaling": None, "rope_parameters": ...}),
            ("llama", {"rope_interleaved": False, "rope_ratio": 1.0, "partial_rotary_factor": 1.0, "mixer": None}),
            ("phi", {"partial_rotary_factor": 0.5, "rope_theta": 1e4, "rope_scaling": None, "rope_parameters": ...}),
            ("bert", {"rotary_value": False, "rope_scaling": None, "mixers": []}),
            ("gpt_neox", {"rotary_pct": 0.25, "rotary_emb_base": 10000, "position_embedding_type": "rotary"}),
            ("llama", {"sliding_window": 80}),  # as many as there are positions
            ("gpt_neox", {"sliding_window": 16, "use_sliding_window": False}),
            ("qwen2", {"attention_bias": True, "mlp_bias": False}),  # the tensors tell
            ("qwen2", {"head_dim": 8, "use_sliding_window": False}),  # not declared, and read all the same
            ("opt", {"activation_dropout": 0.0, "prefix": "</s>", "layer_types": ["full_attention"] * 3}),
        ],
    )
    def test_neutral_values_records_and_what_is_read_pass_without_a_word(
        self, family: str, entries: dict[str, Any], tmp_path: Path
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ShrinkformerWarning)
            open_config(checkpoint(tmp_path, family, config=entries))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_own_configurations_pass_without_a_word(self, family: str, tmp_path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ShrinkformerWarning)
            open_config(checkpoint(tmp_path, family))

    @pytest.mark.parametrize(
        ("family", "entries"),
        [
            ("bert", {"hidden_act": "swoosh"}),
            ("llama", {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}),
        ],
    )
    def test_values_that_transformers_has_not(self, family: str, entries: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"takes no such value: correct the entry, or download"):
            open_config(checkpoint(tmp_path, family, config=entries))

    def test_what_nobody_knows_is_said_with_its_value(self, tmp_path: Path) -> None:
        folder = checkpoint(tmp_path, config={"token_mixing": "conv", "auto_map": {"AutoModel": "own.MixedBert"}})
        with pytest.warns(ShrinkformerWarning) as said:
            open_config(folder)
        texts = [str(entry.message) for entry in said]
        assert any("nothing in transformers reads token_mixing: 'conv'" in text for text in texts)
        assert any("auto_map names code of the model's own (own.MixedBert)" in text for text in texts)


class TestTensors:
    @pytest.mark.parametrize(
        ("family", "name", "said"),
        [
            ("bert", "bert.encoder.layer.1.attention.self.distance_embedding.weight", "another model would be built"),
            ("roberta", "roberta.encoder.layer.0.output.adapters.a.weight", "merge it"),
            ("llama", "model.layers.0.self_attn.q_proj.lora_A.default.weight", "merge it"),
            ("qwen2", "model.layers.2.self_attn.q_norm.weight", "another model would be built"),
            ("distilbert", "crf.transitions", "another model would be built"),
            ("mistral", "model.layers.0.self_attn.o_proj.bias", "another model would be built"),
            ("opt", "model.decoder.extra.bias", "another model would be built"),
        ],
    )
    @pytest.mark.parametrize("as_bin", [False, True])
    def test_what_has_no_place_is_refused_before_anything_is_loaded(
        self, family: str, name: str, said: str, as_bin: bool, tmp_path: Path
    ) -> None:
        folder = checkpoint(tmp_path, family, change=added(name), as_bin=as_bin)
        with pytest.raises(CheckpointError, match=f"has no place for {name}.*{said}"):
            open_config(folder)

    @pytest.mark.parametrize(("prefix", "cause"), [("module.", "data parallelism"), ("_orig_mod.", r"torch\.compile")])
    def test_wrappers_are_named(self, prefix: str, cause: str, tmp_path: Path) -> None:
        folder = checkpoint(tmp_path, change=lambda state: {prefix + name: value for name, value in state.items()})
        with pytest.raises(CheckpointError, match=f"has no place for {prefix}.*{cause}"):
            open_config(folder)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
    @pytest.mark.parametrize("as_bin", [False, True])
    def test_packed_numbers_are_no_weights(self, dtype: torch.dtype, as_bin: bool, tmp_path: Path) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        folder = checkpoint(tmp_path, "llama", change=lambda s: s | {name: s[name].to(dtype)}, as_bin=as_bin)
        with pytest.raises(CheckpointError, match=f"{name} is of type .*no quantization_config"):
            open_config(folder)

    def test_quantized_too(self, tmp_path: Path) -> None:
        model, name = build_model("llama"), "model.layers.1.self_attn.q_norm.weight"
        found = quantize_(model, make_batches([9, 5], batch_size=2), QuantizeConfig(group_size=16, quantizer="rtn"))
        folder = save(model, found.weights, tmp_path / "q")
        shrinkformer.load(folder)
        state = load_file(folder / "model.safetensors")
        save_file(added(name)(state), folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"has no place for {name}"):
            open_config(folder)

    def test_parts_of_packed_weights_have_their_place(self) -> None:
        assert "a.b.weight" in wholes_of("a.b.weight.quant_state.bitsandbytes__nf4")
        assert "a.b.weight" in wholes_of("a.b.weight_scale")

    def test_in_memory_and_block_by_block_too(self, tmp_path: Path) -> None:
        name = "model.layers.1.self_attn.q_norm.weight"
        folder = checkpoint(tmp_path, "llama", change=added(name))
        with pytest.raises(CheckpointError, match=f"has no place for {name}"):
            load_pretrained(AutoModelForCausalLM, folder)
        with pytest.raises(CheckpointError, match=f"has no place for {name}"):
            load_lazily(AutoModelForCausalLM, str(folder), dtype=torch.float32)

    @pytest.mark.parametrize(
        ("family", "name"),
        [
            ("bert", "bert.embeddings.position_ids"),
            ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
            ("gpt2", "transformer.h.0.attn.bias"),
            ("gpt_neox", "gpt_neox.layers.1.attention.masked_bias"),
            ("roberta", "roberta.embeddings.token_type_ids"),
        ],
    )
    def test_buffers_of_old_files_pass_without_a_word(self, family: str, name: str, tmp_path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ShrinkformerWarning)
            open_config(checkpoint(tmp_path, family, change=added(name)))

    @pytest.mark.parametrize(
        ("family", "head", "name"),
        [
            ("bert", "ForMaskedLM", "cls.seq_relationship.weight"),
            ("distilbert", "ForSequenceClassification", "vocab_projector.weight"),
            ("llama", "ForCausalLM", "score.weight"),
            ("electra", "Model", "discriminator_predictions.dense.weight"),
        ],
    )
    def test_another_head_is_left_out_with_a_warning(self, family: str, head: str, name: str, tmp_path: Path) -> None:
        folder = checkpoint(tmp_path, family, head, change=added(name, 2, 32))
        with pytest.warns(ShrinkformerWarning, match=rf"no place for the head in the file \({name}\)"):
            open_config(folder)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_whole_file_lacks_nothing_and_one_of_the_base_its_head(self, family: str, tmp_path: Path) -> None:
        model = build_model(family)
        model.save_pretrained(tmp_path)  # what is tied is there once
        require_stored(model, load_file(tmp_path / "model.safetensors"), "mine: ")
        base = model.base_model.state_dict()
        if not set(model.all_tied_weights_keys):
            with pytest.raises(CheckpointError, match=r"mine: the weight files lack"):
                require_stored(model, base, "mine: ")

    def test_a_head_that_is_not_asked_for_is_left_out_with_a_warning(self, tmp_path: Path) -> None:
        folder = checkpoint(tmp_path)
        source = Source("tiny", str(folder), open_config(folder))
        with pytest.warns(ShrinkformerWarning, match=r"BertModel has no place for the head .*classifier\.bias and 1"):
            load_model(source, AutoModel, "cpu", torch.float32)
