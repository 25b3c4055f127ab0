"""Quantize a model that does not fit into memory: finished blocks go straight to the checkpoint."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from shrinkformer.architectures import LayerView, layer_views
from shrinkformer.prune.budget import Budget, CostModel
from shrinkformer.prune.checkpoint import describe, replacing
from shrinkformer.prune.columns import warn_of_few_tokens
from shrinkformer.prune.guarded import learn_guarded
from shrinkformer.prune.plan import LayerPlan, Plan
from shrinkformer.prune.ranked import Ranked
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.result import timed
from shrinkformer.prune.shards import ShardWriter
from shrinkformer.prune.side_files import add_side_files
from shrinkformer.prune.statistics import Batches, Progress
from shrinkformer.prune.streamed import add_tensors, block_prefix, outside_blocks, shard_bytes
from shrinkformer.quantize.checkpoint import add_weights, finish_folder
from shrinkformer.quantize.config import QuantizeConfig, Quantized
from shrinkformer.quantize.final_norm import final_norm
from shrinkformer.quantize.formats import FLOAT, FORMATS
from shrinkformer.quantize.layout import Format
from shrinkformer.quantize.planned import planned_layers, require_format
from shrinkformer.quantize.quantizer import BlockQuantizer
from shrinkformer.quantize.resume import QuantizedBlocks
from shrinkformer.quantize.scheme import Scheme
from shrinkformer.utils.inputs import padded_right


@dataclass
class _Sink:
    """A folder that takes blocks as they are finished, in one format."""

    model: PreTrainedModel
    writer: ShardWriter
    format: Format
    dtype: torch.dtype
    schemes: dict[str, Scheme] = field(default_factory=dict)

    def take(self, view: LayerView, prefix: str, found: Quantized) -> None:
        """A finished block; ``found`` has its integers and no others."""
        state = view.block.state_dict(prefix=f"{prefix}{view.index}.")
        add_weights(self.writer, self.model, state, found.weights, format=self.format, dtype=self.dtype)
        self.schemes |= {name: weight.grid.scheme for name, weight in found.weights.items()}


@torch.no_grad()
def quantize_to_folder(
    model: PreTrainedModel,
    batches: Batches,
    config: QuantizeConfig,
    directory: Path,
    *,
    format: str,
    dtype: torch.dtype,
    resources: Resources,
    pruning: tuple[Ranked, Budget] | None = None,
    decoded: Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    extras_from: str | os.PathLike[str] | None = None,
    progress: Progress = iter,
    store: QuantizedBlocks | None = None,
) -> tuple[Quantized, Plan | None]:
    """Quantize a model, pruned before or not, and write it shard by shard; all of the folder appears, or nothing.

    One block of the model is in memory. With several workers all of them compute, and the main one writes.

    Args:
        model: The dense model; its blocks need no weights.
        batches: Calibration examples of all workers.
        config: What is done.
        directory: Where to; replaced when it is an earlier checkpoint of this package.
        format: One of the packed formats, or ``float``.
        dtype: Of scales and of everything that is not quantized.
        resources: Where weights come from, where data goes, who shares the work.
        pruning: What was learnt for pruning, and how much may stay; each block is pruned right before it is quantized.
        decoded: A folder for the same model as ordinary weights, to evaluate it block by block.
        tokenizer: Saved beside the model.
        extras_from: Folder of the dense model, from which everything else beside its weights is copied.
        progress: Wraps the loop over the blocks, for a progress bar.
        store: Keeps finished blocks on disk, and gives back those of an interrupted run.

    Returns:
        Reports of all layers, with the integers of none, and what was kept.

    Raises:
        InputError: The format cannot hold what comes out.
        BudgetError: The budget is below what every block must keep.
        CheckpointError: The folder exists and holds something else.
        NumericalError: Weights, or what the model computes on the examples, are NaN or infinite, or become so.
        OutOfMemoryError: There is not enough memory even for one example at a time.
    """

    def attempt(some: Batches) -> tuple[Quantized, Plan | None]:
        own = None if pruning is None else (replace(pruning[0], batches=some), pruning[1])
        run = BlockQuantizer(model, model, some, config, resources=resources, store=store)
        return _quantize_to_folder(
            run,
            model,
            config,
            directory,
            format=format,
            dtype=dtype,
            resources=resources,
            pruning=own,
            decoded=decoded,
            tokenizer=tokenizer,
            extras_from=extras_from,
            progress=progress,
        )

    batches = padded_right(batches)
    counts = None if pruning is None else pruning[0].allocate(pruning[1])
    require_format(model, format, planned_layers(model, config, counts))
    if config.recipe.look_ahead:
        warn_of_few_tokens(model, batches)
    return learn_guarded(attempt, model, batches, resources)


def _quantize_to_folder(
    run: BlockQuantizer,
    model: PreTrainedModel,
    config: QuantizeConfig,
    directory: Path,
    *,
    format: str,
    dtype: torch.dtype,
    resources: Resources,
    pruning: tuple[Ranked, Budget] | None,
    decoded: Path | None,
    tokenizer: PreTrainedTokenizerBase | None,
    extras_from: str | os.PathLike[str] | None,
    progress: Progress,
) -> tuple[Quantized, Plan | None]:
    found, prefix, layers = Quantized({}, [], config), block_prefix(model), list[LayerPlan]()
    run.enter(model)
    own = copy.deepcopy(model.config)
    blocks = _blocks(model, own, resources, pruning, layers)
    with (
        timed(found.seconds, "quantization"),
        replacing(directory) if resources.workers.is_main else nullcontext(directory) as folder,
    ):
        sinks = (
            _sinks(model, folder, decoded, format, dtype, size=shard_bytes(resources))
            if resources.workers.is_main
            else []
        )
        for view in progress(blocks):
            with resources.weights.resident(view.index):
                for layer in run.quantize(view, layer_views(model)[view.index]):
                    found.weights[f"{prefix}{view.index}.{layer.path}"] = layer.weight
                    found.layers.append(layer.report)
            for sink in sinks:
                sink.take(view, prefix, found)
            found.weights.clear()
        with _norm_put_back(model):
            run.finish(model)
            plan = _plan(pruning, layers, own, model)
            for sink in sinks:
                add_tensors(sink.writer, model, outside_blocks(model, prefix), dtype)
                sink.writer.finish()
                where = folder if sink is sinks[0] else decoded
                assert where is not None
                finish_folder(where, model, own, sink.format, sink.schemes, plan=plan, dtype=dtype)
                add_side_files(where, model, source=extras_from, tokenizer=tokenizer)
    return found, plan


@contextmanager
def _norm_put_back(model: PreTrainedModel) -> Iterator[None]:
    """Let the norm behind the blocks be fitted; other budgets, and another attempt, start from the dense model."""
    norm = final_norm(model)
    before = None if norm is None else copy.deepcopy(norm.state_dict())
    try:
        yield
    finally:
        if norm is not None and before is not None:
            norm.load_state_dict(before)


def _sinks(
    model: PreTrainedModel, folder: Path, decoded: Path | None, format: str, dtype: torch.dtype, *, size: float
) -> list[_Sink]:
    sinks = [_Sink(model, ShardWriter(folder, size), FORMATS[format], dtype)]
    if decoded is not None:
        sinks.append(_Sink(model, ShardWriter(decoded, size), FLOAT, dtype))
    return sinks


def _blocks(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    resources: Resources,
    pruning: tuple[Ranked, Budget] | None,
    layers: list[LayerPlan],
) -> Iterator[LayerView]:
    """Copies of the blocks to quantize, one at a time; plans of pruned ones are appended to ``layers``."""
    if pruning is None:
        for view in layer_views(model):
            with resources.weights.resident(view.index):
                yield replace(view, block=copy.deepcopy(view.block, {id(model.config): config}))
        return
    calibrated, budget = pruning
    counts = calibrated.allocate(budget)
    finished = calibrated.resources.ledger.blocks(budget, calibrated.method.name)
    for view, layer in calibrated.prune_blocks(counts, config, finished):
        layers.append(layer)
        yield view


def _plan(
    pruning: tuple[Ranked, Budget] | None,
    layers: list[LayerPlan],
    config: PreTrainedConfig,
    model: PreTrainedModel,
) -> Plan | None:
    """What was kept, also written into the configuration."""
    if pruning is None:
        return None
    calibrated, budget = pruning
    counts = calibrated.allocate(budget)
    plan = calibrated.plan(budget, counts, layers)
    describe(config, CostModel.of(layer_views(model), budget).sizes(counts), plan)
    return plan
