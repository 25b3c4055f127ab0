"""What a run would do, without doing it."""

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from shrinkformer.architectures import layer_views
from shrinkformer.commands.memory import GIB, Footprint, block_weights
from shrinkformer.commands.options import PruneOptions
from shrinkformer.efficiency.size import count_parameters
from shrinkformer.prune.allocation import allocate_uniformly
from shrinkformer.prune.budget import Budget, CostModel, Counts
from shrinkformer.prune.curves import POINTS
from shrinkformer.prune.damage import FEW_TOKENS
from shrinkformer.prune.regression import RIDGES
from shrinkformer.prune.stock import describe_limits
from shrinkformer.prune.stream import count_tokens

if TYPE_CHECKING:
    from shrinkformer.commands.session import Job


Sizes = Callable[[Counts, int], Mapping[str, int]]


def describe(
    job: "Job",
    model: PreTrainedModel,
    budgets: Sequence[Budget],
    options: PruneOptions,
    *,
    footprint: Footprint,
    limit: float,
    sizes: Sizes,
) -> str:
    """Plan, sizes, memory and time of a run, from shapes alone: no weight is read, nothing is computed.

    Args:
        job: The model and the task.
        model: The model without weights.
        budgets: The budgets.
        options: Of the command.
        footprint: What the run takes.
        limit: Bytes that it may take.
        sizes: Bytes of what would be written, from what stays and its parameters.

    Raises:
        BudgetError: A budget cannot be met.
    """
    views = layer_views(model)
    parameters, tokens = count_parameters(model), count_tokens(job.batches)
    hidden, width, source = views[0].hidden_size, sum(view.neurons for view in views), job.source
    inputs = sum(len(batch["input_ids"]) for batch in job.batches)
    shared = f" for {views[0].queries} queries each" if views[0].queries > 1 else ""
    lines = [
        f"{source.name} ({source.config.model_type}): {len(views)} blocks, hidden size {hidden}, "
        f"{sum(view.heads for view in views)} heads of {views[0].head_size}{shared}, {width:,} neurons, "
        f"{parameters / 1e6:.1f} M parameters",
        f"method {options.method}, {inputs:,} calibration inputs, {tokens:,} tokens"
        if job.batches
        else "nothing is learnt from examples, so none are read for calibration",
    ]
    if options.round_to is None:
        lines.append("round to auto: is measured when the run begins; sizes below are not rounded")
    if options.uniform:
        lines.append(f"--uniform: {describe_limits(views[0].architecture, source.config)}")
    for budget in budgets:
        costs = CostModel.of(views, budget)
        even = allocate_uniformly(costs)
        gone = sum(
            block_weights(view.heads - heads, view.neurons - neurons, view)
            for view, heads, neurons in zip(views, even.heads, even.neurons, strict=True)
        )
        kept = parameters - gone
        files = [f"{size / 1e6:,.2f} MB {what}".strip() for what, size in sizes(even, kept).items()]
        lines.append(
            f"mu {budget.amount}: {costs.macs(even) / 1e6:,.1f} of {costs.dense / 1e6:,.1f} M MACs at "
            f"{budget.sequence_length:.2f} tokens; for instance {sum(even.heads)} heads and {sum(even.neurons):,} "
            f"neurons; about {kept / 1e6:.1f} M parameters, {', '.join(files)}"
        )
    return "\n".join([*lines, _memory(footprint, limit), _time(model, tokens, options)])


def _time(model: PreTrainedModel, tokens: int, options: PruneOptions) -> str:
    if not tokens:
        return "time: no calibration; evaluation is not counted"
    rate, flops = _flops_per_second(), _calibration_flops(model, tokens)
    if not options.shrinks:
        return f"time: calibration and selection about {flops / rate:.0f} s here, evaluation not counted"
    first, fits = (flops + _curves_flops(model, tokens)) / rate, _refit_flops(model, tokens) / rate
    return (
        f"time: calibration and selection about {first:.0f} s here; for each budget a search of at most "
        f"{options.search_seconds:g} s (--search_seconds) and fits of about {fits:.0f} s; evaluation not counted"
    )


def _memory(footprint: Footprint, limit: float) -> str:
    if footprint.resident <= limit:
        return f"memory: about {footprint.resident / 2**20:,.0f} MiB beside Python and the libraries"
    held = min(footprint.spilled, limit / 4)
    return (
        f"memory: {footprint.resident / GIB:,.1f} GiB would not fit into {limit / GIB:,.1f} GiB, so the model passes "
        f"block by block: about {footprint.streamed / GIB:,.1f} GiB, up to {held / GIB:,.1f} GiB of hidden states, and "
        f"up to {footprint.spilled / GIB:,.1f} GiB on disk"
    )


def _calibration_flops(model: PreTrainedModel, tokens: int) -> float:
    """Forward passes of the dense and of the pruned model, second moments, pivoting (in float64: counted twice)."""
    total = 0.0
    for view in layer_views(model):
        hidden, inner, neurons = view.hidden_size, view.attention_output.in_features, view.neurons
        total += 2 * tokens * block_weights(view.heads, view.neurons, view) * 2
        total += tokens * (neurons**2 + 2 * inner**2)
        total += 2 * (neurons**3 + 2 * neurons**2 * hidden)
    return total


def _curves_flops(model: PreTrainedModel, tokens: int) -> float:
    """A pass backward, and one from every block on for every point of its curves."""
    views = layer_views(model)
    weights = [block_weights(view.heads, view.neurons, view) for view in views]
    passes = sum(POINTS * sum(weights[view.index :]) for view in views)
    return 2 * (min(tokens, FEW_TOKENS) * passes + 3 * tokens * sum(weights))


def _refit_flops(model: PreTrainedModel, tokens: int) -> float:
    """Fits of all layers to two plans, and to one again: passes of two models, sums of products, and factors."""
    total = 0.0
    for view in layer_views(model):
        hidden, inner, neurons = view.hidden_size, view.attention_output.in_features, view.neurons
        inputs = ((hidden, 3 * inner), (inner, hidden), (hidden, neurons), (neurons, hidden))
        total += 2 * tokens * 3 * 2 * block_weights(view.heads, view.neurons, view)
        total += sum(2 * tokens * one * (one + other) for one, other in inputs)
        total += sum((2 * len(RIDGES) + 1) * 2 * (one**3 / 3 + 2 * one**2 * other) for one, other in inputs)
    return 3 * total


def _flops_per_second() -> float:
    """What a matrix product reaches here, halved for everything that is not one."""
    size = 1024
    left = torch.rand(size, size)
    rates = []
    for _ in range(3):
        start = perf_counter()
        left @ left
        rates.append(2 * size**3 / (perf_counter() - start))
    return max(rates) / 2
