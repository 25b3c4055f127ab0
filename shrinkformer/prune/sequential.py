"""Refit smaller blocks one after the other, each to what the earlier ones have become.

A block of the pruned model sees other inputs than that of the dense model. Every linear layer is fitted to give, on
those inputs, what the dense model computes in its place; the last layer of a sublayer also makes up for what the
residual stream has lost before it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shrinkformer.architectures import LayerView, Projection, layer_views
from shrinkformer.prune.budget import layer_sizes
from shrinkformer.prune.passes import BlockPasses, DensePass
from shrinkformer.prune.regression import Fit, Sums, ridge_regression
from shrinkformer.prune.resume import WeightFiles
from shrinkformer.prune.sensitivity import ATTENTION, FEED_FORWARD, Sensitivity
from shrinkformer.prune.sites import Site, block_sites
from shrinkformer.prune.statistics import Batches, Progress
from shrinkformer.prune.stream import BlockStream
from shrinkformer.utils.parallel import ALONE, Workers


@dataclass(frozen=True)
class RefitErrors:
    """Relative errors of a block's two sublayers on the calibration examples, residual stream included, 0 to 1."""

    attention: float
    feed_forward: float


@torch.no_grad()
def refit_blocks(
    model: PreTrainedModel,
    blocks: Sequence[LayerView],
    batches: Batches,
    sensitivity: Sensitivity,
    *,
    workers: Workers = ALONE,
    progress: Progress = iter,
    finished: WeightFiles | None = None,
) -> list[RefitErrors]:
    """Refit all linear layers of smaller blocks, first to last; in place.

    Args:
        model: The dense model.
        blocks: Smaller versions of its blocks.
        batches: Examples of all workers.
        sensitivity: How much each token counts.
        workers: Share the examples; all of them get the same weights.
        progress: Wraps the loop over the blocks.
        finished: Keeps refitted blocks on disk, and gives back those of an interrupted run.

    Source:
        Errors of earlier layers as part of the target: Park et al., K-prune, arXiv 2308.03449, section 3.4. Here
        producers are refitted as well, tokens are weighed, and every fit is held towards what it replaces.
    """
    share = workers.share(batches)
    dense_stream, stream = BlockStream(model, share), BlockStream(model, share)
    sites = block_sites(blocks[0].architecture)
    errors = []
    dense_views = layer_views(model)
    first = _first_changed(dense_views, blocks)
    for view in progress(blocks):
        dense_view = dense_views[view.index]
        if view.index < first:
            dense_stream.run(dense_view.block)
            stream.run(view.block)
            errors.append(RefitErrors(0.0, 0.0))
            continue
        if finished is not None and workers.broadcast(finished.holds(view.index)):
            errors.append(_take_up(view, finished))
            dense_stream.run(dense_view.block)
            stream.run(view.block)
            continue
        dense, passes = DensePass(dense_stream, dense_view, sites), BlockPasses(stream, view)
        found = {}
        for site in sites:
            if site.residual or view.index > first:  # what goes into the first changed block is as it was
                found[site] = _refit(site, passes, dense, sensitivity, workers)
        passes.advance()
        attention, feed_forward = (found[site].error for site in sites if site.residual)
        errors.append(RefitErrors(attention, feed_forward))
        if finished is not None:
            if workers.is_main:
                finished.write(view.index, view.block.state_dict(), asdict(errors[-1]))
            workers.barrier()
    return errors


def _take_up(view: LayerView, finished: WeightFiles) -> RefitErrors:
    tensors, numbers = finished.read(view.index, view.attention_output.weight.device)
    view.block.load_state_dict(tensors)
    return RefitErrors(**numbers)


def _first_changed(dense: Sequence[LayerView], blocks: Sequence[LayerView]) -> int:
    """The first block whose size is not that of the dense one; how many there are if there is none."""
    sizes = zip(layer_sizes(dense), layer_sizes(blocks), strict=True)
    return next((index for index, (before, after) in enumerate(sizes) if before != after), len(blocks))


def _refit(site: Site, passes: BlockPasses, dense: DensePass, sensitivity: Sensitivity, workers: Workers) -> Fit:
    """Refit the layers of a site, which share their input and are fitted at once."""
    view = passes.view
    linears = [view.linear(path) for path in site.paths]
    prior = torch.cat([linear.weight.double() for linear in linears]).T
    attention = site.paths[0] in {*view.architecture.attention.producers, view.architecture.attention.output}
    sublayer = view.index, ATTENTION if attention else FEED_FORWARD
    intercept = all(linear.bias is not None for linear in linears)
    halves: list[Sums] = []
    for index in range(len(passes.stream)):
        if site.residual:
            x, y = _ending(site, passes, dense, index)
        else:
            x, y = passes.inputs(site.paths[0], index), _outputs(linears, dense.inputs(site, index))
        halves = halves or _empty_halves(prior, x, y, workers, intercept)
        weights = sensitivity.token_weights(sublayer, index, x)
        cut = len(x) // 2  # examples lie one after the other, so no example but one is in both halves
        for half, part in zip(halves, (slice(cut), slice(cut, None)), strict=True):
            half.update(x[part], y[part], weights[part])
    halves = halves or _empty_halves(prior, prior.T[:0], prior[:0], workers, intercept)  # this worker has no examples
    for half in halves:
        half.all_reduce(workers)
    fit = ridge_regression(halves, prior, intercept=intercept)
    _write(linears, fit)
    return fit


def _empty_halves(prior: Tensor, x: Tensor, y: Tensor, workers: Workers, intercept: bool) -> list[Sums]:
    """Sums of no tokens yet; their origin is about where the first inputs and outputs of all workers lie."""
    first = torch.cat([x.sum(0, dtype=torch.float64), y.sum(0, dtype=torch.float64), x.new_tensor([len(x)]).double()])
    workers.sum_(first)
    means = first[:-1] / first[-1].clamp(min=1)
    origin = (means[: len(prior)], means[len(prior) :]) if intercept else None
    return [Sums(prior.shape[0], prior.shape[1], prior.device, origin) for _ in range(2)]


def _ending(site: Site, passes: BlockPasses, dense: DensePass, index: int) -> tuple[Tensor, Tensor]:
    """Of the layer that ends a sublayer: inputs, and wanted outputs with bias."""
    bias = passes.view.linear(site.paths[0]).bias  # not refitted yet: that of the dense layer
    x, residual = passes.ending(site, index)
    output, dense_residual = dense.wanted(site, index)
    wanted = output + dense_residual - residual
    return x, wanted if bias is None else wanted + bias


def _outputs(linears: Sequence[Projection], rows: Tensor) -> Tensor:
    """What layers make of the dense model's rows."""
    parts = [torch.nn.functional.linear(rows, linear.weight, linear.bias) for linear in linears]
    return torch.cat(parts, dim=1)


def _write(linears: Sequence[Projection], fit: Fit) -> None:
    sizes = [linear.out_features for linear in linears]
    weights, biases = torch.split(fit.weight.T, sizes), torch.split(fit.bias, sizes)
    for linear, weight, bias in zip(linears, weights, biases, strict=True):
        linear.weight.copy_(weight)
        if linear.bias is not None:
            linear.bias.copy_(bias)
