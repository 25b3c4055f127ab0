"""How long the inputs of a model may be."""

from transformers import PreTrainedConfig

from shrinkformer.architectures.views import find_architecture


def max_positions(config: PreTrainedConfig) -> int:
    """Longest input that a model is made for, in tokens."""
    reserved = find_architecture(config.model_type).positions_follow_padding
    return int(config.max_position_embeddings) - (int(config.pad_token_id or 0) + 1 if reserved else 0)


def has_position_table(config: PreTrainedConfig) -> bool:
    """Whether a longer input has no embedding at all; rotary positions go on, if less well."""
    return not find_architecture(config.model_type).attention.rotary
