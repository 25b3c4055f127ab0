"""Orders of a block's heads and neurons, most useful first."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shrinkformer.architectures import LayerView, Projection
from shrinkformer.prune.elimination import eliminate
from shrinkformer.prune.interpolative import group_order, pivoted_cholesky, schur_group_errors
from shrinkformer.prune.moments import Moments


@dataclass(frozen=True)
class Ranking:
    """An order of the heads or neurons of one sublayer.

    Attributes:
        order: Indices, most useful first, ``(units,)``.
        scores: What each position adds, non-increasing, ``(units,)``.
        tails: Error of the sublayer's output when the first ``k`` are kept, at ``k``, ``(units + 1,)``.
    """

    order: NDArray[np.int64]
    scores: NDArray[np.float64]
    tails: NDArray[np.float64]


def gram(moments: Moments, centred: bool) -> Tensor:
    """Second moments of a consumer's input, ``(n, n)`` float64: about the mean, or about zero."""
    return moments.covariance() if centred else moments.second


def rank_neurons_by_pivots(view: LayerView, moments: Moments, centred: bool) -> Ranking:
    """Neurons in the order of a column-pivoted QR of their activations, weighted by what the consumer makes of them.

    Source:
        STAT, arXiv 2406.00061: columns are scaled by the norm of the consumer's weights before the pivoted QR; the
        score of a neuron is its entry on the diagonal of R.
    """
    weights = view.feed_forward_output.weight.double().norm(dim=0)
    factor = pivoted_cholesky(gram(moments, centred), weights=weights)
    missing = view.neurons - factor.rank  # columns that the chosen ones explain fully
    return Ranking(
        order=factor.order.cpu().numpy(),
        scores=np.pad(factor.diagonal.cpu().numpy(), (0, missing)),
        tails=np.sqrt(np.pad(factor.residual.cpu().numpy().clip(min=0), (0, missing))),
    )


def rank_heads_by_pivots(view: LayerView, moments: Moments, centred: bool) -> Ranking:
    """Heads in the order of a pivoted QR of whole heads, scored by what the block's output loses without the rest.

    Source:
        STAT's published code: the order comes from the context laid out as (tokens x head size, heads); the score of a
        position is the norm of what the heads before it cannot explain, multiplied by the consumer's weights.
    """
    second = gram(moments, centred)
    order = group_order(second, view.head_width)
    tails = schur_group_errors(second, order, view.head_width, view.attention_output.weight.double().T)
    errors = np.asarray(tails.cpu())
    return Ranking(order=order.cpu().numpy(), scores=errors[:-1], tails=errors)


def _by_score(scores: Tensor) -> Ranking:
    """Rank by a score alone; its tail is what is left of the scores' squares."""
    values, order = torch.sort(scores.double().cpu(), descending=True, stable=True)
    tail = torch.cat([values.square().flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)]).sqrt()
    return Ranking(order.numpy(), values.numpy(), tail.numpy())


def rank_neurons_by_magnitude(view: LayerView) -> Ranking:
    """Neurons by the product of the norms of the weights that make and consume them."""
    score = view.feed_forward_output.weight.double().norm(dim=0)
    for path in view.architecture.feed_forward.inputs:
        score = score * view.linear(path).weight.double().norm(dim=1)
    return _by_score(score)


def rank_heads_by_magnitude(view: LayerView) -> Ranking:
    """Heads by the product of the norms of their value and output weights."""
    values = view.head_values.double().flatten(1)
    outputs = view.attention_output.weight.double().T.reshape(view.heads, -1)
    return _by_score(values.norm(dim=1) * outputs.norm(dim=1))


def rank_neurons_by_products(view: LayerView, moments: Moments) -> Ranking:
    """Neurons by the consumer's weights times the norm of what they meet.

    Source:
        Sun et al., Wanda, arXiv 2306.11695, section 3, summed over a column as in FASP, arXiv 2501.09412.
    """
    return _by_score(_products(view.feed_forward_output, moments))


def rank_heads_by_products(view: LayerView, moments: Moments) -> Ranking:
    """The same for heads, summed over their columns."""
    return _by_score(_products(view.attention_output, moments).reshape(view.heads, -1).sum(1))


def _products(linear: Projection, moments: Moments) -> Tensor:
    """For every column the sum of ``|weight| |input|``, ``(columns,)``."""
    return linear.weight.double().abs().sum(0) * moments.second.diagonal().clamp(min=0).sqrt()


def rank_neurons_by_fluctuation(view: LayerView, moments: Moments) -> Ranking:
    """Neurons by what their variance does to the output, relative to the others of the block.

    Source:
        An et al., FLAP, arXiv 2312.11983: variance of a column times the squared norm of its weights, then less the
        mean of the sublayer's columns and over their standard deviation.
    """
    return _by_score(_fluctuations(view.feed_forward_output, moments))


def rank_heads_by_fluctuation(view: LayerView, moments: Moments) -> Ranking:
    """The same for heads: the mean over their columns."""
    return _by_score(_fluctuations(view.attention_output, moments).reshape(view.heads, -1).mean(1))


def _fluctuations(linear: Projection, moments: Moments) -> Tensor:
    variance = moments.second.diagonal() / moments.count - moments.mean.square()
    score = variance.clamp(min=0) * linear.weight.double().square().sum(0)
    spread = score.std() if len(score) > 1 else score.new_zeros(())  # of a single column it is not defined
    return (score - score.mean()) / spread.clamp(min=torch.finfo(score.dtype).tiny)


def rank_neurons_by_elimination(view: LayerView, moments: Moments) -> Ranking:
    """Neurons in the order in which the others cannot make up for them, see :func:`eliminate`."""
    return _by_elimination(view.feed_forward_output, moments, 1)


def rank_heads_by_elimination(view: LayerView, moments: Moments) -> Ranking:
    """The same for heads."""
    return _by_elimination(view.attention_output, moments, view.head_width)


def _by_elimination(linear: Projection, moments: Moments, width: int) -> Ranking:
    found = eliminate(moments.second, linear.weight.T, width)
    losses = np.asarray(found.losses.cpu())
    scores = np.minimum.accumulate(np.sqrt(losses[:-1] - losses[1:]))  # the others' refit may make one cheaper
    return Ranking(found.order.cpu().numpy(), scores, np.sqrt(losses))


def rank_at_random(size: int, rng: np.random.Generator) -> Ranking:
    """Any order is as good as another."""
    order = rng.permutation(size)
    return Ranking(order, np.linspace(1.0, 0.0, size, endpoint=False), np.linspace(1.0, 0.0, size + 1))
