"""What quantizing commands do for one budget: prune if asked to, quantize, save, check what was saved, measure."""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from shrinkformer.commands.console import block_progress
from shrinkformer.commands.locate import load_model, model_class
from shrinkformer.commands.preflight import Checks
from shrinkformer.commands.pruning import round_weights
from shrinkformer.commands.quantize_options import QuantizeOptions
from shrinkformer.commands.report import Measured, Run
from shrinkformer.commands.running import run_job
from shrinkformer.commands.session import Job, Session, measure, target
from shrinkformer.efficiency.latency import measure_latency
from shrinkformer.errors import CheckpointError
from shrinkformer.export.onnx_export import require_exportable
from shrinkformer.export.runtime import require_onnx
from shrinkformer.pictures.columns import exact
from shrinkformer.prune.budget import Budget, CostModel, Counts
from shrinkformer.prune.checkpoint import describe_sizes
from shrinkformer.prune.plan import Plan
from shrinkformer.prune.ranked import Ranked
from shrinkformer.prune.result import Pruned, timed
from shrinkformer.prune.statistics import Batches, Progress
from shrinkformer.prune.stock import is_stock
from shrinkformer.quantize.checkpoint import load, save
from shrinkformer.quantize.config import Quantized
from shrinkformer.quantize.names import ONNX
from shrinkformer.quantize.outside import require_outside
from shrinkformer.quantize.planned import planned_bytes, planned_layers, possible_groups, require_formats
from shrinkformer.quantize.quantizer import quantize_, require_groups
from shrinkformer.quantize.resume import QuantizedBlocks
from shrinkformer.quantize.streamed import quantize_to_folder
from shrinkformer.utils.files import scratch_beside, write_atomically
from shrinkformer.utils.inputs import accepted_inputs

_FLOAT_TOLERANCE = 0.05
"""Largest difference of outputs, relative to the largest output, when decoded weights are rounded to 16 bits."""


@dataclass
class _Outcome:
    """What a step found, in memory or block by block."""

    quantization: Quantized
    quantized: Measured
    folder: Path
    pruned: Measured | None = None
    plan: Plan | None = None
    latency: dict[str, dict[str, float]] = field(default_factory=dict)


def run_quantizing(job: Job, options: QuantizeOptions, seconds: dict[str, float]) -> None:
    """Quantize a model, after pruning it to each budget that was asked for, and report.

    Args:
        job: The model and the task.
        options: Of the command.
        seconds: Time that was spent already, by step.

    Raises:
        InputError: The model does not fit into memory and has to, or a group is wider than a layer.
    """
    if ONNX in options.format:
        require_onnx("--format onnx")
        job = replace(job, whole=job.whole or "--format onnx exports the whole model")
    if len(options.format) > 1:
        job = replace(job, whole=job.whole or "several values of --format are written from memory")
    if options.also:
        job = replace(job, whole=job.whole or "--also quantizes what stands outside the blocks")
    run_job(job, options, seconds, quantize_once, _checks(options))


def _checks(options: QuantizeOptions) -> Checks:
    def shapes(job: Job, model: PreTrainedModel, budgets: Sequence[CostModel]) -> None:
        config = options.quantization(job.source.dtype)
        require_groups(model, config)
        require_outside(model, config)
        require_formats(model, config, options.format, budgets)
        if ONNX in options.format:
            require_exportable(model)

    def targets(job: Job, model: PreTrainedModel, costs: CostModel) -> list[Path]:
        sizes = sorted(possible_groups(model, options.quantization(job.source.dtype), costs))
        ranges = [(low, high) for low in sizes for high in sizes if low <= high]
        found = [targets_of(job, options, costs.budget, some) for some in ranges]
        return [folder for some in found for folder in some.values()]

    def sizes(job: Job, model: PreTrainedModel, kept: Counts, parameters: int) -> dict[str, int]:
        layers, dtype = planned_layers(model, options.quantization(job.source.dtype), kept), job.source.dtype
        return {kind: planned_bytes(model, kind, layers, parameters, dtype) for kind in options.format}

    return Checks(shapes, targets, sizes)


def quantize_once(session: Session, budget: Budget) -> Run:
    """Prune to one budget, quantize and measure; the checkpoint is on disk before anything is measured."""
    seconds = dict(session.seconds)
    found = (_quantize_lazily if session.lazily else _quantize_in_memory)(session, budget, seconds)
    latency = found.latency
    return session.run(
        budget,
        seconds,
        dense=replace(session.dense, latency_ms=latency.get("dense", {})),
        pruned=None if found.pruned is None else replace(found.pruned, latency_ms=latency.get("pruned", {})),
        plan=found.plan,
        save_dir=found.folder,
        quantized=replace(found.quantized, latency_ms=latency.get("quantized", {})),
        quantization=found.quantization,
    )


def _quantize_in_memory(session: Session, budget: Budget, seconds: dict[str, float]) -> _Outcome:
    job, options = session.job, _options(session)
    pruned, measured = _prune(session, budget, seconds)
    model = copy.deepcopy(session.model if pruned is None else pruned.model)
    store = _open_store(session, budget, None if pruned is None else pruned.plan)
    job.say(f"quantizing to {options.bits} bits by {options.quantizer}")
    found = quantize_(
        model,
        examples(job),
        options.quantization(job.source.dtype),
        dense=None if pruned is None else session.model,
        progress=quantizing_progress(job),
        resources=replace(session.resources, store=None),
        store=store,
        objective=job.objective,
    )
    seconds |= found.seconds
    with timed(seconds, "saving"):
        folder = save_formats(session, budget, model, pruned, found)
    with timed(seconds, "evaluation"):
        quantized = measure(session, model, replace(session.resources, store=None), folder)
        latency = latency_of(session, pruned, model)
    return _Outcome(found, quantized, folder, measured, None if pruned is None else pruned.plan, latency)


def _quantize_lazily(session: Session, budget: Budget, seconds: dict[str, float]) -> _Outcome:
    """Prune, quantize and evaluate with one block in memory; the pruned model alone is not measured."""
    job, options, offload = session.job, _options(session), session.resources.offload
    assert offload is not None
    offload.directory.mkdir(parents=True, exist_ok=True)
    assert session.calibrated is None or isinstance(session.calibrated, Ranked)  # others need the whole model
    pruning = None if session.calibrated is None or budget.mu == 1 else (session.calibrated, budget)
    config, counts = options.quantization(job.source.dtype), None if pruning is None else pruning[0].allocate(budget)
    groups = {layer.scheme.group_size for layer in planned_layers(session.model, config, counts).values()}
    (kind, folder), *_ = targets_of(job, options, budget, groups).items()
    store = _open_store(session, budget)
    aware = options.quantization(job.source.dtype).recipe.output_aware
    without = "; errors are not weighed by their effect, which takes the whole model in memory" if aware else ""
    job.say(f"quantizing to {options.bits} bits by {options.quantizer}, block by block{without}")
    with scratch_beside(offload.directory / "decoded") as scratch:
        decoded = Path(job.workers.broadcast(str(scratch)))
        found, plan = quantize_to_folder(
            session.model,
            examples(job),
            options.quantization(job.source.dtype),
            folder,
            format=kind,
            dtype=job.source.dtype,
            resources=replace(session.resources, store=None),
            pruning=pruning,
            decoded=decoded,
            tokenizer=job.tokenizer,
            extras_from=session.side_folder,
            progress=quantizing_progress(job),
            store=store,
        )
        seconds |= found.seconds
        if job.workers.is_main:
            custom = not is_stock(AutoConfig.from_pretrained(folder, trust_remote_code=False))
            write_atomically(folder / "README.md", _card(session, folder, found, plan, kind, custom=custom))
        job.say(f"saved to {folder}")
        with timed(seconds, "evaluation"):
            saved = replace(job.source, location=str(decoded), config=AutoConfig.from_pretrained(decoded))
            model, weights = load_model(saved, model_class(saved, None), job.device, job.dtype, lazily=True)
            quantized = measure(session, model, replace(session.resources, weights=weights), folder)
        job.workers.barrier()
    return _Outcome(found, quantized, folder, plan=plan)


def examples(job: Job) -> Batches:
    """What quantizers look at; one that looks at nothing gets what the result is checked with."""
    return job.batches or [dict(job.example)]


def _options(session: Session) -> QuantizeOptions:
    assert isinstance(session.options, QuantizeOptions)
    return session.options


def _open_store(session: Session, budget: Budget, plan: Plan | None = None) -> QuantizedBlocks | None:
    """Where finished blocks are kept until they are in a checkpoint.

    What a plan keeps is part of their key: a search that is cut short may end at another one.
    """
    job, options = session.job, _options(session)
    kept = None if plan is None else [replace(layer, attention_error=0.0, ffn_error=0.0) for layer in plan.layers]
    asked = str((options.quantization(job.source.dtype), session.lazily, kept))
    return session.ledger.quantized(QuantizedBlocks, budget, asked)


def quantizing_progress(job: Job) -> Progress:
    """A bar that one process shows."""
    return block_progress("quantizing") if job.workers.is_main else iter


def _card(session: Session, folder: Path, found: Quantized, plan: Plan | None, kind: str, *, custom: bool) -> str:
    title = f"in {found.config.amount}"
    return session.card(folder, title, kind=kind, quantized=found, plan=plan, custom=custom)


def _prune(session: Session, budget: Budget, seconds: dict[str, float]) -> tuple[Pruned | None, Measured | None]:
    """The pruned model with its figures; nothing at a budget of 1."""
    if session.calibrated is None or budget.mu == 1:
        return None, None
    session.job.say(f"pruning to mu {budget.amount} by {session.options.method}")
    result = session.calibrated.prune(budget)
    seconds |= result.seconds
    with timed(seconds, "evaluation"):
        return result, measure_unsaved(session, result.model)


def measure_unsaved(session: Session, model: PreTrainedModel) -> Measured:
    """Figures of a model, with the bytes that it would have in a file."""
    figures = measure(session, model, replace(session.resources, store=None), Path("not saved"))
    return replace(figures, bytes=figures.bytes * session.job.source.dtype.itemsize // session.job.dtype.itemsize)


def save_formats(
    session: Session, budget: Budget, model: PreTrainedModel, pruned: Pruned | None, found: Quantized
) -> Path:
    """Write every format that was asked for and read it again; the folder of the first one."""
    job = session.job
    plan = None if pruned is None else pruned.plan
    if plan is not None:
        describe_sizes(model, plan)
    _round_the_rest(model, found, job.source.dtype)
    groups = {weight.scheme.group_size for weight in found.weights.values()}
    folders = targets_of(job, _options(session), budget, groups)
    for kind, folder in folders.items():
        if job.workers.is_main:
            example = {name: value[:2].clone() for name, value in job.example.items()}
            save(
                model,
                found.weights,
                folder,
                format=kind,
                dtype=job.source.dtype,
                plan=plan,
                tokenizer=job.tokenizer,
                card=_card(session, folder, found, plan, kind, custom=not is_stock(model.config)),
                extras_from=session.side_folder,
                sentence_encoder=job.sentence_encoder,
                example=example,
                tied_once=found.config.bits_of is not None,
            )
            _require_equal_outputs(job, model, folder, kind)
        job.workers.barrier()
    return next(iter(folders.values()))


def _round_the_rest(model: PreTrainedModel, found: Quantized, dtype: torch.dtype) -> None:
    """Round what is not quantized to the type of the file, so that what is measured is what is in the file."""
    quantized = {f"{name}.weight" for name in found.weights}
    round_weights(model, dtype, but=quantized)


def targets_of(job: Job, options: QuantizeOptions, budget: Budget, groups: Collection[int]) -> Mapping[str, Path]:
    """The folder of every format.

    Args:
        job: The model and the task.
        options: Of the command.
        budget: To which the model is pruned before.
        groups: All sizes of groups in the file, which may be smaller than what was asked for.
    """
    if options.target_ratio is None:
        name = f"w{options.bits}"
        whole = [size for size in sorted(groups) if size > 0]
        name += "g" + "-".join(map(str, dict.fromkeys((whole[0], whole[-1])))) if whole else ""
    else:
        name = f"bytes{exact(options.target_ratio)}"
    stem = f"{job.folder}-mu{budget.amount}-{name}" if budget.mu < 1 else f"{job.folder}-{name}"
    base = target(options, budget, stem)
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
    batch = accepted_inputs(model, {name: value[:4] for name, value in job.example.items()})
    reloaded: Any = load(folder, dtype=job.dtype)
    with torch.inference_mode():
        ours, theirs = model(**batch)[0], reloaded.to(job.device).eval()(**batch)[0]
    tolerance = _FLOAT_TOLERANCE * float(ours.abs().max()) if kind == "float" else 0.0
    if float((ours - theirs).abs().max()) > tolerance:
        raise CheckpointError(f"{folder}: the reloaded model gives other outputs; please report this.")
    same = "about equal outputs, as decoded weights are rounded" if kind == "float" else "equal outputs"
    job.say(f"saved to {folder}; reloaded, it gives {same}")


def latency_of(session: Session, pruned: Pruned | None, model: PreTrainedModel) -> dict[str, dict[str, float]]:
    """Of the models as they run here: with decoded weights, so quantizing alone makes nothing faster."""
    models = {"dense": session.model, "quantized": model}
    if pruned is not None:
        models["pruned"] = pruned.model
    if not session.job.workers.is_main:
        return {name: {} for name in models}
    size = session.job.source.config.vocab_size
    return measure_latency(models, session.job.shapes, device=session.job.device, vocabulary_size=size)
