"""Random tiny models of every family, random sizes for their blocks, random batches; drawn by hypothesis."""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from shrinkformer.architectures import LayerView, layer_views, unit_columns
from shrinkformer.efficiency.macs import LayerSize
from shrinkformer.prune.budget import layer_sizes
from shrinkformer.prune.curves import QUERIES, VALUES, narrowable, sized
from shrinkformer.prune.surgery import Weights, rebuild

VOCABULARY = 24
LONGEST = 12

Batch = dict[str, Tensor]
Strategy = st.SearchStrategy[Any]

_BOOL = st.booleans()
_SOFT = st.sampled_from(["gelu", "relu", "silu", "gelu_new"])
_TIED = {"tie_word_embeddings": _BOOL}
_EPSILON = st.sampled_from([1e-12, 1e-5])
_ROTATED = {"partial_rotary_factor": st.sampled_from([0.5, 1.0])}


@dataclass(frozen=True)
class Family:
    """How configurations of a family are drawn.

    Attributes:
        stem: Of the names of its classes.
        names: What it calls ``hidden_size`` and the like, where it has other names.
        extras: Strategies of fields that only some families have.
        decoder: Whether it predicts the next token.
        grouped: Whether queries may share keys and values.
        own_head_size: Whether heads need not divide the hidden size evenly.
    """

    stem: str
    names: dict[str, str]
    extras: dict[str, Strategy]
    decoder: bool = False
    grouped: bool = False
    own_head_size: bool = False


_BERT: dict[str, Strategy] = {"hidden_act": _SOFT, "layer_norm_eps": _EPSILON, "type_vocab_size": st.integers(1, 2)}
_LLAMA: dict[str, Strategy] = {**_TIED, "hidden_act": _SOFT}

FAMILIES: dict[str, Family] = {
    "bert": Family("Bert", {}, _BERT),
    "distilbert": Family(
        "DistilBert",
        {
            "hidden_size": "dim",
            "num_attention_heads": "n_heads",
            "num_hidden_layers": "n_layers",
            "intermediate_size": "hidden_dim",
        },
        {"activation": _SOFT, "sinusoidal_pos_embds": _BOOL},
    ),
    "roberta": Family("Roberta", {}, _BERT),
    "electra": Family("Electra", {}, {**_BERT, "embedding_size": st.sampled_from([4, 8, 12])}),
    "opt": Family(
        "OPT",
        {"intermediate_size": "ffn_dim"},
        {
            **_TIED,
            "activation_function": _SOFT,
            "do_layer_norm_before": _BOOL,
            "enable_bias": _BOOL,
            "layer_norm_elementwise_affine": _BOOL,
        },
        decoder=True,
    ),
    "gpt2": Family(
        "GPT2",
        {
            "hidden_size": "n_embd",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
        },
        {
            **_TIED,
            "activation_function": _SOFT,
            "scale_attn_weights": _BOOL,
            "scale_attn_by_inverse_layer_idx": _BOOL,
            "reorder_and_upcast_attn": _BOOL,
        },
        decoder=True,
    ),
    "gpt_neox": Family(
        "GPTNeoX",
        {},
        {**_TIED, **_ROTATED, "hidden_act": _SOFT, "use_parallel_residual": _BOOL, "attention_bias": _BOOL},
        decoder=True,
    ),
    "llama": Family(
        "Llama",
        {},
        {**_LLAMA, "attention_bias": _BOOL, "mlp_bias": _BOOL},
        decoder=True,
        grouped=True,
        own_head_size=True,
    ),
    "mistral": Family(
        "Mistral",
        {},
        {**_LLAMA, "sliding_window": st.sampled_from([None, 2, 5])},
        decoder=True,
        grouped=True,
        own_head_size=True,
    ),
    "qwen2": Family("Qwen2", {}, _LLAMA, decoder=True, grouped=True),
    "qwen3": Family("Qwen3", {}, {**_LLAMA, "attention_bias": _BOOL}, decoder=True, grouped=True, own_head_size=True),
    "phi": Family("Phi", {}, {**_LLAMA, **_ROTATED, "qk_layernorm": _BOOL}, decoder=True, grouped=True),
}


def heads_of(family: str) -> tuple[str, ...]:
    """Endings of the names of the classes that a family is drawn with."""
    if not FAMILIES[family].decoder:
        return ("ForSequenceClassification", "ForQuestionAnswering", "Model")
    return ("LMHeadModel" if family == "gpt2" else "ForCausalLM", "ForSequenceClassification", "Model")


def draw_arguments(data: st.DataObject, family: str) -> dict[str, Any]:
    """Keyword arguments of a configuration."""
    kind = FAMILIES[family]
    heads = data.draw(st.integers(1, 4), "heads")
    head_size = data.draw(st.sampled_from([4, 8] if "partial_rotary_factor" in kind.extras else [2, 4, 6]), "head size")
    sizes: dict[str, Any] = {
        "hidden_size": heads * head_size,
        "num_attention_heads": heads,
        "num_hidden_layers": data.draw(st.integers(1, 3), "blocks"),
        "intermediate_size": data.draw(st.integers(1, 24), "neurons"),
        "max_position_embeddings": 2 * LONGEST,
    }
    arguments = {kind.names.get(key, key): value for key, value in sizes.items()}
    arguments |= {name: data.draw(strategy, name) for name, strategy in kind.extras.items()}
    arguments |= {"vocab_size": VOCABULARY, "pad_token_id": 1}
    if kind.decoder:
        arguments |= {"bos_token_id": 2, "eos_token_id": 3}
    if kind.grouped:
        shared = [count for count in range(1, heads + 1) if heads % count == 0]
        arguments["num_key_value_heads"] = data.draw(st.sampled_from(shared), "key and value heads")
    if kind.own_head_size:
        arguments["head_dim"] = data.draw(st.sampled_from([n for n in (2, 4, 6) if n <= heads * head_size]), "head_dim")
    if family == "opt":
        arguments["word_embed_proj_dim"] = data.draw(st.sampled_from([heads * head_size, 4]), "word_embed_proj_dim")
    if family == "gpt2" and data.draw(_BOOL, "default width"):
        arguments["n_inner"] = None
    return arguments


def draw_model(data: st.DataObject, family: str, dtypes: Sequence[torch.dtype]) -> PreTrainedModel:
    """A model with random weights, biases and norms included; global generators are left as they were."""
    arguments = draw_arguments(data, family)
    head = data.draw(st.sampled_from(heads_of(family)), "head")
    arguments["num_labels"] = 2 if head == "ForQuestionAnswering" else data.draw(st.integers(1, 3), "labels")
    dtype = data.draw(st.sampled_from(dtypes), "dtype")
    # Eager attention in float64 gives NaN in rows that see padding only: its mask is -infinity in float32.
    attention = "sdpa" if dtype == torch.float64 else data.draw(st.sampled_from(["eager", "sdpa"]), "attention")
    seed = data.draw(st.integers(0, 2**31), "weights")
    stem = FAMILIES[family].stem
    state = random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = getattr(transformers, f"{stem}Config")(**arguments, attn_implementation=attention)
        model = getattr(transformers, f"{stem}{head}")._from_config(config, dtype=dtype)  # as a loaded one: tables stay
        with torch.no_grad():
            for parameter in model.parameters():
                around = 1.0 if parameter.ndim == 1 and parameter.std(correction=0) == 0 and parameter[0] == 1 else 0.0
                parameter.normal_(around, 0.3)
    random.setstate(state)
    made: PreTrainedModel = model.eval()
    return made


def draw_batches(data: st.DataObject, *, most: int = 3, left: bool = True) -> list[Batch]:
    """Calibration examples: few or none repeated, one token or several, padded on either side."""
    draw = random.Random(data.draw(st.integers(0, 2**31), "tokens"))
    longest = data.draw(st.integers(1, LONGEST), "longest")
    repeated = data.draw(_BOOL, "repeated examples")
    padded_left = left and data.draw(_BOOL, "padding on the left")
    counts = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=most), "examples of each batch")
    fixed = [draw.randrange(4, VOCABULARY) for _ in range(longest)]
    batches = []
    for count in counts:
        rows = [
            fixed if repeated else [draw.randrange(4, VOCABULARY) for _ in range(draw.randint(1, longest))]
            for _ in range(count)
        ]
        width = max(map(len, rows))
        padding = [[1] * (width - len(row)) for row in rows]
        ids = [pad + row if padded_left else row + pad for row, pad in zip(rows, padding, strict=True)]
        batches.append({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(ids) != 1})
    return [{name: tensor.long() for name, tensor in batch.items()} for batch in batches]


@dataclass(frozen=True)
class Cut:
    """What one block shall keep.

    Attributes:
        heads: Indices, ascending.
        neurons: Indices, ascending.
        queries: Entries of every query and key vector that stay.
        values: Entries of every value vector that stay.
    """

    heads: list[int]
    neurons: list[int]
    queries: list[int]
    values: list[int]


def draw_cuts(data: st.DataObject, views: Sequence[LayerView]) -> list[Cut]:
    """For each block what it keeps, at least one of everything; sometimes the same sizes for all of them."""
    draw = random.Random(data.draw(st.integers(0, 2**31), "kept"))
    alike = data.draw(_BOOL, "all alike")
    cuts: list[Cut] = []
    sizes = (0, 0, 0, 0)
    for view in views:
        if not (alike and cuts):
            parts = narrowable(view)
            full = {QUERIES: view.query_width, VALUES: view.value_width}
            narrow = [
                data.draw(st.integers(1, width), part) if part in parts else width for part, width in full.items()
            ]
            heads = data.draw(st.integers(1, view.heads), "kept heads")
            sizes = (heads, data.draw(st.integers(1, view.neurons), "kept neurons"), narrow[0], narrow[1])
        full_sizes = (view.heads, view.neurons, view.query_width, view.value_width)
        cuts.append(Cut(*[sorted(draw.sample(range(n), k)) for n, k in zip(full_sizes, sizes, strict=True)]))
    return cuts


def _entries(units: list[int], width: int, kept: list[int], each: int = 1) -> Tensor:
    """Of units that are ``each`` vectors of a width, some entries of every vector."""
    vectors = unit_columns(torch.tensor(units), each)
    return (vectors[:, None] * width + torch.tensor(kept)).reshape(-1)


def apply_cut(view: LayerView, cut: Cut) -> LayerSize:
    """Make a block smaller, in place, by leaving out rows and columns; gives its new size."""
    attention, feed_forward = view.architecture.attention, view.architecture.feed_forward
    neurons, heads = torch.tensor(cut.neurons), torch.tensor(cut.heads)
    if attention.fused:
        rows = view.head_rows(heads)
    else:
        rows = {
            attention.query: _entries(cut.heads, view.query_width, cut.queries, view.queries),
            attention.key: _entries(cut.heads, view.query_width, cut.queries),
            attention.value: _entries(cut.heads, view.value_width, cut.values),
        }
    rows |= dict.fromkeys(feed_forward.inputs, neurons)
    filling = {path: Weights.rows(view.linear(path), kept) for path, kept in rows.items()}
    columns = {
        attention.output: _entries(cut.heads, view.value_width, cut.values, view.queries),
        feed_forward.output: neurons,
    }
    for path, kept in columns.items():
        linear = view.linear(path)
        filling[path] = Weights(linear.weight[:, kept], linear.bias)
    size = sized(
        layer_sizes([view])[0],
        heads=len(cut.heads),
        neurons=len(cut.neurons),
        query_width=len(cut.queries),
        value_width=len(cut.values),
    )
    rebuild(view, size, filling)
    return size


@torch.no_grad()
def masked(model: PreTrainedModel, cuts: Sequence[Cut]) -> PreTrainedModel:
    """A copy of the same size in which what a cut takes away counts for nothing."""
    copied = copy.deepcopy(model)
    for view, cut in zip(layer_views(copied), cuts, strict=True):
        attention, feed_forward = view.architecture.attention, view.architecture.feed_forward
        every = list(range(view.heads))
        if not attention.fused:
            for path, each in ((attention.query, view.queries), (attention.key, 1)):
                linear = view.linear(path)
                gone = torch.ones(linear.out_features, dtype=torch.bool)
                gone[_entries(every, view.query_width, cut.queries, each)] = False
                linear.weight[gone] = 0
                if linear.bias is not None:
                    linear.bias[gone] = 0
        columns = {
            attention.output: _entries(cut.heads, view.value_width, cut.values, view.queries),
            feed_forward.output: torch.tensor(cut.neurons),
        }
        for path, kept in columns.items():
            linear = view.linear(path)
            gone = torch.ones(linear.in_features, dtype=torch.bool)
            gone[kept] = False
            linear.weight[:, gone] = 0
    return copied
