"""Heads and neurons under masks: what scaling one of them would do to a loss, and what taking some away leaves."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shrinkformer.architectures import LayerView, Projection, layer_views, unit_columns
from shrinkformer.prune.budget import CostModel, Counts
from shrinkformer.prune.fisher import frozen
from shrinkformer.prune.passes import BlockPasses, DensePass
from shrinkformer.prune.plan import LayerPlan, Plan
from shrinkformer.prune.refit import slice_consumer
from shrinkformer.prune.regression import Sums
from shrinkformer.prune.sites import Site, block_sites
from shrinkformer.prune.statistics import Batches, Progress
from shrinkformer.prune.stream import BlockStream
from shrinkformer.prune.surgery import remove_heads, remove_neurons
from shrinkformer.utils.inputs import call, model_inputs
from shrinkformer.utils.parallel import Workers

Loss = Callable[[Any, int], Tensor]
"""From a model's output and the index of the batch, summed over the examples."""


@dataclass(frozen=True)
class Part:
    """The heads or the neurons of one block.

    Attributes:
        view: The block.
        site: Of the layer that consumes them.
    """

    view: LayerView
    site: Site

    @property
    def heads(self) -> bool:
        """Whether these are heads."""
        return self.site.residual == "input"

    @property
    def consumer(self) -> Projection:
        """The layer that ends the sublayer."""
        return self.view.linear(self.site.paths[0])

    @property
    def width(self) -> int:
        """Inputs of the consumer that belong to one of them."""
        return self.view.head_width if self.heads else 1

    @property
    def units(self) -> int:
        """How many there are."""
        return self.view.heads if self.heads else self.view.neurons

    def remove_all_but(self, kept: Tensor) -> None:
        """Make the block smaller, in place; the consumer keeps its weights for ``kept``, ``(units,)`` int64."""
        kept = kept.to(self.consumer.weight.device)
        consumer = slice_consumer(self.consumer, unit_columns(kept, self.width))
        (remove_heads if self.heads else remove_neurons)(self.view, kept, consumer)


def parts_of(views: Sequence[LayerView]) -> list[Part]:
    """Heads and neurons of all blocks, in the order in which data passes them."""
    return [Part(view, site) for view in views for site in block_sites(view.architecture) if site.residual]


@dataclass(frozen=True)
class Gradients:
    """Of one batch.

    Attributes:
        masks: For each part, the gradient of each example's loss in its mask at one, ``(examples, units)``.
        inputs: For each part, what its consumer saw, ``(examples, length, inputs)``; padding included.
    """

    masks: list[Tensor]
    inputs: list[Tensor]


def mask_gradients(model: PreTrainedModel, parts: Sequence[Part], batches: Batches, loss: Loss) -> Iterator[Gradients]:
    """Send gradients of a loss back to masks that multiply heads and neurons; one backward pass for each batch.

    Every example has masks of its own, so that the gradients of its loss alone are known.

    Args:
        model: In evaluation mode, in memory as a whole; nothing is changed.
        parts: Of the model. Gradients go no further back than the first of them.
        batches: Model inputs.
        loss: See above; of each example by itself.
    """
    for index, batch in enumerate(batches):
        inputs = model_inputs(model, batch)
        examples = len(batch["attention_mask"])
        masks = [part.consumer.weight.new_ones(examples, part.units, requires_grad=True) for part in parts]
        modules = {part.consumer.module: (part, mask) for part, mask in zip(parts, masks, strict=True)}
        with frozen(model), torch.enable_grad():
            with _scaled(modules) as seen:
                output = call(model, inputs)
            found = torch.autograd.grad(loss(output, index), masks)
        yield Gradients(list(found), [seen[part.consumer.module] for part in parts])


@contextmanager
def _scaled(masks: Mapping[nn.Module, tuple[Part, Tensor]]) -> Iterator[dict[nn.Module, Tensor]]:
    """Multiply what goes into modules by masks, and record it as it was."""
    seen: dict[nn.Module, Tensor] = {}

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        given, *rest = args
        part, mask = masks[module]
        by_example = given.reshape(len(mask), -1, given.shape[-1])  # OPT flattens examples and positions
        seen[module] = by_example.detach()
        return (
            given * mask.repeat_interleave(part.width, 1)[:, None].expand_as(by_example).reshape(given.shape),
            *rest,
        )

    with ExitStack() as stack:
        for module in masks:
            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield seen


def paired_blocks(
    model: PreTrainedModel, views: Sequence[LayerView], batches: Batches, progress: Progress
) -> Iterator[tuple[list[Part], DensePass, BlockPasses]]:
    """Blocks of a pruned model beside those of the dense one, first to last, on the inputs that each of them sees.

    A block may be changed while it is handed out; its inputs are what the blocks before have become.

    Args:
        model: The dense model.
        views: The blocks of the pruned model.
        batches: Examples of this worker.
        progress: Wraps the loop over the blocks.
    """
    dense_stream, stream, dense_views = BlockStream(model, batches), BlockStream(model, batches), layer_views(model)
    for view in progress(views):
        parts = parts_of([view])
        dense = DensePass(dense_stream, dense_views[view.index], tuple(part.site for part in parts))
        passes = BlockPasses(stream, view)
        yield parts, dense, passes
        passes.advance()


@torch.no_grad()
def wanted_outputs(part: Part, passes: BlockPasses, dense: DensePass, workers: Workers) -> Sums:
    """Sums for fitting a consumer in the pruned model.

    Args:
        part: Of the pruned model.
        passes: Through its block.
        dense: The dense model's pass through that block.
        workers: Share the examples; all of them get the same sums.

    Returns:
        Of the consumer's inputs, and of what it has to add to the residual stream, its bias aside, to make that the
        dense model's.
    """
    consumer = part.consumer
    sums = Sums(consumer.in_features, consumer.out_features, consumer.weight.device)
    for index in range(len(passes.stream)):
        x, residual = passes.ending(part.site, index)
        output, dense_residual = dense.wanted(part.site, index)
        sums.update(x, output + dense_residual - residual, torch.ones_like(x[:, 0]))
    sums.all_reduce(workers)
    return sums


def relative_error(sums: Sums, weight: Tensor) -> float:
    """Of the output that a weight ``(inputs, outputs)`` makes, 0 to about 1 after a fit."""
    square = float(sums.square)
    return max(0.0, 1 + sums.centred(intercept=False).loss(weight) / square) ** 0.5 if square > 0 else 0.0


def plan_of(method: str, costs: CostModel, seed: int, kept: Sequence[Sequence[int]], errors: Sequence[float]) -> Plan:
    """The plan of a pruned model, from what stays of each part, ascending, and the relative errors of the sublayers."""
    heads, neurons = kept[::2], kept[1::2]
    counts = Counts(tuple(map(len, heads)), tuple(map(len, neurons)))
    each = zip(heads, neurons, errors[::2], errors[1::2], strict=True)
    layers = [LayerPlan(tuple(some), tuple(others), first, second) for some, others, first, second in each]
    return Plan(
        method=method,
        mu=costs.budget.mu,
        seed=seed,
        sequence_length=costs.budget.sequence_length,
        dense_macs=costs.dense,
        macs=costs.macs(counts),
        layers=tuple(layers),
    )
