"""``prune_bert.py``: prune an encoder under a MAC budget, evaluate and save it."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel

from shrinkformer.architectures import layer_views
from shrinkformer.commands.console import block_progress, run_command, say
from shrinkformer.commands.dry_run import describe
from shrinkformer.commands.locate import Source, empty_model, find_model, load_model, load_tokenizer, max_positions
from shrinkformer.commands.options import PruneOptions, parse_options, resolve_device
from shrinkformer.commands.report import Measured, Run, model_card, write_report
from shrinkformer.dataset.calibration import sample_calibration
from shrinkformer.dataset.encoding import Encoded, encode, padded_batches
from shrinkformer.dataset.loading import evaluation_splits, load_examples, load_split
from shrinkformer.dataset.tasks import Task, get_task
from shrinkformer.efficiency.latency import measure_latency
from shrinkformer.efficiency.macs import model_macs
from shrinkformer.efficiency.size import checkpoint_bytes, count_parameters, folder_bytes, peak_memory_bytes
from shrinkformer.errors import CheckpointError
from shrinkformer.evaluate.evaluation import evaluate_model
from shrinkformer.prune.budget import Budget, CostModel, layer_sizes
from shrinkformer.prune.checkpoint import load, save
from shrinkformer.prune.pruner import Calibrated, Pruned, calibrate, timed
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.resume import BlockStore, fingerprint
from shrinkformer.utils.inputs import accepted_inputs

PROG = "prune_bert.py"


@dataclass(frozen=True)
class Inputs:
    """Everything that is read before the model's weights are."""

    task: Task
    source: Source
    tokenizer: Any
    calibration: Encoded
    evaluation: Mapping[str, Encoded]
    device: str

    @property
    def mean_length(self) -> float:
        """Mean length of the evaluation inputs in tokens, padding excluded."""
        lengths = [length for split in self.evaluation.values() for length in split.lengths]
        return sum(lengths) / len(lengths)


def read_inputs(options: PruneOptions) -> Inputs:
    """Find the model, read and encode the data.

    Raises:
        InputError: A model or data set is missing or does not fit the task.
    """
    task = get_task(options.task_name)
    source = find_model(options.model_name, task)
    tokenizer = load_tokenizer(source)

    def read(split: str) -> datasets.Dataset:
        return load_split(task, split, data_dir=options.data_dir, bundled=options.bundled_data)

    own = options.calibration_file
    pool = read("train") if own is None else load_examples(own, task)
    longest = max_positions(source.config)
    calibration = sample_calibration(
        pool, task, tokenizer, size=options.sample_batch_size, seed=options.seed, max_length=longest
    )
    evaluation = {
        split: encode(read(split), task, tokenizer, max_length=longest)
        for split in evaluation_splits(task, options.data_dir, options.bundled_data)
    }
    return Inputs(task, source, tokenizer, calibration, evaluation, resolve_device(options.device))


def prune_command(arguments: Sequence[str] | None) -> None:
    """Everything that ``prune_bert.py`` does."""
    options = parse_options(
        arguments, prog=PROG, description="Prune an encoder under a MAC budget, evaluate and save it."
    )
    shared: dict[str, float] = {}  # seconds of the steps that all budgets share
    with timed(shared, "loading"):
        inputs = read_inputs(options)
        budgets = make_budgets(options, inputs.mean_length)
        if options.dry_run:
            say(describe(inputs.source, inputs.calibration, budgets, options.method))
            return
        shapes = layer_views(empty_model(inputs.source))
        for budget in budgets:
            CostModel.of(shapes, budget).require_feasible()
        say(f"loading {inputs.source.name} from {inputs.source.location}")
        model = load_model(inputs.source, inputs.task, inputs.device)
    say(f"evaluating the dense model on {inputs.task.name}")
    with timed(shared, "evaluation"):
        dense = measure(model, inputs, options, budgets[0].sequence_length, Path(inputs.source.location))
    calibrated, store = None, None
    if any(budget.mu < 1 for budget in budgets):
        calibrated, store = calibrate_model(model, inputs, options, shared)
    for budget in budgets:
        run = prune_once(calibrated if budget.mu < 1 else None, budget, dense, inputs, options=options, shared=shared)
        say("\n" + run.table())
        say(f"  report: {write_report(run, options.output_dir)}\n")
    if store is not None:
        store.clear()


def make_budgets(options: PruneOptions, mean_length: float) -> list[Budget]:
    """One budget for each ``--mu``."""
    length = options.sequence_length or mean_length
    return [Budget(mu, length, options.round_to, options.min_heads, options.min_neurons) for mu in options.mu]


def calibrate_model(
    model: PreTrainedModel, inputs: Inputs, options: PruneOptions, shared: dict[str, float]
) -> tuple[Calibrated, BlockStore]:
    """One pass of the calibration examples, for all budgets; finished blocks stay on disk until the run is over."""
    features = inputs.calibration.features
    say(f"calibrating on {len(features):,} inputs, {inputs.calibration.tokens:,} tokens")
    batches = [batch for _, batch in padded_batches(features, inputs.tokenizer, options.batch_size)]
    with timed(shared, "loading"):
        folder = options.output_dir / inputs.source.name / f"{inputs.task.name}.resume"
        if folder.exists() and not options.resume:
            say("starting anew; --resume would take up the calibration of an interrupted run")
        store = BlockStore(folder, fingerprint(model, batches), resume=options.resume)
    calibrated = calibrate(
        model,
        batches,
        method=options.method,
        seed=options.seed,
        progress=block_progress("calibrating"),
        resources=Resources(store=store),
    )
    shared |= calibrated.seconds
    return calibrated, store


def prune_once(
    calibrated: Calibrated | None,
    budget: Budget,
    dense: Measured,
    inputs: Inputs,
    *,
    options: PruneOptions,
    shared: Mapping[str, float],
) -> Run:
    """Prune to one budget and measure the result; the checkpoint is on disk before anything is measured."""
    seconds = dict(shared)
    pruned, plan, folder = None, None, None
    if calibrated is not None:
        say(f"pruning to mu {budget.mu:g} by {options.method}")
        result = calibrated.prune(budget)
        seconds |= result.seconds
        plan = result.plan
        with timed(seconds, "saving"):
            folder = save_pruned(result, inputs, options)
        with timed(seconds, "evaluation"):
            pruned = measure(result.model, inputs, options, budget.sequence_length, folder)
            latency = measure_latency(
                {"dense": calibrated.model, "pruned": result.model},
                latency_shapes(inputs),
                device=inputs.device,
                vocabulary_size=inputs.source.config.vocab_size,
            )
        dense, pruned = replace(dense, latency_ms=latency["dense"]), replace(pruned, latency_ms=latency["pruned"])
    seconds["total"] = sum(seconds.values())
    return Run(
        task=inputs.task,
        model_name=inputs.source.name,
        method=options.method,
        mu=budget.mu,
        seed=options.seed,
        sample_batch_size=options.sample_batch_size,
        calibration_tokens=inputs.calibration.tokens,
        device=inputs.device,
        dense=dense,
        pruned=pruned,
        plan=plan,
        save_dir=folder,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(inputs.device),
    )


def save_pruned(result: Pruned, inputs: Inputs, options: PruneOptions) -> Path:
    """Save a pruned model in the dtype of its source and check that it comes back the same.

    The model in memory is rounded to that dtype as well, so that what is measured is what is in the file.

    Raises:
        CheckpointError: The reloaded model gives other outputs.
    """
    folder = options.output_dir / inputs.source.name / f"{inputs.task.name}-mu{result.plan.mu:g}"
    if options.save_dir is not None:
        folder = options.save_dir if len(options.mu) == 1 else options.save_dir / f"mu{result.plan.mu:g}"
    result.model.to(inputs.source.dtype)
    title = f"{inputs.source.name} for {inputs.task.name} at {result.plan.mu:g} of its MACs"
    save(
        result.model,
        folder,
        plan=result.plan,
        tokenizer=inputs.tokenizer,
        card=model_card(title, result.plan, inputs.source.name),
        extras_from=Path(inputs.source.location),
    )
    result.model.float()
    features = inputs.calibration.features[:4]
    _, padded = next(padded_batches(features, inputs.tokenizer, len(features)))
    batch = accepted_inputs(result.model, padded)
    reloaded = load(folder, dtype=torch.float32).to(inputs.device).eval()
    with torch.inference_mode():
        if not torch.equal(result.model(**batch)[0], reloaded(**batch)[0]):
            raise CheckpointError(f"{folder}: the reloaded model gives other outputs; please report this.")
    say(f"saved to {folder}; reloaded, it gives equal outputs")
    return folder


def latency_shapes(inputs: Inputs) -> list[tuple[int, int]]:
    """One input, and a batch of eight, of 128 tokens or as many as the model takes."""
    length = min(128, max_positions(inputs.source.config), inputs.tokenizer.model_max_length)
    return [(1, length), (8, length)]


def measure(
    model: PreTrainedModel, inputs: Inputs, options: PruneOptions, sequence_length: float, folder: Path
) -> Measured:
    """Evaluate a model and take its sizes; ``folder`` holds its weights unless they came from the hub."""
    evaluation = evaluate_model(
        model,
        inputs.tokenizer,
        inputs.task,
        inputs.evaluation,
        batch_size=options.batch_size,
        device=inputs.device,
        progress=sys.stderr.isatty(),
    )
    views = layer_views(model)
    return Measured(
        metrics=evaluation.metrics,
        macs=model_macs(layer_sizes(views), views[0].hidden_size, sequence_length),
        parameters=count_parameters(model),
        bytes=folder_bytes(folder) if folder.is_dir() else checkpoint_bytes(model),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``prune_bert.py``."""
    return run_command(prune_command, arguments, PROG)
