"""The shape of an architecture record."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class AttentionRecord:
    """Where the attention sublayer of one block lives; paths are relative to the block.

    Attributes:
        module: The module that splits its projections into heads.
        query: Linear layer that makes the queries.
        key: Linear layer that makes the keys; may be the same layer.
        value: Linear layer that makes the values; may be the same layer.
        output: Linear layer that consumes the concatenated heads.
        head_size_attribute: Attribute of ``module`` with the size of one head.
        heads_attributes: Attributes of ``module`` that hold the number of heads.
        width_attributes: Attributes of ``module`` that hold number of heads times head size.
        queries_attribute: Attribute of ``module`` with the number of query heads that share a key and a value head;
            "" where each has its own.
        fused: How the rows of one layer for query, key and value lie: ``"by_part"`` (all queries, all keys, all
            values), ``"by_head"`` (query, key and value of the first head, then of the second), or "" for three layers.
        rotary: Queries and keys are rotated by position, or normed, so that their entries cannot be mixed.
    """

    module: str
    query: str
    key: str
    value: str
    output: str
    head_size_attribute: str
    heads_attributes: tuple[str, ...] = ()
    width_attributes: tuple[str, ...] = ()
    queries_attribute: str = ""
    fused: str = ""
    rotary: bool = False

    @property
    def producers(self) -> tuple[str, ...]:
        """The layers whose output rows disappear with a head."""
        return tuple(dict.fromkeys((self.query, self.key, self.value)))


@dataclass(frozen=True)
class FeedForwardRecord:
    """Where the feed-forward sublayer of one block lives; paths are relative to the block.

    Attributes:
        inputs: Linear layers whose output rows are the neurons: one, or gate and up for a gated sublayer.
        output: Linear layer that consumes the neurons.
    """

    inputs: tuple[str, ...]
    output: str

    @property
    def gated(self) -> bool:
        """Whether a neuron is the product of two projections."""
        return len(self.inputs) > 1


@dataclass(frozen=True)
class StockRecord:
    """What a configuration of transformers can say of blocks that are all alike, beside their number of neurons.

    Attributes:
        head_size_key: Name of the size of a head in ``config``. "" where stock code divides the hidden size by the
            number of heads, so that no heads can be missing.
        query_heads_key: Name of the number of query heads, where ``heads_key`` counts keys and values; "" otherwise.
        heads_divide_hidden: Configurations whose number of query heads does not divide the hidden size are refused.
        heads_fixed_by: Names of switches in ``config`` under which stock code divides all the same.
    """

    head_size_key: str = ""
    query_heads_key: str = ""
    heads_divide_hidden: bool = False
    heads_fixed_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """Everything the pruner needs to know about one ``config.model_type``.

    Attributes:
        model_type: Key of the record, ``config.model_type``.
        layers: Path of the list of blocks, relative to the base model (without task head).
        attention: The attention sublayer of a block.
        feed_forward: The feed-forward sublayer of a block.
        heads_key: Name of the number of heads in ``config`` and in ``per_layer_config``: of key and value heads where
            queries share them. "" where transformers refuses a configuration whose number of heads differs by block.
        neurons_key: Name of the feed-forward width in ``config`` and in ``per_layer_config``.
        pre_norm: Norms stand before the sublayers, so that the residual stream, and what a block adds to it, grows from
            block to block; otherwise every block hands on states of one size.
        pre_norm_attribute: Attribute of a block that says so instead, where that differs between configurations.
        final_norm: Path of the norm behind the last block, relative to the base model; "" where there is none.
        positions_follow_padding: Position ids start behind the padding id, so that many positions cannot be used.
        stock: What stock classes can be told of smaller blocks without a size for each of them.
    """

    model_type: str
    layers: str
    attention: AttentionRecord
    feed_forward: FeedForwardRecord
    heads_key: str = "num_attention_heads"
    neurons_key: str = "intermediate_size"
    pre_norm: bool = False
    pre_norm_attribute: str = ""
    final_norm: str = ""
    positions_follow_padding: bool = False
    stock: StockRecord = StockRecord()

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON, for the checkpoint: its loader must not depend on this package."""
        return asdict(self)
