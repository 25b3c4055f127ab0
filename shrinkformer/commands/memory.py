"""How much memory a run takes, and how much there is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import psutil
import torch
from transformers import PreTrainedModel

from shrinkformer.architectures import LayerView, layer_views
from shrinkformer.efficiency.macs import neuron_macs
from shrinkformer.efficiency.size import count_parameters
from shrinkformer.prune.damage import KEPT_NUMBERS, TOKENS
from shrinkformer.prune.levels import REMEMBERED

GIB = 2**30

_FLOAT32, _FLOAT64 = 4, 8

_SLACK = 1.75
"""Of what was measured (2.4 GiB for MiniLM) to the sum: the allocator keeps more than is in use."""

_QUANTIZING_COPIES = 9
"""Rows as wide as a hidden state: those of both models, six kinds from the dense block, and attention's result."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that a run takes beside Python and the libraries.

    Attributes:
        resident: With the model, a pruned copy of it, all second moments and all hidden states in memory.
        streamed: With one block in memory, the moments of one block, and no hidden states: independent of the number
            of blocks and of examples.
        spilled: On disk then, in the worst case: moments of all blocks and hidden states of all examples.
    """

    resident: int
    streamed: int
    spilled: int

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokens: int,
        batch_size: int,
        length: float,
        dtype: torch.dtype = torch.float32,
        *,
        quantizes: bool = False,
        shrinks: bool = False,
    ) -> Self:
        """Predict from shapes.

        Args:
            model: A model; it needs no weights.
            tokens: Calibration tokens.
            batch_size: Examples per forward pass.
            length: Their length in tokens.
            dtype: Of weights and hidden states.
            quantizes: Blocks are quantized, too.
            shrinks: Blocks are pruned by our own method.
        """
        views, size = layer_views(model), dtype.itemsize
        blocks = [block_weights(view.heads, view.neurons, view) for view in views]
        weights = count_parameters(model)
        outside = weights - sum(blocks)
        moments = [_FLOAT64 * (view.neurons**2 + view.attention_output.in_features**2) for view in views]
        hidden = size * tokens * views[0].hidden_size
        # A pivoted Cholesky factorisation and a refit hold the moments, a factor and copies of both.
        working = 3 * max(moments)
        copies = 2
        if quantizes:
            # Moments of two halves and their sum, and as many cross moments with what two parts of outputs lack.
            cross = _FLOAT64 * views[0].hidden_size * max(view.neurons for view in views)
            working = max(working, 6 * max(moments) + 6 * cross)
            copies = _QUANTIZING_COPIES
        logits = model.config.vocab_size if model.get_output_embeddings() is not None else 0
        widest = max(logits, 4 * max(view.neurons for view in views))
        activations = int((size + _FLOAT32) * batch_size * length * widest)
        resident = 2 * size * weights + sum(moments) + working + copies * hidden + activations
        if shrinks:
            resident = int(_SLACK * (resident + _measured(views, weights, tokens, int(batch_size * length), logits)))
        return cls(
            resident=resident,
            # A block as read, its copy to prune, and a file of finished blocks.
            streamed=size * (outside + 3 * max(blocks)) + max(moments) + working + activations // batch_size,
            spilled=sum(moments) + copies * hidden,
        )


def _measured(views: Sequence[LayerView], weights: int, tokens: int, batch_tokens: int, vocabulary: int) -> int:
    """What our own method keeps beside all that: other versions of the model, and what they do to the examples."""
    hidden, width = views[0].hidden_size, max(view.neurons for view in views)
    blocks = [block_weights(view.heads, view.neurons, view) for view in views]
    models = 4 * _FLOAT32 * weights  # two plans, the method they must beat, and the best with what was set aside
    levels = REMEMBERED * _FLOAT64 * sum(blocks)
    entrances = _FLOAT32 * min(tokens, TOKENS) * hidden * (len(views) + 1)
    targets = _FLOAT32 * min(tokens * vocabulary, KEPT_NUMBERS)
    sums = 3 * _FLOAT64 * (width**2 + 2 * width * hidden)
    gradients = _FLOAT32 * batch_tokens * len(views) * (10 * hidden + 2 * width)
    return int(models + levels + entrances + targets + max(sums, gradients))


def block_weights(heads: int, neurons: int, view: LayerView) -> int:
    """Weights of the linear layers of a block that keeps so many heads and neurons; biases and norms are left out."""
    head = (1 + view.queries) * view.hidden_size * (view.query_width + view.value_width)
    return int(heads * head + neurons * neuron_macs(1, view.hidden_size, view.architecture.feed_forward.gated))


def available_bytes(device: str) -> int:
    """Memory that is free on a device."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
