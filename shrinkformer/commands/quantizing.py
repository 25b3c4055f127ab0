"""What quantizing commands do for one budget: prune if asked to, quantize, save, check what was saved, measure."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from shrinkformer.commands.cards import quantized_card
from shrinkformer.commands.console import block_progress
from shrinkformer.commands.locate import empty_model
from shrinkformer.commands.pruning import round_weights
from shrinkformer.commands.quantize_options import QuantizeOptions
from shrinkformer.commands.report import Measured, Run
from shrinkformer.commands.session import Job, Session, measure, run_job
from shrinkformer.efficiency.latency import measure_latency
from shrinkformer.efficiency.size import peak_memory_bytes
from shrinkformer.errors import CheckpointError
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.checkpoint import describe_sizes
from shrinkformer.prune.pruner import Pruned, timed
from shrinkformer.prune.stream import count_tokens
from shrinkformer.quantize.checkpoint import ONNX, load, save
from shrinkformer.quantize.quantizer import Quantized, quantize_, require_groups
from shrinkformer.utils.inputs import accepted_inputs

_FLOAT_TOLERANCE = 0.05
"""Largest difference of outputs, relative to the largest output, when decoded weights are rounded to 16 bits."""


def run_quantizing(job: Job, options: QuantizeOptions, seconds: dict[str, float]) -> None:
    """Quantize a model, after pruning it to each budget that was asked for, and report.

    Args:
        job: The model and the task.
        options: Of the command.
        seconds: Time that was spent already, by step.

    Raises:
        InputError: The model does not fit into memory, or a group is wider than a layer.
    """
    require_groups(empty_model(job.source, job.chosen), options.quantization(job.source.dtype))
    run_job(replace(job, whole=job.whole or "quantizing"), options, seconds, quantize_once)


def quantize_once(session: Session, budget: Budget) -> Run:
    """Prune to one budget, quantize and measure; the checkpoint is on disk before anything is measured."""
    job, options, seconds = session.job, session.options, dict(session.seconds)
    assert isinstance(options, QuantizeOptions)
    pruned, measured = _prune(session, budget, seconds)
    model = copy.deepcopy(session.model) if pruned is None else copy.deepcopy(pruned.model)
    job.say(f"quantizing to {options.bits} bits by {options.quantizer}")
    found = quantize_(
        model,
        job.batches,
        options.quantization(job.source.dtype),
        dense=None if pruned is None else session.model,
        progress=block_progress("quantizing") if job.workers.is_main else iter,
        resources=replace(session.resources, store=None),
    )
    seconds |= found.seconds
    with timed(seconds, "saving"):
        folder = _save(session, budget, model, pruned, found)
    with timed(seconds, "evaluation"):
        quantized = measure(session, model, replace(session.resources, store=None), folder)
        latency = _latency(session, pruned, model)
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
        dense=replace(session.dense, latency_ms=latency["dense"]),
        pruned=None if measured is None else replace(measured, latency_ms=latency["pruned"]),
        plan=None if pruned is None else pruned.plan,
        save_dir=folder,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(job.device),
        quantized=replace(quantized, latency_ms=latency["quantized"]),
        quantization=found,
        sequence_length=job.sequence_length,
    )


def _prune(session: Session, budget: Budget, seconds: dict[str, float]) -> tuple[Pruned | None, Measured | None]:
    """The pruned model with its figures; nothing at a budget of 1."""
    if session.calibrated is None or budget.mu == 1:
        return None, None
    session.job.say(f"pruning to mu {budget.mu:g} by {session.options.method}")
    result = session.calibrated.prune(budget)
    seconds |= result.seconds
    with timed(seconds, "evaluation"):
        nowhere = Path("not saved")
        return result, measure(session, result.model, replace(session.resources, store=None), nowhere)


def _save(session: Session, budget: Budget, model: PreTrainedModel, pruned: Pruned | None, found: Quantized) -> Path:
    """Write every format that was asked for and read it again; the folder of the first one."""
    job, options = session.job, session.options
    assert isinstance(options, QuantizeOptions)
    plan = None if pruned is None else pruned.plan
    if plan is not None:
        describe_sizes(model, plan)
    _round_the_rest(model, found, job.source.dtype)
    title = f"{job.source.name} for {job.task_name} in {options.bits} bits"
    folders = _targets(job, options, budget)
    for kind, folder in folders.items():
        if job.workers.is_main:
            card = quantized_card(title, found, plan, job.source.name, kind)
            example = {name: value[:2].clone() for name, value in job.batches[0].items()}
            save(
                model,
                found.weights,
                folder,
                format=kind,
                dtype=job.source.dtype,
                plan=plan,
                tokenizer=job.tokenizer,
                card=card,
                extras_from=Path(job.source.location),
                example=example,
            )
            _require_equal_outputs(job, model, folder, kind)
        job.workers.barrier()
    return next(iter(folders.values()))


def _round_the_rest(model: PreTrainedModel, found: Quantized, dtype: torch.dtype) -> None:
    """Round what is not quantized to the type of the file, so that what is measured is what is in the file."""
    quantized = {f"{name}.weight" for name in found.weights}
    round_weights(model, dtype, but=quantized)


def _targets(job: Job, options: QuantizeOptions, budget: Budget) -> Mapping[str, Path]:
    name = f"w{options.bits}" + (f"g{options.group_size}" if options.group_size > 0 else "")
    stem = f"{job.folder}-mu{budget.mu:g}-{name}" if budget.mu < 1 else f"{job.folder}-{name}"
    base = options.output_dir / stem
    if options.save_dir is not None:
        base = options.save_dir if len(options.mu) == 1 else options.save_dir / f"mu{budget.mu:g}"
    first, *others = options.format
    return {first: base, **{kind: base.with_name(f"{base.name}-{kind}") for kind in others}}


def _require_equal_outputs(job: Job, model: PreTrainedModel, folder: Path, kind: str) -> None:
    """Check that a saved model comes back the same.

    Raises:
        CheckpointError: The reloaded model gives other outputs.
    """
    if kind == ONNX:
        job.say(f"saved to {folder}; ONNX Runtime gives equal outputs to 1e-4")
        return
    batch = accepted_inputs(model, {name: value[:4] for name, value in job.batches[0].items()})
    reloaded: Any = load(folder, dtype=job.dtype) if kind != "float" else _load_float(job, folder)
    with torch.inference_mode():
        ours, theirs = model(**batch)[0], reloaded.to(job.device).eval()(**batch)[0]
    tolerance = _FLOAT_TOLERANCE * float(ours.abs().max()) if kind == "float" else 0.0
    if float((ours - theirs).abs().max()) > tolerance:
        raise CheckpointError(f"{folder}: the reloaded model gives other outputs; please report this.")
    same = "about equal outputs, as decoded weights are rounded" if kind == "float" else "equal outputs"
    job.say(f"saved to {folder}; reloaded, it gives {same}")


def _load_float(job: Job, folder: Path) -> PreTrainedModel:
    """A folder of ordinary weights: pruned, or of stock shape."""
    if getattr(job.source.config, "shrinkformer", None) or (folder / "pruned_modeling.py").exists():
        return load(folder, dtype=job.dtype)
    model: PreTrainedModel = job.chosen.from_pretrained(folder, dtype=job.dtype)
    return model


def _latency(session: Session, pruned: Pruned | None, model: PreTrainedModel) -> dict[str, dict[str, float]]:
    """Of the models as they run here: with decoded weights, so quantizing alone makes nothing faster."""
    models = {"dense": session.model, "quantized": model}
    if pruned is not None:
        models["pruned"] = pruned.model
    if not session.job.workers.is_main:
        return {name: {} for name in models}
    size = session.job.source.config.vocab_size
    return measure_latency(models, session.job.shapes, device=session.job.device, vocabulary_size=size)
