"""What a run would do, without doing it."""

from collections.abc import Sequence
from time import perf_counter

import torch
from transformers import PreTrainedModel

from shrinkformer.architectures import layer_views
from shrinkformer.commands.locate import Source, empty_model
from shrinkformer.dataset.encoding import Encoded
from shrinkformer.prune.budget import Budget, CostModel, allocate_uniformly


def describe(source: Source, calibration: Encoded, budgets: Sequence[Budget], method: str) -> str:
    """Plan, sizes, memory and time of a run, from shapes alone: no weight is read, nothing is computed.

    Args:
        source: The model; it is built without weights.
        calibration: The calibration examples.
        budgets: The budgets.
        method: Name of the pruning method.

    Raises:
        BudgetError: A budget cannot be met.
    """
    model = empty_model(source)
    views = layer_views(model)
    parameters = sum(weight.numel() for weight in model.parameters())
    hidden, width = views[0].hidden_size, sum(view.neurons for view in views)
    lines = [
        f"{source.name} ({source.config.model_type}): {len(views)} blocks, hidden size {hidden}, "
        f"{sum(view.heads for view in views)} heads of {views[0].head_size}, {width:,} neurons, "
        f"{parameters / 1e6:.1f} M parameters",
        f"method {method}, {len(calibration.features):,} calibration inputs, {calibration.tokens:,} tokens",
    ]
    for budget in budgets:
        costs = CostModel.of(views, budget)
        even = allocate_uniformly(costs)
        gone = sum(_block_weights(view.heads, view.neurons, view.head_size, hidden) for view in views) - sum(
            _block_weights(heads, neurons, views[0].head_size, hidden)
            for heads, neurons in zip(even.heads, even.neurons, strict=True)
        )
        kept = parameters - gone
        lines.append(
            f"mu {budget.mu:g}: {costs.macs(even) / 1e6:,.1f} of {costs.dense / 1e6:,.1f} M MACs at "
            f"{budget.sequence_length:.2f} tokens; for instance {sum(even.heads)} heads and {sum(even.neurons):,} "
            f"neurons; about {kept / 1e6:.1f} M parameters, {kept * source.dtype.itemsize / 1e6:.1f} MB"
        )
    memory = _memory_bytes(model, calibration.tokens)
    seconds = _calibration_flops(model, calibration.tokens) / _flops_per_second()
    lines.append(f"memory: about {memory / 2**20:,.0f} MiB beside Python and the libraries")
    lines.append(f"time: calibration and selection about {seconds:.0f} s here, evaluation not counted")
    return "\n".join(lines)


def _block_weights(heads: int, neurons: int, head_size: int, hidden: int) -> int:
    return 4 * heads * head_size * hidden + 3 * heads * head_size + 2 * neurons * hidden + neurons


def _memory_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Two copies of the model, all second moments in float64 and a working copy of the largest, all hidden states."""
    views = layer_views(model)
    weights: int = 4 * sum(weight.numel() for weight in model.parameters())
    moments = [8 * (view.neurons**2 + view.attention_output.in_features**2) for view in views]
    return 2 * weights + sum(moments) + 3 * max(moments) + 2 * 4 * tokens * views[0].hidden_size


def _calibration_flops(model: PreTrainedModel, tokens: int) -> float:
    """Forward passes of the dense and of the pruned model, second moments, pivoting (in float64: counted twice)."""
    total = 0.0
    for view in layer_views(model):
        hidden, inner, neurons = view.hidden_size, view.attention_output.in_features, view.neurons
        total += 2 * tokens * (4 * hidden * inner + 2 * hidden * neurons) * 2
        total += tokens * (neurons**2 + 2 * inner**2)
        total += 2 * (neurons**3 + 2 * neurons**2 * hidden)
    return total


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
