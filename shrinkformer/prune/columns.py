"""What calibration examples cannot tell about the columns of activations, said in warnings with numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shrinkformer.architectures import layer_views
from shrinkformer.efficiency.macs import LayerSize
from shrinkformer.errors import warn
from shrinkformer.prune.methods import is_fitted
from shrinkformer.prune.moments import Moments
from shrinkformer.prune.plan import Plan
from shrinkformer.prune.stream import count_tokens

MANY = 0.5
"""Share of the columns of one layer that are dead."""

HUGE = 1e5
"""Times the median column. From about here on, damping, which is relative to the mean of all columns, is no longer
small beside the others: a relative 1e-10 of a mean of squares 1e10 / n times theirs."""


def warn_of_few_tokens(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Say so where a refit has fewer tokens than columns.

    Such a fit follows the noise of the examples, though it is held towards what it replaces.

    Warns:
        ShrinkformerWarning: With both numbers.
    """
    views, tokens = layer_views(model), count_tokens(batches)
    widths = {
        view.index: max(view.feed_forward_output.in_features, view.attention_output.in_features) for view in views
    }
    wide = [index for index, width in widths.items() if width > tokens]
    if wide:
        warn(
            f"{tokens:,} calibration tokens are fewer than the {widths[wide[0]]:,} inputs of a layer that is fitted to "
            f"them (in {len(wide)} of {len(views)} blocks, first in layer {wide[0]}); give more examples, some "
            "tokens for every input (on the command line a larger file, or --sample_batch_size where it has more)"
        )


def known_errors(plan: Plan, dense: Sequence[LayerSize], tokens: int) -> list[tuple[float | None, float | None]]:
    """Errors of the attention and the feed-forward sublayer of each block, as far as they say anything.

    A fit to fewer tokens than it has columns meets them whatever it leaves out: its error on them is near 0, and no
    estimate of any other. Those are None.

    Args:
        plan: What was pruned; methods that fit nothing measure what they report.
        dense: Sizes of each block before pruning; empty where they are not known, and all errors are believed.
        tokens: Of the examples that the plan was made from.
    """
    fitted = is_fitted(plan.method) and len(dense) == len(plan.layers)
    found: list[tuple[float | None, float | None]] = []
    for index, layer in enumerate(plan.layers):
        columns = (0, 0)
        if fitted:
            size = dense[index]
            columns = (size.heads * size.queries * size.value_width, size.neurons)
        errors = (layer.attention_error, layer.ffn_error)
        attention, ffn = (error if tokens >= wide else None for error, wide in zip(errors, columns, strict=True))
        found.append((attention, ffn))
    return found


@dataclass
class ColumnSurvey:
    """Columns that are dead or huge on the calibration examples, over all layers of a model.

    Attributes:
        dead: Layers of whose columns many are always zero: ``(layer, columns, dead)``.
        huge: Layers with columns far beyond the others: ``(layer, columns, huge, times the median)``.
    """

    dead: list[tuple[str, int, int]] = field(default_factory=list)
    huge: list[tuple[str, int, int, float]] = field(default_factory=list)

    def add(self, layer: str, moments: Moments) -> None:
        """Look at the inputs of a layer."""
        squares = moments.second.diagonal()
        alive = squares[squares > 0]
        none = moments.n - len(alive)
        if none >= MANY * moments.n:
            self.dead.append((layer, moments.n, none))
        if len(alive):
            sizes = alive.sqrt()
            times = sizes / sizes.median()
            count = int((times > HUGE).sum())
            if count:
                self.huge.append((layer, moments.n, count, float(torch.max(times))))

    def warn(self) -> None:
        """Say what was found, one warning for each kind.

        Warns:
            ShrinkformerWarning: Columns are dead or huge.
        """
        if self.dead:
            layer, columns, count = max(self.dead, key=lambda found: found[2] / found[1])
            warn(
                f"{count:,} of {columns:,} inputs of {layer} are zero for every calibration token{_more(self.dead)}; "
                "they can go for nothing, but other data may need them: give other or more examples"
            )
        if self.huge:
            layer, columns, count, times = max(self.huge, key=lambda found: found[3])
            warn(
                f"{count:,} of {columns:,} inputs of {layer} are up to {times:.0e} times the median one"
                f"{_more(self.huge)}; beside them the others hardly take part in refits"
            )


def _more(found: list[tuple[str, int, int]] | list[tuple[str, int, int, float]]) -> str:
    return f" (and many of {len(found) - 1} other layers)" if len(found) > 1 else ""
