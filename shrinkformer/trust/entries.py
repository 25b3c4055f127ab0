"""Entries of config.json that transformers does not read: refused where they change what a model computes.

A class of transformers keeps any entry that it does not know, and computes as if it were not there. What versions
before 5 read, what relatives of our families read, and what other tools write is known by name here; of what nobody
knows, the user hears.
"""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import GenerationConfig, PreTrainedConfig

from shrinkformer.errors import CheckpointError, warn
from shrinkformer.trust.foreign import shortened

_OFF: tuple[Any, ...] = (None, False, 0, [], {}, "")

_OTHER_BLOCKS = "blocks of such models are of several kinds"
_OTHER_SCALE = "these models scale what passes here"
_OTHER_SCORES = "scores of attention are changed by it"
_OTHER_LAYERS = "layers of such models are others"
_PACKED = "weights are packed integers of a tool that is not read"

COMPUTING: Mapping[str, tuple[tuple[Any, ...], str]] = {
    # read by transformers before version 5
    "position_embedding_type": ((None, "absolute"), "positions are of another kind"),
    "adapters": ((*_OFF, {"adapters": {}}), "adapters compute inside the blocks; merge them, or remove them"),
    "adapter_fusion_models": (_OFF, "adapters compute inside the blocks; merge them, or remove them"),
    # read for relatives of our families, some of which keep the name of the family they come from
    **dict.fromkeys(("attn_logit_softcapping", "attention_logit_cap"), (_OFF, _OTHER_SCORES)),
    **dict.fromkeys(("attention_sink", "attention_sinks", "use_sinks"), (_OFF, _OTHER_SCORES)),
    **dict.fromkeys(("alibi", "use_alibi", "qk_norm", "use_qk_norm", "qk_layernorm"), (_OFF, _OTHER_SCORES)),
    **dict.fromkeys(("clip_qkv", "query_pre_attn_scalar", "attention_multiplier"), (_OFF, _OTHER_SCORES)),
    **dict.fromkeys(("sliding_window", "attention_window", "local_attention"), (_OFF, "attention is cut by it")),
    **dict.fromkeys(("attention_chunk_size", "use_sliding_window"), (_OFF, "attention is cut by it")),
    "use_bidirectional_attention": (_OFF, "tokens attend to later ones, too"),
    "is_causal": ((None, True), "tokens attend to later ones, too"),
    "final_logit_softcapping": (_OFF, "predictions are squeezed by it"),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier"), ((*_OFF, 1), _OTHER_SCALE)),
    **dict.fromkeys(("logits_scaling", "logit_scale", "scale_emb", "scale_depth"), ((*_OFF, 1), _OTHER_SCALE)),
    **dict.fromkeys(("use_parallel_residual", "parallel_attn", "embedding_layernorm"), (_OFF, _OTHER_LAYERS)),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), ((*_OFF, 1), _OTHER_BLOCKS)),
    **dict.fromkeys(("no_rope_layers", "full_attn_idxs", "hybrid_override_pattern"), (_OFF, _OTHER_BLOCKS)),
    "layer_types": (_OFF, _OTHER_BLOCKS),
    # written by tools
    **dict.fromkeys(("quantization", "quantization_config_mlx", "compression_config"), (_OFF, _PACKED)),
}
"""Entries that change what a model computes: the values that do not, and what the others mean.

They count for families whose code in transformers does not read them.
"""

_RECORDS = frozenset(
    (
        *("architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "use_bfloat16", "auto_map"),
        *("finetuning_task", "task_specific_params", "problem_type", "id2label", "label2id", "num_labels"),
        *("tokenizer_class", "prefix", "cls_token_id", "sep_token_id", "mask_token_id", "unk_token_id"),
        *("pad_token", "language", "max_window_layers"),
        *("model_max_length", "max_sequence_length", "seq_length", "n_ctx"),
        *("is_decoder", "add_cross_attention", "tie_encoder_decoder"),  # where not read, they never were
        *("attention_bias", "mlp_bias", "qkv_bias", "use_qkv_bias", "use_bias"),  # the tensors tell
        *("gradient_checkpointing", "torchscript", "tf_legacy_loss", "keys_to_ignore_at_inference", "output_past"),
        *("use_cache", "return_dict", "chunk_size_feed_forward", "cross_attention_hidden_size", "tie_weights_"),
        *("pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head"),
        *("pooler_type", "directionality", "sentence_transformers", "sbert_ce_default_activation_function"),
        *("attn_implementation", "experts_implementation", "use_flash_attn", "flash_attn", "name_or_path"),
        *("output_attentions", "output_hidden_states", "decoder_start_token_id", "pretraining_tp", "token_dropout"),
        *("quantization_config", "shrinkformer", "per_layer_config", "pruned_heads", "base_model", "model_name"),
    )
)
"""Entries that say where a model comes from and how it is used, or that others of our checks read."""

_OF_TRAINING = re.compile(r"(^_|dropout|pdrop|^init|_init$|loss|^unsloth|^wandb|train|learning_rate|lr$)")

_OF_ROTATION = re.compile(r"^(rope_|rotary_|partial_rotary)")

_NO_ROTATION = ((*_OFF, 1, "default"), "positions would be of another kind")
"""The same as in :data:`COMPUTING` for names of this form."""

_OF_ALL_ROTARY = ("rope_parameters", "rope_scaling", "rope_theta")
"""What ``PreTrainedConfig`` reads for every family that rotates."""


def require_known_entries(raw: Mapping[str, Any], kind: type[PreTrainedConfig], file: Path) -> None:
    """Check that a class of transformers takes all that a configuration says.

    Args:
        raw: As it is written.
        kind: The class of the family.
        file: For messages.

    Raises:
        CheckpointError: An entry changes what the model computes, and transformers would go on without it.

    Warns:
        ShrinkformerWarning: Nobody knows an entry, or the model comes with code of its own.
    """
    unread = {name: raw[name] for name in sorted(raw.keys() - _declared(kind)) if not _is_read(name, kind)}
    for name, value in unread.items():
        if not _is_neutral(name, value) and not _is_usual(name, raw, kind):
            meaning = _meaning(name)[1]
            raise CheckpointError(
                f"{file}: {name} is {shortened(repr(value))}, which transformers {transformers.__version__} does not "
                f"read for {kind.model_type!r} ({meaning}): another model would be built; use a checkpoint without it."
            )
    strange = [name for name, value in unread.items() if value not in _OFF and not _is_record(name)]
    if strange:
        shown = shortened(", ".join(f"{name}: {unread[name]!r}" for name in strange))
        warn(
            f"{file}: nothing in transformers reads {shown}; if that changes what the model computes, do not use this "
            "checkpoint, otherwise remove it from the file"
        )
    _warn_of_code(raw, file)


def _declared(kind: type[PreTrainedConfig]) -> set[str]:
    """Names that the class itself has."""
    return {*kind().to_dict(), *kind.attribute_map}


def _is_read(name: str, kind: type[PreTrainedConfig]) -> bool:
    """Whether the family's code in transformers looks at an entry that its configuration does not declare."""
    code, word = _code_of(kind, "modeling"), re.escape(name)
    if _OF_ROTATION.search(name):
        if name in _OF_ALL_ROTARY:
            return _is_rotary(kind)
        if name == "partial_rotary_factor":  # moved among rope_parameters, where not every family looks for it
            return name in code
        return re.search(rf"kwargs\.\w+\([\"']{word}[\"']", _code_of(kind, "configuration")) is not None
    return re.search(rf"config\.{word}\b|attr\([\w.]*config, [\"']{word}[\"']", code) is not None


def _code_of(kind: type[PreTrainedConfig], part: str) -> str:
    """The text of a family's ``modeling`` or ``configuration`` file."""
    found = importlib.util.find_spec(kind.__module__.replace(".configuration_", f".{part}_"))
    return "" if found is None or found.origin is None else Path(found.origin).read_text(encoding="utf-8")


def _meaning(name: str) -> tuple[tuple[Any, ...] | None, str]:
    """The values of an entry that change nothing, None for all, and what the others mean."""
    return COMPUTING.get(name) or (_NO_ROTATION if _OF_ROTATION.search(name) else (None, ""))


def _is_neutral(name: str, value: Any) -> bool:
    neutral = _meaning(name)[0]
    if value is True:  # which equals 1
        return neutral is None or any(each is True for each in neutral)
    return neutral is None or value in neutral


def _is_record(name: str) -> bool:
    known = (
        name in _RECORDS or _meaning(name)[0] is not None or name in GenerationConfig._get_default_generation_params()
    )
    return known or _OF_TRAINING.search(name) is not None


def _is_usual(name: str, raw: Mapping[str, Any], kind: type[PreTrainedConfig]) -> bool:
    """Whether an entry says what the family does anyway."""
    value = raw[name]
    if name == "layer_types" and isinstance(value, list):
        return set(map(str, value)) == {"full_attention"}
    if name == "sliding_window":
        longest = raw.get("max_position_embeddings")
        unlimited = isinstance(value, int) and isinstance(longest, int) and value >= longest
        return unlimited or raw.get("use_sliding_window") is False
    return name == "position_embedding_type" and value in ("rope", "rotary") and _is_rotary(kind)


def _is_rotary(kind: type[PreTrainedConfig]) -> bool:
    """By the code of the model: every configuration class of transformers has the methods for rotary embeddings."""
    return "RotaryEmbedding" in _code_of(kind, "modeling")


def _warn_of_code(raw: Mapping[str, Any], file: Path) -> None:
    named = raw.get("auto_map")
    named = named if isinstance(named, dict) else {}
    foreign = sorted(str(value) for value in named.values() if "pruned_modeling." not in str(value))
    if foreign:
        warn(
            f"{file}: auto_map names code of the model's own ({shortened(', '.join(foreign))}), which is never "
            f"run; the {raw.get('model_type')} of transformers is used, compare its outputs with what you know"
        )
