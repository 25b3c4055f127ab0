"""What all commands do once their inputs are read: check, load, evaluate, then a step for each budget, and report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from shrinkformer.architectures import find_architecture, layer_views, require_alike
from shrinkformer.commands.console import block_progress, say
from shrinkformer.commands.dry_run import describe
from shrinkformer.commands.interrupted import alone, finish, is_finished, open_ledger, reported
from shrinkformer.commands.locate import empty_model, load_model, require_all_weights
from shrinkformer.commands.memory import GIB, Footprint, available_bytes
from shrinkformer.commands.options import PruneOptions
from shrinkformer.commands.preflight import Checks, as_input_error, preflight
from shrinkformer.commands.publishing import Publisher
from shrinkformer.commands.report import Run, write_report
from shrinkformer.commands.session import Job, Session, measure_dense
from shrinkformer.efficiency.rounding import Rounding, choose_multiple
from shrinkformer.errors import InputError, warn
from shrinkformer.pictures.overview import overview
from shrinkformer.pictures.run_page import run_title
from shrinkformer.pictures.runs import RunRecord
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.health import require_finite_weights
from shrinkformer.prune.hidden import Offload
from shrinkformer.prune.pruner import calibrate
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.result import timed
from shrinkformer.prune.shrink_config import ShrinkConfig
from shrinkformer.prune.stock import describe_limits
from shrinkformer.prune.stream import count_tokens

Step = Callable[[Session, Budget], Run]


def run_job(job: Job, options: PruneOptions, seconds: dict[str, float], step: Step, checks: Checks) -> None:
    """Take a step for every budget that was asked for, and report.

    Args:
        job: The model and the task.
        options: Of the command.
        seconds: Time that was spent already, by step.
        step: What is done for one budget.
        checks: What this kind of run asks before it begins.

    Raises:
        InputError: The model does not fit into memory, and has to, or :func:`preflight` found something.
    """
    if job.source.quantized and options.calibrates:
        raise InputError(
            f"--model_name {job.source.name}: it is quantized already; pass the float checkpoint it was made from."
        )
    shapes = empty_model(job.source, job.chosen)
    require_all_weights(job.source, shapes)
    footprint, limit = _footprint(job, options, shapes), _limit(job, options)
    lazily = job.workers.broadcast(footprint.resident > limit)  # what is free differs from moment to moment
    if lazily:
        _require_blocks(job, options, shapes, footprint, limit)
    rounding = _measured_rounding(job, options, shapes)
    budgets = _budgets(job, options, rounding)
    preflight(job, options, shapes, budgets, checks)
    if options.dry_run:
        sizes = partial(checks.sizes, job, shapes)
        job.say(describe(job, shapes, budgets, options, footprint=footprint, limit=limit, sizes=sizes))
        return
    if any(budget.uniform for budget in budgets):
        job.say(f"--uniform: {describe_limits(find_architecture(shapes.config.model_type), shapes.config)}")
    with alone(job, options):
        session = _start(job, options, seconds, lazily=lazily, limit=limit)
        session.rounding = rounding
        left = [budget for budget in budgets if not job.workers.broadcast(is_finished(session, budget))]
        if not left:
            return
        if job.sentence_encoder and job.objective is not None:
            job.say(f"sentence embeddings: {job.objective.sentence}")
        job.say(f"evaluating the dense model on {job.task_name}")
        with timed(seconds, "evaluation"):
            session.dense = measure_dense(session)
        if any(budget.mu < 1 for budget in left):
            _calibrate(session)
        _take_steps(session, left, step)


def _take_steps(session: Session, budgets: Sequence[Budget], step: Step) -> None:
    """One after the other, each with its report; what was asked to be sent away goes last."""
    job, options = session.job, session.options
    publisher = Publisher(
        options.push_to_hub,
        private=options.private,
        several=len(budgets) > 1,
        report_to=options.report_to,
        say=job.say,
    )
    records = reported(session)
    for budget in budgets:
        run = step(session, budget)
        if job.workers.is_main:
            records[budget.mu] = run.to_dict()
            say("\n" + run.table())
            stem = options.output_dir / job.stem
            say(f"  report: {write_report(run, stem)}\n")
            publisher.take(run, session.cards.values(), stem.parent / "runs" / f"{stem.name}-mu{budget.amount}")
            if run.save_dir is not None:
                finish(session, budget, run.save_dir)
        session.cards.clear()
    if job.workers.is_main:
        _compare(session, records)
    session.ledger.settle()
    publisher.close()


def _compare(session: Session, records: Mapping[float, Mapping[str, Any]]) -> None:
    """One table with all budgets, in the order in which they were asked for."""
    order = [mu for mu in session.options.mu if mu in records]
    runs = [run for run in (RunRecord.of(dict(records[mu])) for mu in order) if run is not None]
    if len(runs) > 1:
        say(f"all budgets of {run_title(runs)}\n\n{overview(runs, [runs[-1].main_metric]).text}\n")


def _footprint(job: Job, options: PruneOptions, shapes: PreTrainedModel) -> Footprint:
    return Footprint.of(
        shapes,
        count_tokens(job.batches),
        options.batch_size,
        job.sequence_length,
        job.dtype,
        quantizes=options.quantizes,
        shrinks=options.shrinks,
    )


def _limit(job: Job, options: PruneOptions) -> float:
    """Bytes that may be taken."""
    return available_bytes(job.device) * 0.8 if options.max_memory is None else options.max_memory * GIB


def _require_blocks(
    job: Job, options: PruneOptions, shapes: PreTrainedModel, footprint: Footprint, limit: float
) -> None:
    """Check that a model that does not fit into memory may pass block by block.

    Raises:
        InputError: It has to be there as a whole.

    Warns:
        ShrinkformerWarning: One block alone takes more.
    """
    with as_input_error(job.source):
        require_alike(shapes, "pass it block by block, which --max_memory makes necessary")
    whole, remedy = job.whole, "or use a machine with more"
    if not whole and job.source.quantized:
        whole = "weights of a quantized model are decoded as a whole"
    if not whole and options.measures_whole:
        whole, remedy = f"--method {options.method} measures a model as a whole", "or pass --method stat"
    if whole:
        raise InputError(
            f"--max_memory: {whole}, which takes {footprint.resident / GIB:,.1f} GiB, but {limit / GIB:,.1f} GiB "
            f"are allowed or free; allow more, {remedy}."
        )
    if footprint.streamed > limit:
        warn(
            f"--max_memory: one block with its statistics takes about {footprint.streamed / GIB:,.2g} GiB beside "
            f"Python and the libraries, more than the {limit / GIB:,.2g} GiB that are allowed or free; it is tried "
            "all the same"
        )


def _budgets(job: Job, options: PruneOptions, rounding: Rounding | None) -> list[Budget]:
    round_to = options.round_to if rounding is None else rounding.multiple
    limits = Budget(1.0, job.sequence_length, round_to or 1, options.min_heads, options.min_neurons)
    return [replace(limits, mu=mu, uniform=options.uniform and mu < 1) for mu in options.mu]


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
        require_finite_weights(model, stored=job.source.dtype)
        offload = None
        if lazily:
            offload = Offload(options.offload_dir or (options.output_dir / job.stem).parent, int(limit / 4))
        session = Session(job, options, model, Resources(weights, offload, None, job.workers), seconds)
        if options.calibrates:
            open_ledger(session)
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
        progress=block_progress("calibrating and fitting") if job.workers.is_main else iter,
        resources=session.resources,
        objective=job.objective,
        config=ShrinkConfig(
            whole_heads=options.keeps_whole_heads,
            search_seconds=options.search_seconds,
            latency_shape=(options.latency_shape[0], options.latency_shape[1]) if options.budget == "latency" else None,
            say=lambda line: job.say(f"  {line}"),
        ),
    )
    session.seconds |= session.calibrated.seconds
