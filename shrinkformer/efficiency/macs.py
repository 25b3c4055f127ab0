"""Multiply-accumulate operations (MACs): the currency of the pruning budget.

The formula is that of Kwon et al., "A Fast Post-Training Pruning Framework for Transformers" (arXiv 2204.09656): only
what pruning can remove is counted, that is the attention projections, the two products with the attention matrix, and
the feed-forward layers. Embeddings, pooler, classifier, norms and biases are left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shrinkformer.errors import UnsupportedModelError
from shrinkformer.utils.modes import evaluation_mode


def head_macs(sequence_length: float, hidden_size: int, head_size: int, queries: int = 1) -> float:
    """MACs of one attention head for one sequence: 4 L d dh (query, key, value, output) + 2 L^2 dh (scores, context).

    Args:
        sequence_length: L, tokens; a mean over a data set may be fractional.
        hidden_size: d, width of the residual stream.
        head_size: dh, width of the head.
        queries: g, query heads that share the key and the value; the group of them counts as one head with
            (2 + 2 g) L d dh + 2 g L^2 dh MACs.

    >>> head_macs(128, 768, 64)
    27262976
    """
    return attention_macs(sequence_length, hidden_size, LayerSize(1, head_size, neurons=0, queries=queries))


def attention_macs(sequence_length: float, hidden_size: int, layer: "LayerSize") -> float:
    """MACs of one layer's attention for one sequence.

    Queries and keys of width ``q`` and values of width ``v`` per head cost ``L d (1 + g) (q + v)``; both products with
    the attention matrix are as wide as the wider of the two, ``2 g L^2 max(q, v)``, because the narrower is padded.

    Args:
        sequence_length: L, tokens.
        hidden_size: d, width of the residual stream.
        layer: Sizes of the layer; g is the number of queries that share a key and a value.
    """
    widths, queries = (layer.query_width, layer.value_width), layer.queries
    projections = (1 + queries) * sequence_length * hidden_size * sum(widths)
    return layer.heads * (projections + 2 * queries * sequence_length**2 * max(widths))


def neuron_macs(sequence_length: float, hidden_size: int, gated: bool = False) -> float:
    """MACs of one feed-forward neuron for one sequence: 2 L d (in, out), 3 L d with a gate.

    Args:
        sequence_length: L, tokens.
        hidden_size: d, width of the residual stream.
        gated: whether the neuron has a gate, as in Llama.

    >>> neuron_macs(128, 768)
    196608
    """
    return (3 if gated else 2) * sequence_length * hidden_size


@dataclass(frozen=True)
class LayerSize:
    """What one transformer layer keeps.

    Attributes:
        heads: Attention heads; with grouped queries, of keys and values.
        head_size: Width of a head.
        neurons: Feed-forward neurons.
        gated: Whether a neuron has a gate.
        queries: Query heads that share a key and a value head.
        query_width: Width of a head's queries and keys; 0 stands for ``head_size``.
        value_width: Width of a head's values; 0 stands for ``head_size``.
    """

    heads: int
    head_size: int
    neurons: int
    gated: bool = False
    queries: int = 1
    query_width: int = 0
    value_width: int = 0

    def __post_init__(self) -> None:
        for name in ("query_width", "value_width"):
            object.__setattr__(self, name, getattr(self, name) or self.head_size)


def model_macs(layers: Sequence[LayerSize], hidden_size: int, sequence_length: float) -> float:
    """MACs of all layers for one sequence.

    Args:
        layers: sizes of each layer; they may differ.
        hidden_size: d, width of the residual stream.
        sequence_length: L, tokens.

    >>> model_macs([LayerSize(heads=12, head_size=64, neurons=3072)] * 12, 768, 128) / 1e9  # BERT-base
    11.173625856
    """
    return sum(
        attention_macs(sequence_length, hidden_size, layer)
        + layer.neurons * neuron_macs(sequence_length, hidden_size, layer.gated)
        for layer in layers
    )


def step_macs(layers: Sequence[LayerSize], hidden_size: int, context: float) -> float:
    """MACs of all layers for one more token of a sequence whose keys and values are cached.

    Args:
        layers: Sizes of each layer.
        hidden_size: d, width of the residual stream.
        context: Tokens that it attends to, itself included.

    >>> step_macs([LayerSize(heads=12, head_size=64, neurons=3072)] * 12, 768, context=1024) / 1e6  # GPT-2
    103.809024
    """
    total = 0.0
    for layer in layers:
        widths = layer.query_width, layer.value_width
        projections = (1 + layer.queries) * hidden_size * sum(widths)
        total += layer.heads * (projections + 2 * layer.queries * context * max(widths))
        total += layer.neurons * neuron_macs(1, hidden_size, layer.gated)
    return total


def count_matmul_macs(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> int:
    """Count the MACs of the matrix products that a forward pass really does inside the transformer layers.

    Independent of :func:`model_macs`: PyTorch's operator counter sees every product, whatever the code looks like. The
    layers are the model's outermost ``nn.ModuleList``s (so embeddings, pooler and classifier stay outside). Fused
    attention is taken apart for the count, so eager and sdpa models give the same figure; flash and flex kernels that a
    model calls by itself are not seen.

    Args:
        model: a transformers model; its training mode is restored.
        batch: keyword arguments of the model, tensors of shape (examples, tokens); padded tokens count.

    Returns:
        MACs of the whole batch: ``examples`` times the figure of one sequence.

    Raises:
        UnsupportedModelError: the model has no ``nn.ModuleList`` of layers.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if not outermost:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no nn.ModuleList of layers; pass the transformers model itself, not a wrapper"
        )
    counter = FlopCounterMode(display=False)
    with evaluation_mode(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(**batch)
    flops = sum(
        sum(operators.values())
        for name, operators in counter.get_flop_counts().items()
        if _is_child_of(name, outermost)
    )
    return int(flops) // 2


def _is_child_of(counted: str, lists: Sequence[str]) -> bool:
    """Whether a counter's name, ``ClassName.path.to.layers.3``, is a direct child of one of the named lists."""
    path = counted.partition(".")[2]
    return path.rpartition(".")[0] in lists
