"""Decoder families."""

from dataclasses import replace

from shrinkformer.architectures.record import Architecture, AttentionRecord, FeedForwardRecord, StockRecord

_OPT = Architecture(
    model_type="opt",
    pre_norm=True,
    pre_norm_attribute="do_layer_norm_before",
    final_norm="decoder.final_layer_norm",
    layers="decoder.layers",
    attention=AttentionRecord(
        module="self_attn",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.out_proj",
        head_size_attribute="head_dim",
        heads_attributes=("num_heads",),
    ),
    feed_forward=FeedForwardRecord(inputs=("fc1",), output="fc2"),
    neurons_key="ffn_dim",
)

_GPT2 = Architecture(
    model_type="gpt2",
    pre_norm=True,
    final_norm="ln_f",
    layers="h",
    attention=AttentionRecord(
        module="attn",
        query="attn.c_attn",
        key="attn.c_attn",
        value="attn.c_attn",
        output="attn.c_proj",
        head_size_attribute="head_dim",
        heads_attributes=("num_heads",),
        width_attributes=("split_size",),
        fused="by_part",
    ),
    feed_forward=FeedForwardRecord(inputs=("mlp.c_fc",), output="mlp.c_proj"),
    heads_key="n_head",
    neurons_key="n_inner",
)

_GPT_NEOX = Architecture(
    model_type="gpt_neox",
    pre_norm=True,
    final_norm="final_layer_norm",
    layers="layers",
    attention=AttentionRecord(
        module="attention",
        query="attention.query_key_value",
        key="attention.query_key_value",
        value="attention.query_key_value",
        output="attention.dense",
        head_size_attribute="head_size",
        fused="by_head",
        rotary=True,
    ),
    feed_forward=FeedForwardRecord(inputs=("mlp.dense_h_to_4h",), output="mlp.dense_4h_to_h"),
    heads_key="",
)

_LLAMA = Architecture(
    model_type="llama",
    pre_norm=True,
    final_norm="norm",
    layers="layers",
    attention=AttentionRecord(
        module="self_attn",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.o_proj",
        head_size_attribute="head_dim",
        queries_attribute="num_key_value_groups",
        rotary=True,
    ),
    feed_forward=FeedForwardRecord(inputs=("mlp.gate_proj", "mlp.up_proj"), output="mlp.down_proj"),
    heads_key="num_key_value_heads",
    stock=StockRecord(
        head_size_key="head_dim", query_heads_key="num_attention_heads", heads_divide_hidden=True
    ),  # LlamaConfig.validate_architecture
)

_PHI = replace(
    _LLAMA,
    model_type="phi",
    final_norm="final_layernorm",
    attention=replace(_LLAMA.attention, output="self_attn.dense"),
    feed_forward=FeedForwardRecord(inputs=("mlp.fc1",), output="mlp.fc2"),
    # Norms of queries and keys are as wide as the hidden size over the number of heads.
    stock=replace(_LLAMA.stock, heads_divide_hidden=False, heads_fixed_by=("qk_layernorm",)),
)

_LIKE_LLAMA = ("mistral", "qwen2", "qwen3")

DECODERS: dict[str, Architecture] = {
    "opt": _OPT,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "phi": _PHI,
    "llama": _LLAMA,
    **{
        name: replace(_LLAMA, model_type=name, stock=replace(_LLAMA.stock, heads_divide_hidden=False))
        for name in _LIKE_LLAMA
    },
}
