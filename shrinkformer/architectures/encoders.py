"""Encoder families."""

from dataclasses import replace

from shrinkformer.architectures.record import Architecture, AttentionRecord, FeedForwardRecord

_BERT = Architecture(
    model_type="bert",
    layers="encoder.layer",
    attention=AttentionRecord(
        module="attention.self",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        output="attention.output.dense",
        head_size_attribute="attention_head_size",
        heads_attributes=("num_attention_heads",),
        width_attributes=("all_head_size",),
    ),
    feed_forward=FeedForwardRecord(inputs=("intermediate.dense",), output="output.dense"),
)

_DISTILBERT = Architecture(
    model_type="distilbert",
    layers="transformer.layer",
    attention=AttentionRecord(
        module="attention",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        output="attention.out_lin",
        head_size_attribute="attention_head_size",
        heads_attributes=("n_heads",),
    ),
    feed_forward=FeedForwardRecord(inputs=("ffn.lin1",), output="ffn.lin2"),
    heads_key="n_heads",
    neurons_key="hidden_dim",
)

_LIKE_ROBERTA = ("roberta", "xlm-roberta", "camembert")

ENCODERS: dict[str, Architecture] = {
    "bert": _BERT,
    "distilbert": _DISTILBERT,
    "electra": replace(_BERT, model_type="electra"),
    **{name: replace(_BERT, model_type=name, positions_follow_padding=True) for name in _LIKE_ROBERTA},
}
