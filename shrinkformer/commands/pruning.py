"""What all pruning commands do once their inputs are read: load, evaluate, calibrate, prune, save, measure, report."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from shrinkformer.architectures import layer_views
from shrinkformer.commands.console import block_progress, say
from shrinkformer.commands.dry_run import describe
from shrinkformer.commands.locate import Source, empty_model, load_model
from shrinkformer.commands.memory import GIB, Footprint, available_bytes
from shrinkformer.commands.options import PruneOptions
from shrinkformer.commands.report import Measured, Run, model_card, write_report
from shrinkformer.efficiency.latency import measure_latency
from shrinkformer.efficiency.macs import model_macs
from shrinkformer.efficiency.size import checkpoint_bytes, count_parameters, folder_bytes, peak_memory_bytes
from shrinkformer.errors import CheckpointError, InputError
from shrinkformer.prune.budget import Budget, CostModel, layer_sizes
from shrinkformer.prune.checkpoint import load, save
from shrinkformer.prune.hidden import Offload
from shrinkformer.prune.plan import Plan
from shrinkformer.prune.pruner import Calibrated, calibrate, timed
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.resume import BlockStore, fingerprint
from shrinkformer.prune.statistics import Batches
from shrinkformer.prune.stream import count_tokens
from shrinkformer.prune.streamed import prune_to_folder
from shrinkformer.utils.inputs import accepted_inputs
from shrinkformer.utils.parallel import Workers

Evaluate = Callable[[PreTrainedModel, Resources], dict[str, float]]


@dataclass(frozen=True)
class Job:
    """One model and one task, read and checked: all that differs between encoders and decoders.

    Attributes:
        task_name: What the model is calibrated for, in reports.
        stem: Where reports go, below the output folder, without suffix.
        folder: Where checkpoints go, below the output folder, without the budget.
        source: The model.
        chosen: The class that loads it.
        tokenizer: Saved beside the pruned model.
        batches: Calibration examples as model inputs; those of all workers.
        sequence_length: Length at which MACs are counted.
        evaluate: Metrics of a model, with their standard errors.
        shapes: Inputs whose latency is measured, (examples, tokens).
        device: Where models run.
        dtype: Of weights in memory.
        workers: The processes that share the work.
        whole: Why the model has to be in memory as a whole; "" where it may pass block by block.
    """

    task_name: str
    stem: Path
    folder: Path
    source: Source
    chosen: Any
    tokenizer: Any
    batches: Batches
    sequence_length: float
    evaluate: Evaluate
    shapes: Sequence[tuple[int, int]]
    device: str
    dtype: torch.dtype
    workers: Workers
    whole: str = ""

    def say(self, message: str) -> None:
        """Tell the user, once."""
        if self.workers.is_main:
            say(message)


@dataclass
class _Session:
    """The dense model of a job, and what is known about it so far."""

    job: Job
    options: PruneOptions
    model: PreTrainedModel
    resources: Resources
    seconds: dict[str, float]  # of the steps that all budgets share
    dense: Measured = field(default_factory=lambda: Measured({}, 0.0, 0, 0))
    calibrated: Calibrated | None = None

    @property
    def lazily(self) -> bool:
        return self.resources.offload is not None


def run_pruning(job: Job, options: PruneOptions, seconds: dict[str, float]) -> None:
    """Prune a model to every budget that was asked for, and report.

    Args:
        job: The model and the task.
        options: Of the command.
        seconds: Time that was spent already, by step.

    Raises:
        InputError: The model does not fit into memory, and has to.
    """
    budgets = [
        Budget(mu, job.sequence_length, options.round_to, options.min_heads, options.min_neurons) for mu in options.mu
    ]
    shapes = empty_model(job.source, job.chosen)
    footprint = Footprint.of(shapes, count_tokens(job.batches), options.batch_size, job.sequence_length, job.dtype)
    limit = available_bytes(job.device) * 0.8 if options.max_memory is None else options.max_memory * GIB
    lazily = job.workers.broadcast(footprint.resident > limit)  # what is free differs from moment to moment
    if lazily and job.whole:
        raise InputError(
            f"--max_memory: {job.whole}, which takes {footprint.resident / GIB:,.1f} GiB, but {limit / GIB:,.1f} GiB "
            "are allowed or free; allow more, or use a machine with more."
        )
    if options.dry_run:
        job.say(describe(job, shapes, budgets, options, footprint=footprint, limit=limit))
        return
    for budget in budgets:
        CostModel.of(layer_views(shapes), budget).require_feasible()
    session = _start(job, options, seconds, lazily=lazily, limit=limit)
    job.say(f"evaluating the dense model on {job.task_name}")
    location = Path(job.source.location)
    with timed(seconds, "evaluation"):
        session.dense = _measure(session, session.model, session.resources, location)
    if any(budget.mu < 1 for budget in budgets):
        _calibrate(session)
    for budget in budgets:
        run = _prune_once(session, budget)
        if job.workers.is_main:
            say("\n" + run.table())
            say(f"  report: {write_report(run, options.output_dir / job.stem)}\n")
    if session.resources.store is not None and job.workers.is_main:
        session.resources.store.clear()


def _start(job: Job, options: PruneOptions, seconds: dict[str, float], *, lazily: bool, limit: float) -> _Session:
    how = "; its blocks stay on disk until they are needed (--max_memory)" if lazily else ""
    job.say(f"loading {job.source.name} from {job.source.location}{how}")
    with timed(seconds, "loading"):
        model, weights = load_model(job.source, job.chosen, job.device, job.dtype, lazily=lazily)
        offload = None
        if lazily:
            offload = Offload(options.offload_dir or (options.output_dir / job.stem).parent, int(limit / 4))
        store = _open_store(job, options, model) if any(mu < 1 for mu in options.mu) else None
    return _Session(job, options, model, Resources(weights, offload, store, job.workers), seconds)


def _open_store(job: Job, options: PruneOptions, model: PreTrainedModel) -> BlockStore:
    """Where finished blocks of the calibration are kept until the run is over."""
    base = options.output_dir / job.folder if options.offload_dir is None else options.offload_dir / job.folder.name
    folder = base.with_name(f"{base.name}.resume")
    if folder.exists() and not options.resume:
        job.say("starting anew; --resume would take up the calibration of an interrupted run")
    location = Path(job.source.location)
    files = sorted(location.glob("*.safetensors")) if location.is_dir() else []
    key = fingerprint(model, job.batches, files)
    if job.workers.is_main:
        BlockStore(folder, key, resume=options.resume)  # deletes what is not to be taken up, before others look
    job.workers.barrier()
    return BlockStore(folder, key, resume=True)


def _calibrate(session: _Session) -> None:
    """One pass of the calibration examples, for all budgets; finished blocks stay on disk until the run is over."""
    job, options = session.job, session.options
    inputs = sum(len(batch["input_ids"]) for batch in job.batches)
    job.say(f"calibrating on {inputs:,} inputs, {count_tokens(job.batches):,} tokens")
    session.calibrated = calibrate(
        session.model,
        job.batches,
        method=options.method,
        seed=options.seed,
        progress=block_progress("calibrating") if job.workers.is_main else iter,
        resources=session.resources,
    )
    session.seconds |= session.calibrated.seconds


def _prune_once(session: _Session, budget: Budget) -> Run:
    """Prune to one budget and measure the result; the checkpoint is on disk before anything is measured."""
    job, options, seconds = session.job, session.options, dict(session.seconds)
    dense, pruned, plan, folder = session.dense, None, None, None
    if session.calibrated is not None and budget.mu < 1:
        job.say(f"pruning to mu {budget.mu:g} by {options.method}")
        folder = _target(job, options, budget)
        step = _prune_lazily if session.lazily else _prune_in_memory
        dense, pruned, plan = step(session, budget, folder, seconds)
    seconds["total"] = sum(seconds.values())
    return Run(
        task_name=job.task_name,
        model_name=job.source.name,
        method=options.method,
        mu=budget.mu,
        seed=options.seed,
        sample_batch_size=options.sample_batch_size,
        calibration_tokens=count_tokens(job.batches),
        device=job.device,
        dense=dense,
        pruned=pruned,
        plan=plan,
        save_dir=folder,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(job.device),
    )


def _target(job: Job, options: PruneOptions, budget: Budget) -> Path:
    if options.save_dir is None:
        return options.output_dir / f"{job.folder}-mu{budget.mu:g}"
    return options.save_dir if len(options.mu) == 1 else options.save_dir / f"mu{budget.mu:g}"


def _prune_in_memory(
    session: _Session, budget: Budget, folder: Path, seconds: dict[str, float]
) -> tuple[Measured, Measured, Plan]:
    job, calibrated = session.job, session.calibrated
    assert calibrated is not None
    result = calibrated.prune(budget)
    seconds |= result.seconds
    with timed(seconds, "saving"):
        # The model in memory is rounded to the type of the file, so that what is measured is what is in the file.
        _cast_weights(result.model, job.source.dtype)
        if job.workers.is_main:
            title = f"{job.source.name} for {job.task_name} at {budget.mu:g} of its MACs"
            card = model_card(title, result.plan, job.source.name)
            source = Path(job.source.location)
            save(result.model, folder, plan=result.plan, tokenizer=job.tokenizer, card=card, extras_from=source)
        _cast_weights(result.model, job.dtype)
        if job.workers.is_main:
            _require_equal_outputs(job, result.model, folder)
        job.workers.barrier()
    with timed(seconds, "evaluation"):
        pruned = _measure(session, result.model, replace(session.resources, store=None), folder)
        models = {"dense": calibrated.model, "pruned": result.model}
        vocabulary = job.source.config.vocab_size
        latency = (
            measure_latency(models, job.shapes, device=job.device, vocabulary_size=vocabulary)
            if job.workers.is_main
            else {name: {} for name in models}
        )
    dense = replace(session.dense, latency_ms=latency["dense"])
    return dense, replace(pruned, latency_ms=latency["pruned"]), result.plan


def _cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Change the type of all that a file holds; rotary frequencies, which none does, must not be rounded."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _require_equal_outputs(job: Job, model: PreTrainedModel, folder: Path) -> None:
    """Check that a saved model comes back the same.

    Raises:
        CheckpointError: The reloaded model gives other outputs.
    """
    batch = accepted_inputs(model, {name: value[:4] for name, value in job.batches[0].items()})
    reloaded: Any = load(folder, dtype=job.dtype)
    with torch.inference_mode():
        if not torch.equal(model(**batch)[0], reloaded.to(job.device).eval()(**batch)[0]):
            raise CheckpointError(f"{folder}: the reloaded model gives other outputs; please report this.")
    job.say(f"saved to {folder}; reloaded, it gives equal outputs")


def _prune_lazily(
    session: _Session, budget: Budget, folder: Path, seconds: dict[str, float]
) -> tuple[Measured, Measured, Plan]:
    """Prune and evaluate with one block in memory; no latency, because the models do not fit."""
    job, calibrated = session.job, session.calibrated
    assert calibrated is not None
    plan, spent = prune_to_folder(calibrated, budget, folder, dtype=job.source.dtype, tokenizer=job.tokenizer)
    seconds |= spent
    job.workers.barrier()
    if job.workers.is_main:
        title = f"{job.source.name} for {job.task_name} at {budget.mu:g} of its MACs"
        (folder / "README.md").write_text(model_card(title, plan, job.source.name))
    job.say(f"saved to {folder}")
    with timed(seconds, "evaluation"):
        saved = replace(job.source, location=str(folder))
        model, weights = load_model(saved, job.chosen, job.device, job.dtype, lazily=True)
        pruned = _measure(session, model, replace(session.resources, weights=weights), folder)
    return session.dense, pruned, plan


def _measure(session: _Session, model: PreTrainedModel, resources: Resources, folder: Path) -> Measured:
    """Evaluate a model and take its sizes; ``folder`` holds its weights unless they came from the hub."""
    views = layer_views(model)
    return Measured(
        metrics=session.job.evaluate(model, resources),
        macs=model_macs(layer_sizes(views), views[0].hidden_size, session.job.sequence_length),
        parameters=count_parameters(model),
        bytes=folder_bytes(folder) if folder.is_dir() else checkpoint_bytes(model),
    )


def show_progress(workers: Workers) -> bool:
    """Whether progress bars should appear."""
    return workers.is_main and sys.stderr.isatty()
