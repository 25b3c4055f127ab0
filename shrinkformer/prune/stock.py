"""Blocks in the shape of stock classes: all alike, and of sizes that one configuration of transformers can say."""

from collections.abc import Sequence

from transformers import PreTrainedConfig

from shrinkformer.architectures import Architecture
from shrinkformer.efficiency.macs import LayerSize
from shrinkformer.errors import InputError

UNIFORM = "--uniform"


def says_heads(architecture: Architecture, config: PreTrainedConfig) -> bool:
    """Whether a stock configuration can say that blocks have fewer heads, each as wide as before."""
    stock = architecture.stock
    return bool(stock.head_size_key) and not any(getattr(config, name, False) for name in stock.heads_fixed_by)


def stock_head_counts(
    architecture: Architecture, sizes: Sequence[LayerSize], config: PreTrainedConfig
) -> tuple[int, ...]:
    """Numbers of heads that all blocks can have alike, in a stock configuration.

    Args:
        architecture: The record.
        sizes: Of the blocks, before pruning.
        config: Of the model, before pruning.

    Returns:
        At least one number, ascending; none is more than some block has.

    Raises:
        InputError: The model was pruned before in a way that a stock configuration cannot say.
    """
    fewest, first = min(size.heads for size in sizes), sizes[0]
    if len({_widths(size) for size in sizes}) > 1 or not _is_whole(first):
        raise InputError(
            f"{UNIFORM}: heads of this model were narrowed before, and no stock configuration can say that; "
            "start from the dense checkpoint."
        )
    if not says_heads(architecture, config):
        if any(_inner_width(size) != config.hidden_size for size in sizes):
            raise InputError(
                f"{UNIFORM}: this model lost heads before, and a stock {architecture.model_type} configuration cannot "
                "say that; start from the dense checkpoint."
            )
        return (fewest,)
    return tuple(
        heads for heads in range(1, fewest + 1) if _divides(architecture, config.hidden_size, heads * first.queries)
    )


def stock_values(
    architecture: Architecture, sizes: Sequence[LayerSize], config: PreTrainedConfig
) -> dict[str, int] | None:
    """What a stock configuration says of blocks of these sizes; None where it cannot, or where they differ.

    Args:
        architecture: The record.
        sizes: Of the blocks.
        config: Of the model, before or after.
    """
    size, stock = sizes[0], architecture.stock
    if len(set(sizes)) > 1 or not _is_whole(size):
        return None
    values = {architecture.neurons_key: size.neurons}
    if not says_heads(architecture, config):
        return values if _inner_width(size) == config.hidden_size else None
    queries = size.heads * size.queries
    if not _divides(architecture, config.hidden_size, queries):
        return None
    values |= {stock.head_size_key: size.head_size, architecture.heads_key: size.heads}
    return values | ({stock.query_heads_key: queries} if stock.query_heads_key else {})


def describe_limits(architecture: Architecture, config: PreTrainedConfig) -> str:
    """What blocks that are all alike may lose, in one line for people."""
    model_type = architecture.model_type
    if not says_heads(architecture, config):
        return f"a stock {model_type} configuration cannot say fewer heads, so all blocks lose neurons only"
    units = "groups of heads" if architecture.stock.query_heads_key else "heads"
    limit = ", whose query heads must divide the hidden size" if architecture.stock.heads_divide_hidden else ""
    return f"all blocks keep the same number of {units} and of neurons, as a stock {model_type} can say{limit}"


def is_stock(config: PreTrainedConfig) -> bool:
    """Whether the model of a configuration needs no code but that of transformers."""
    return not getattr(config, "shrinkformer", None)


def _divides(architecture: Architecture, hidden_size: int, queries: int) -> bool:
    return not architecture.stock.heads_divide_hidden or hidden_size % queries == 0


def _widths(size: LayerSize) -> tuple[int, ...]:
    return size.head_size, size.query_width, size.value_width, size.queries


def _is_whole(size: LayerSize) -> bool:
    return size.query_width == size.value_width == size.head_size


def _inner_width(size: LayerSize) -> int:
    """Columns of the output projection."""
    return size.heads * size.queries * size.value_width
