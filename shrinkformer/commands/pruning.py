"""What pruning commands do for one budget: prune, save, check what was saved, measure."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from shrinkformer.commands.exporting import ONNXRUNTIME, describe_onnx, time_onnx, write_onnx
from shrinkformer.commands.locate import load_model
from shrinkformer.commands.options import PruneOptions
from shrinkformer.commands.preflight import Checks
from shrinkformer.commands.report import Measured, Run
from shrinkformer.commands.running import run_job
from shrinkformer.commands.session import Job, Session, measure, target
from shrinkformer.efficiency.latency import measure_latency
from shrinkformer.errors import CheckpointError
from shrinkformer.export.onnx_export import TOLERANCE, require_exportable
from shrinkformer.pictures.columns import exact
from shrinkformer.prune.budget import Budget, CostModel, Counts
from shrinkformer.prune.checkpoint import load, save
from shrinkformer.prune.plan import Plan
from shrinkformer.prune.ranked import Ranked
from shrinkformer.prune.result import timed
from shrinkformer.prune.stock import is_stock
from shrinkformer.prune.streamed import prune_to_folder
from shrinkformer.utils.files import write_atomically
from shrinkformer.utils.inputs import accepted_inputs
from shrinkformer.utils.precision import rounded


def run_pruning(job: Job, options: PruneOptions, seconds: dict[str, float]) -> None:
    """Prune a model to every budget that was asked for, and report.

    Args:
        job: The model and the task.
        options: Of the command.
        seconds: Time that was spent already, by step.

    Raises:
        InputError: The model does not fit into memory, and has to.
    """
    if options.export is not None:
        job = replace(job, whole=job.whole or f"--export {options.export} takes the whole model")
    run_job(job, options, seconds, prune_once, _checks(options))


def _checks(options: PruneOptions) -> Checks:
    def shapes(_job: Job, model: PreTrainedModel, _budgets: Sequence[CostModel]) -> None:
        if options.export is not None:
            require_exportable(model)

    def targets(job: Job, _model: PreTrainedModel, costs: CostModel) -> list[Path]:
        return [_target(job, options, costs.budget)] if costs.budget.mu < 1 else []

    def sizes(job: Job, _model: PreTrainedModel, _kept: Counts, parameters: int) -> dict[str, int]:
        return {"": parameters * job.source.dtype.itemsize}

    return Checks(shapes, targets, sizes)


def _target(job: Job, options: PruneOptions, budget: Budget) -> Path:
    return target(options, budget, f"{job.folder}-mu{budget.amount}")


def prune_once(session: Session, budget: Budget) -> Run:
    """Prune to one budget and measure the result; the checkpoint is on disk before anything is measured."""
    job, options, seconds = session.job, session.options, dict(session.seconds)
    dense, pruned, plan, folder = session.dense, None, None, None
    if session.calibrated is not None and budget.mu < 1:
        job.say(f"pruning to mu {budget.amount} by {options.method}")
        folder = _target(job, options, budget)
        step = _prune_lazily if session.lazily else _prune_in_memory
        dense, pruned, plan = step(session, budget, folder, seconds)
    return session.run(budget, seconds, dense=dense, pruned=pruned, plan=plan, save_dir=folder)


def _prune_in_memory(
    session: Session, budget: Budget, folder: Path, seconds: dict[str, float]
) -> tuple[Measured, Measured, Plan]:
    job, calibrated = session.job, session.calibrated
    assert calibrated is not None
    result = calibrated.prune(budget)
    seconds |= result.seconds
    with timed(seconds, "saving"):
        # The model in memory is rounded to the type of the file, so that what is measured is what is in the file.
        cast_weights(result.model, job.source.dtype)
        if job.workers.is_main:
            save(
                result.model,
                folder,
                plan=result.plan,
                tokenizer=job.tokenizer,
                card=_card(session, folder, result.plan, custom=not is_stock(result.model.config)),
                extras_from=session.side_folder,
                sentence_encoder=job.sentence_encoder,
            )
        cast_weights(result.model, job.dtype)
        if job.workers.is_main:
            _require_equal_outputs(job, result.model, folder)
        job.workers.barrier()
    runtimes = _export(session, result.model, folder, seconds)
    with timed(seconds, "evaluation"):
        pruned = measure(session, result.model, replace(session.resources, store=None), folder)
        models = {"dense": calibrated.model, "pruned": result.model}
        vocabulary = job.source.config.vocab_size
        latency = (
            measure_latency(models, job.shapes, device=job.device, vocabulary_size=vocabulary)
            if job.workers.is_main
            else {name: {} for name in models}
        )
    dense = replace(session.dense, latency_ms=latency["dense"], runtimes=runtimes.get("dense", {}))
    pruned = replace(pruned, latency_ms=latency["pruned"], runtimes=runtimes.get("pruned", {}))
    return dense, pruned, result.plan


def _card(session: Session, folder: Path, plan: Plan, *, custom: bool) -> str:
    return session.card(folder, f"at {exact(plan.mu)} of its MACs", plan=plan, custom=custom)


def _export(
    session: Session, model: PreTrainedModel, folder: Path, seconds: dict[str, float]
) -> dict[str, dict[str, dict[str, float]]]:
    """Write and time what ``--export`` asks for; milliseconds by model, runtime and shape."""
    job = session.job
    if session.options.export is None or not job.workers.is_main:
        return {}
    with timed(seconds, "export"):
        path = write_onnx(model, folder, job.example)
        describe_onnx(folder, model)
        job.say(f"exported to {path}; ONNX Runtime gives equal outputs to {TOLERANCE:g}")
        times = time_onnx(session, path)
    return {name: {ONNXRUNTIME: found} for name, found in times.items()}


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Change the type of all that a file holds; rotary frequencies, which none does, must not be rounded.

    Raises:
        NumericalError: A weight is too large for the type.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = rounded(name, tensor.data, dtype)


def round_weights(model: PreTrainedModel, dtype: torch.dtype, *, but: Collection[str]) -> None:
    """Round all that a file holds to the type of the file, but keep the type, and some weights as they are.

    Raises:
        NumericalError: A weight is too large for the type of the file.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and name not in but:
            tensor.data = rounded(name, tensor.data, dtype).to(tensor.dtype)


def _require_equal_outputs(job: Job, model: PreTrainedModel, folder: Path) -> None:
    """Check that a saved model comes back the same.

    Raises:
        CheckpointError: The reloaded model gives other outputs.
    """
    batch = accepted_inputs(model, {name: value[:4] for name, value in job.example.items()})
    reloaded: Any = load(folder, dtype=job.dtype)
    with torch.inference_mode():
        if not torch.equal(model(**batch)[0], reloaded.to(job.device).eval()(**batch)[0]):
            raise CheckpointError(f"{folder}: the reloaded model gives other outputs; please report this.")
    job.say(f"saved to {folder}; reloaded, it gives equal outputs")


def _prune_lazily(
    session: Session, budget: Budget, folder: Path, seconds: dict[str, float]
) -> tuple[Measured, Measured, Plan]:
    """Prune and evaluate with one block in memory; no latency, because the models do not fit."""
    job, calibrated = session.job, session.calibrated
    assert isinstance(calibrated, Ranked)  # others need the whole model
    plan, spent = prune_to_folder(
        calibrated, budget, folder, dtype=job.source.dtype, tokenizer=job.tokenizer, extras_from=session.side_folder
    )
    seconds |= spent
    job.workers.barrier()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if job.workers.is_main:
        custom = not is_stock(config)
        write_atomically(folder / "README.md", _card(session, folder, plan, custom=custom))
    job.say(f"saved to {folder}")
    with timed(seconds, "evaluation"):
        saved = replace(job.source, location=str(folder), config=config)
        model, weights = load_model(saved, job.chosen, job.device, job.dtype, lazily=True)
        pruned = measure(session, model, replace(session.resources, weights=weights), folder)
    return session.dense, pruned, plan
