"""What quantizing commands do with ``--target_ratio``: choose sizes and bits for a number of bytes, then as ever."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from shrinkformer.commands.preflight import Checks
from shrinkformer.commands.quantize_options import QuantizeOptions
from shrinkformer.commands.quantizing import latency_of, measure_unsaved, quantizing_progress, save_formats, targets_of
from shrinkformer.commands.report import Run
from shrinkformer.commands.running import run_job
from shrinkformer.commands.session import Job, Session, measure
from shrinkformer.efficiency.size import count_parameters, folder_bytes
from shrinkformer.errors import CheckpointError
from shrinkformer.prune.budget import Budget, CostModel, Counts
from shrinkformer.prune.names import SHRINK
from shrinkformer.prune.result import timed
from shrinkformer.prune.shrink_config import ShrinkConfig
from shrinkformer.quantize.byte_budget import Compressed, Compressor, learn_bytes, require_bytes
from shrinkformer.quantize.quantizer import require_groups

_ATTEMPTS = 3


def run_target_ratio(job: Job, options: QuantizeOptions, seconds: dict[str, float]) -> None:
    """Prune and quantize a model to a fraction of its bytes, and report.

    Args:
        job: The model and the task.
        options: Of the command, with a target ratio.
        seconds: Time that was spent already, by step.

    Raises:
        InputError: The model does not fit into memory, or its layers are of a kind that no packed format holds.
        BudgetError: The smallest model is larger.
    """
    assert options.target_ratio is not None
    job = replace(job, whole=job.whole or "--target_ratio measures whole models")
    run_job(job, replace(options, method=SHRINK), seconds, compress_once, _checks(options, options.target_ratio))


def _checks(options: QuantizeOptions, ratio: float) -> Checks:
    def shapes(job: Job, model: PreTrainedModel, budgets: Sequence[CostModel]) -> None:
        config, location = options.quantization(job.source.dtype), Path(job.source.location)
        require_groups(model, config)
        dense = folder_bytes(location) if location.is_dir() else job.dtype.itemsize * count_parameters(model)
        require_bytes(model, config, budgets[0].budget, ratio, dense)
        if options.dry_run:
            job.say(
                f"target ratio {ratio:g}: at most {ratio * dense / 1e6:,.2f} of {dense / 1e6:,.2f} MB; what is pruned, "
                "and to how many bits, is found by measuring"
            )

    def targets(job: Job, _model: PreTrainedModel, costs: CostModel) -> list[Path]:
        return list(targets_of(job, options, costs.budget, ()).values())

    def sizes(job: Job, _model: PreTrainedModel, _kept: Counts, parameters: int) -> dict[str, int]:
        return {"before it is pruned and quantized": parameters * job.source.dtype.itemsize}

    return Checks(shapes, targets, sizes)


def compress_once(session: Session, budget: Budget) -> Run:
    """Choose, prune, quantize, save and measure; the checkpoint is on disk before anything is measured."""
    job, options, seconds = session.job, session.options, dict(session.seconds)
    assert isinstance(options, QuantizeOptions)
    assert options.target_ratio is not None
    allowed = int(options.target_ratio * session.dense.bytes)
    job.say(f"learning what fewer bits and smaller blocks do; {allowed / 1e6:,.2f} MB are allowed")
    compressor = learn_bytes(
        session.model,
        job.batches,
        options.quantization(job.source.dtype),
        budget,
        ShrinkConfig(search_seconds=options.search_seconds, say=lambda line: job.say(f"  {line}")),
        objective=job.objective,
        seed=options.seed,
        progress=quantizing_progress(job),
        resources=replace(session.resources, store=None),
    )
    seconds |= compressor.seconds
    found, folder = _within(compressor, session, budget, allowed, seconds)
    with timed(seconds, "evaluation"):
        pruned = None if found.pruned is None else measure_unsaved(session, found.pruned.model)
        quantized = measure(session, found.model, replace(session.resources, store=None), folder)
        latency = latency_of(session, found.pruned, found.model)
    plan = None if found.pruned is None else found.pruned.plan
    return session.run(
        budget,
        seconds,
        mu=1.0 if plan is None else plan.ratio,
        dense=replace(session.dense, latency_ms=latency.get("dense", {})),
        pruned=None if pruned is None else replace(pruned, latency_ms=latency.get("pruned", {})),
        plan=plan,
        save_dir=folder,
        quantized=replace(quantized, latency_ms=latency.get("quantized", {})),
        quantization=found.quantized,
        target_ratio=options.target_ratio,
    )


def _within(
    compressor: Compressor, session: Session, budget: Budget, allowed: int, seconds: dict[str, float]
) -> tuple[Compressed, Path]:
    """A model whose file is no larger than allowed, and where it is.

    Raises:
        CheckpointError: The file is larger than what was counted, again and again.
    """
    spare = 0
    for _ in range(_ATTEMPTS):
        with timed(seconds, "allocation"):
            mixtures = compressor.plans(allowed - spare)
        sizes = " or ".join(f"{mixture.bytes / 1e6:,.2f}" for mixture in mixtures)
        session.job.say(f"pruning and quantizing to {sizes} MB")
        found = compressor.best(mixtures)
        seconds |= found.quantized.seconds
        if found.pruned is not None:
            seconds |= found.pruned.seconds
        with timed(seconds, "saving"):
            folder = save_formats(session, budget, found.model, found.pruned, found.quantized)
        size = folder_bytes(folder)
        if size <= allowed:
            return found, folder
        spare += size - allowed
    raise CheckpointError(f"{folder}: {size:,} bytes, {allowed:,} were allowed; please report this.")
