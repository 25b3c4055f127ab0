"""Make a block really smaller."""

from collections.abc import Mapping

import torch
from torch import Tensor

from shrinkformer.architectures import LayerView
from shrinkformer.prune.pruned_modeling import set_block_sizes
from shrinkformer.prune.refit import Consumer


@torch.no_grad()
def remove_heads(view: LayerView, kept: Tensor, consumer: Consumer) -> None:
    """Remove the heads of a block that are not kept; in place.

    Args:
        view: The block.
        kept: Indices of the heads that stay, ``(heads,)`` int64.
        consumer: Weights of the output projection for the heads that stay.
    """
    output = view.architecture.attention.output
    _rebuild(view, len(kept), view.neurons, view.head_rows(kept), {output: consumer})


@torch.no_grad()
def remove_neurons(view: LayerView, kept: Tensor, consumer: Consumer) -> None:
    """Remove the neurons of a block that are not kept; in place.

    Args:
        view: The block.
        kept: Indices of the neurons that stay, ``(neurons,)`` int64.
        consumer: Weights of the second feed-forward layer for the neurons that stay.
    """
    feed_forward = view.architecture.feed_forward
    _rebuild(view, view.heads, len(kept), dict.fromkeys(feed_forward.inputs, kept), {feed_forward.output: consumer})


def _rebuild(
    view: LayerView, heads: int, neurons: int, rows: Mapping[str, Tensor], consumers: Mapping[str, Consumer]
) -> None:
    """Resize a block as the checkpoint loader does, then fill every layer with its old or new weights."""
    record = view.architecture
    paths = (*record.attention.producers, record.attention.output, *record.feed_forward.inputs)
    filled: dict[str, tuple[Tensor, Tensor | None]] = {}
    widths = view.query_width, view.value_width
    for path in (*paths, record.feed_forward.output):
        linear = view.linear(path)
        if path in consumers:
            filled[path] = consumers[path].weight, consumers[path].bias
        elif path in rows:
            kept = rows[path].to(linear.weight.device)
            filled[path] = linear.weight[kept], None if linear.bias is None else linear.bias[kept]
        else:
            filled[path] = linear.weight, linear.bias
    set_block_sizes(
        view.block, record.to_dict(), heads=heads, neurons=neurons, query_width=widths[0], value_width=widths[1]
    )
    for path, (weight, bias) in filled.items():
        linear = view.linear(path)
        linear.weight.copy_(weight)
        if linear.bias is not None and bias is not None:
            linear.bias.copy_(bias)
