"""Prune a model that does not fit into memory: finished blocks go straight to the checkpoint."""

import copy
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from shrinkformer.architectures import layer_views
from shrinkformer.prune.budget import Budget, CostModel
from shrinkformer.prune.checkpoint import complete, describe, replacing
from shrinkformer.prune.guarded import in_smaller_batches
from shrinkformer.prune.health import faults_located, require_finite
from shrinkformer.prune.plan import Plan
from shrinkformer.prune.ranked import Ranked
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.result import timed
from shrinkformer.prune.shards import ShardWriter
from shrinkformer.prune.side_files import add_side_files
from shrinkformer.utils.memory import limited
from shrinkformer.utils.precision import rounded

SHARD_BYTES = 1e9
"""Size of the files of a streamed checkpoint: so much is held in memory until it is written."""

_LEAST_SHARD_BYTES = 1e6


def prune_to_folder(
    calibrated: Ranked,
    budget: Budget,
    directory: Path,
    *,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None = None,
    extras_from: str | os.PathLike[str] | None = None,
) -> tuple[Plan, dict[str, float]]:
    """Prune a model to a budget and write it shard by shard; all of the folder appears, or nothing.

    With several workers all of them compute, and the main one writes.

    Args:
        calibrated: What was learnt about the model.
        budget: What may stay.
        directory: Where to; replaced when it is an earlier checkpoint of this package.
        dtype: Of the weights in the file.
        tokenizer: Saved beside the model.
        extras_from: Folder of the dense model, from which everything else beside its weights is copied.

    Returns:
        What was kept, and seconds by step.

    Raises:
        BudgetError: The budget is below what every block must keep.
        CheckpointError: The folder exists and holds something else.
        NumericalError: A weight would be NaN or infinite in the file.
        OutOfMemoryError: There is not enough memory even for one example at a time.
    """

    def attempt(most: int) -> tuple[Plan, dict[str, float]]:
        some = replace(calibrated, batches=limited(calibrated.batches, most))
        return _prune_to_folder(some, budget, directory, dtype=dtype, tokenizer=tokenizer, extras_from=extras_from)

    with faults_located(calibrated.model, calibrated.batches, calibrated.resources):
        return in_smaller_batches(attempt, calibrated.batches, calibrated.resources.workers, what="pruning")


def _prune_to_folder(
    calibrated: Ranked,
    budget: Budget,
    directory: Path,
    *,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None,
    extras_from: str | os.PathLike[str] | None,
) -> tuple[Plan, dict[str, float]]:
    seconds: dict[str, float] = {}
    with timed(seconds, "allocation"):
        counts = calibrated.allocate(budget)
    model, config = calibrated.model, copy.deepcopy(calibrated.model.config)
    blocks = calibrated.prune_blocks(counts, config, calibrated.resources.ledger.blocks(budget, calibrated.method.name))
    if not calibrated.resources.workers.is_main:
        return calibrated.plan(budget, counts, [layer for _, layer in blocks]), seconds
    prefix = block_prefix(model)
    layers = []
    with replacing(directory) as folder:
        writer = ShardWriter(folder, max_shard_bytes=shard_bytes(calibrated.resources))
        with timed(seconds, "refit"):
            add_tensors(writer, model, outside_blocks(model, prefix), dtype)
            for view, layer in blocks:
                layers.append(layer)
                add_tensors(writer, model, view.block.state_dict(prefix=f"{prefix}{view.index}."), dtype)
        writer.finish()
        plan = calibrated.plan(budget, counts, layers)
        describe(config, CostModel.of(layer_views(model), budget).sizes(counts), plan)
        config.dtype = dtype
        complete(folder, config, type(model), plan=plan, card=None)
        add_side_files(folder, model, source=extras_from, tokenizer=tokenizer)
    return plan, seconds


def shard_bytes(resources: Resources) -> float:
    """Size of the files of a streamed checkpoint; smaller where little memory may be taken."""
    offload = resources.offload
    return SHARD_BYTES if offload is None else min(SHARD_BYTES, max(_LEAST_SHARD_BYTES, offload.limit))


def block_prefix(model: PreTrainedModel) -> str:
    """What the names of all weights of the blocks start with, up to the number of the block."""
    first = layer_views(model)[0].block
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[first].removesuffix("0")


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """Names of weights that are also others, with the names of those."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def outside_blocks(model: PreTrainedModel, prefix: str) -> dict[str, Tensor]:
    """Everything but the blocks; of weights that are the same, one."""
    tied = tied_weights(model)
    tensors = model.state_dict()
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix) and name not in tied}


def add_tensors(writer: ShardWriter, model: PreTrainedModel, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Write weights under the names that ``save_pretrained`` gives them: those of the hub, not always the model's.

    Raises:
        NumericalError: A weight is NaN or infinite, or would be in the type of the file.
    """
    require_finite(tensors.items(), when=" of the smaller model")
    for name, tensor in revert_weight_conversion(model, tensors).items():
        own = rounded(name, tensor, dtype) if tensor.is_floating_point() else tensor
        writer.add(name, own.cpu().contiguous())
