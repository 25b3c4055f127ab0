"""What all commands do once their inputs are read: load, evaluate, then a step for each budget, and report."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from shrinkformer.architectures import find_architecture, layer_views
from shrinkformer.commands.card_metadata import inherited, side_folder
from shrinkformer.commands.cards import Card
from shrinkformer.commands.console import block_progress, say
from shrinkformer.commands.dry_run import describe
from shrinkformer.commands.locate import Source, empty_model, load_model
from shrinkformer.commands.memory import GIB, Footprint, available_bytes
from shrinkformer.commands.options import PruneOptions
from shrinkformer.commands.publishing import Publisher
from shrinkformer.commands.report import Measured, Run, write_report
from shrinkformer.efficiency.macs import model_macs
from shrinkformer.efficiency.rounding import Rounding, choose_multiple
from shrinkformer.efficiency.size import checkpoint_bytes, count_parameters, folder_bytes, peak_memory_bytes
from shrinkformer.errors import InputError
from shrinkformer.export.runtime import OnnxModel
from shrinkformer.prune.allocation import require_feasible
from shrinkformer.prune.budget import Budget, CostModel, layer_sizes
from shrinkformer.prune.checkpoint import stock_class
from shrinkformer.prune.hidden import Offload
from shrinkformer.prune.methods import SHRINK
from shrinkformer.prune.pruner import Calibrated, calibrate
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.result import timed
from shrinkformer.prune.resume import BlockFiles, BlockStore, fingerprint
from shrinkformer.prune.shrink import ShrinkConfig
from shrinkformer.prune.statistics import Batches
from shrinkformer.prune.stock import describe_limits
from shrinkformer.prune.stream import count_tokens
from shrinkformer.utils.parallel import Workers

Blocks = TypeVar("Blocks", bound=BlockFiles)
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
        sentence_encoder: Whether it is one, which sentence-transformers should open.
        public: Whether metrics are those of whole evaluation splits of public data sets.
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
    sentence_encoder: bool = False
    public: bool = False

    def say(self, message: str) -> None:
        """Tell the user, once."""
        if self.workers.is_main:
            say(message)


@dataclass
class Session:
    """The dense model of a job, and what is known about it so far."""

    job: Job
    options: PruneOptions
    model: PreTrainedModel
    resources: Resources
    seconds: dict[str, float]  # of the steps that all budgets share
    dense: Measured = field(default_factory=lambda: Measured({}, 0.0, 0, 0))
    rounding: Rounding | None = None  # where --round_to is found by measuring
    calibrated: Calibrated | None = None
    dense_onnx: OnnxModel | None = None
    cards: dict[Path, Card] = field(default_factory=dict)  # of folders without figures yet

    @property
    def lazily(self) -> bool:
        """Whether the model passes block by block."""
        return self.resources.offload is not None

    def target(self, budget: Budget, name: str) -> Path:
        """Where the checkpoint for a budget goes: ``name`` below the output folder, unless the user gave a place."""
        options = self.options
        if options.save_dir is None:
            return options.output_dir / name
        return options.save_dir if len(options.mu) == 1 else options.save_dir / f"mu{budget.mu:g}"

    @cached_property
    def fingerprint(self) -> str:
        """Of the dense model's weights and the calibration examples."""
        location = Path(self.job.source.location)
        files = sorted(location.glob("*.safetensors")) if location.is_dir() else []
        return fingerprint(self.model, self.job.batches, files)

    @cached_property
    def side_folder(self) -> Path | None:
        """Folder with the dense model's card and what sentence-transformers needs, where it can be had."""
        return side_folder(self.job.source)

    def card(self, folder: Path, title: str, **found: Any) -> str:
        """The model card of a folder for now; it gets figures once there are some.

        Args:
            folder: Of a checkpoint.
            title: First line of the card.
            **found: Fields of :class:`~shrinkformer.commands.cards.Card`: what a step did.
        """
        job = self.job
        self.cards[folder] = Card(
            f"{job.source.name} for {job.task_name} {title}",
            job.source.name,
            folder,
            stock_class(type(self.model)).__name__,
            sentence_encoder=job.sentence_encoder,
            inherited=inherited(job.source, self.side_folder),
            public=job.public,
            **found,
        )
        return self.cards[folder].text()

    def open_blocks(self, kind: Callable[..., Blocks], target: Path, suffix: str, asked: str = "") -> Blocks:
        """Open a place for finished blocks, and with ``--resume`` take up those of an interrupted run.

        Args:
            kind: A kind of :class:`~shrinkformer.prune.resume.BlockFiles`.
            target: What the blocks are for; they lie beside it, or below the folder for large data.
            suffix: Tells them from it.
            asked: What they depend on beside the model and the examples.

        Raises:
            InputError: What is there depends on something else.
        """
        job, options, key = self.job, self.options, self.fingerprint + asked
        base = target if options.offload_dir is None else options.offload_dir / target.name
        folder = base.with_name(f"{base.name}.{suffix}")
        if folder.exists() and not options.resume:
            job.say(f"starting anew; --resume would take up what an interrupted run left in {folder}")
        if job.workers.is_main:
            kind(folder, key, resume=options.resume)  # deletes what is not to be taken up, before others look
        job.workers.barrier()
        return kind(folder, key, resume=True)

    def run(self, budget: Budget, seconds: dict[str, float], **found: Any) -> Run:
        """The report on one budget: what was asked for, beside what a step found."""
        job, options = self.job, self.options
        return Run(
            task_name=job.task_name,
            model_name=job.source.name,
            method=options.method,
            mu=found.pop("mu", budget.mu),
            seed=options.seed,
            sample_batch_size=options.sample_batch_size,
            calibration_tokens=count_tokens(job.batches),
            device=job.device,
            seconds=seconds | {"total": sum(seconds.values())},
            peak_memory_bytes=peak_memory_bytes(job.device),
            rounding=self.rounding,
            dense_layers=layer_sizes(layer_views(self.model)),
            **found,
        )


Step = Callable[[Session, Budget], Run]


def run_job(job: Job, options: PruneOptions, seconds: dict[str, float], step: Step) -> None:
    """Take a step for every budget that was asked for, and report.

    Args:
        job: The model and the task.
        options: Of the command.
        seconds: Time that was spent already, by step.
        step: What is done for one budget.

    Raises:
        InputError: The model does not fit into memory, and has to.
    """
    if job.source.quantized and options.calibrates:
        raise InputError(
            f"--model_name {job.source.name}: it is quantized already; pass the float checkpoint it was made from."
        )
    shapes = empty_model(job.source, job.chosen)
    footprint = Footprint.of(
        shapes,
        count_tokens(job.batches),
        options.batch_size,
        job.sequence_length,
        job.dtype,
        quantizes=options.quantizes,
        shrinks=options.shrinks,
    )
    limit = available_bytes(job.device) * 0.8 if options.max_memory is None else options.max_memory * GIB
    lazily = job.workers.broadcast(footprint.resident > limit)  # what is free differs from moment to moment
    whole, remedy = job.whole, "or use a machine with more"
    if not whole and options.measures_whole:
        whole, remedy = f"--method {options.method} measures a model as a whole", "or pass --method stat"
    if lazily and whole:
        raise InputError(
            f"--max_memory: {whole}, which takes {footprint.resident / GIB:,.1f} GiB, but {limit / GIB:,.1f} GiB "
            f"are allowed or free; allow more, {remedy}."
        )
    rounding = _measured_rounding(job, options, shapes)
    round_to = options.round_to if rounding is None else rounding.multiple
    round_to = 1 if round_to is None else round_to
    limits = Budget(1.0, job.sequence_length, round_to, options.min_heads, options.min_neurons)
    budgets = [replace(limits, mu=mu, uniform=options.uniform and mu < 1) for mu in options.mu]
    if options.dry_run:
        job.say(describe(job, shapes, budgets, options, footprint=footprint, limit=limit))
        return
    for budget in budgets:
        costs = CostModel.of(layer_views(shapes), budget)
        if options.budget == "macs":  # time is not known yet
            require_feasible(costs)
    if any(budget.uniform for budget in budgets):
        job.say(f"--uniform: {describe_limits(find_architecture(shapes.config.model_type), shapes.config)}")
    session = _start(job, options, seconds, lazily=lazily, limit=limit)
    session.rounding = rounding
    job.say(f"evaluating the dense model on {job.task_name}")
    location = Path(job.source.location)
    with timed(seconds, "evaluation"):
        session.dense = measure(session, session.model, session.resources, location)
    if any(budget.mu < 1 for budget in budgets):
        _calibrate(session)
    publisher = Publisher(
        options.push_to_hub,
        private=options.private,
        several=len(budgets) > 1,
        report_to=options.report_to,
        say=job.say,
    )
    for budget in budgets:
        run = step(session, budget)
        if job.workers.is_main:
            say("\n" + run.table())
            stem = options.output_dir / job.stem
            say(f"  report: {write_report(run, stem)}\n")
            publisher.take(run, session.cards.values(), stem.parent / "runs" / f"{stem.name}-mu{budget.mu:g}")
        session.cards.clear()
    if session.resources.store is not None and job.workers.is_main:
        session.resources.store.clear()
    publisher.close()


def _measured_rounding(job: Job, options: PruneOptions, shapes: PreTrainedModel) -> Rounding | None:
    """What ``--round_to auto`` stands for; None where nothing is asked for or pruned, and on a dry run."""
    if options.round_to is not None or options.dry_run or not any(mu < 1 for mu in options.mu):
        return None
    view = layer_views(shapes)[0]
    found = None
    if job.workers.is_main:
        gated = view.architecture.feed_forward.gated
        found = choose_multiple(view.hidden_size, view.neurons, gated=gated, device=job.device, dtype=job.dtype)
    rounding = job.workers.broadcast(found)
    job.say(f"--round_to auto: {rounding}")
    return rounding


def _start(job: Job, options: PruneOptions, seconds: dict[str, float], *, lazily: bool, limit: float) -> Session:
    how = "; its blocks stay on disk until they are needed (--max_memory)" if lazily else ""
    job.say(f"loading {job.source.name} from {job.source.location}{how}")
    with timed(seconds, "loading"):
        model, weights = load_model(job.source, job.chosen, job.device, job.dtype, lazily=lazily)
        offload = None
        if lazily:
            offload = Offload(options.offload_dir or (options.output_dir / job.stem).parent, int(limit / 4))
        session = Session(job, options, model, Resources(weights, offload, None, job.workers), seconds)
        if any(mu < 1 for mu in options.mu):
            # Our method keeps other moments, of fewer examples.
            asked = f"{SHRINK} {options.keeps_whole_heads}" if options.shrinks else ""
            store = session.open_blocks(BlockStore, options.output_dir / job.folder, "resume", asked)
            session.resources = replace(session.resources, store=store)
    return session


def _calibrate(session: Session) -> None:
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
        config=ShrinkConfig(
            whole_heads=options.keeps_whole_heads,
            search_seconds=options.search_seconds,
            latency_shape=(options.latency_shape[0], options.latency_shape[1]) if options.budget == "latency" else None,
            say=lambda line: job.say(f"  {line}"),
        ),
    )
    session.seconds |= session.calibrated.seconds


def measure(session: Session, model: PreTrainedModel, resources: Resources, folder: Path) -> Measured:
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
