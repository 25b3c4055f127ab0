"""``shrinkformer latency``: how long models take, side by side, and how much of the saved MACs is saved time."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from shrinkformer.architectures import layer_views
from shrinkformer.architectures.limits import max_positions
from shrinkformer.commands.console import say
from shrinkformer.commands.latency_options import COMPILE, EAGER, ONNX, WARMUP, LatencyOptions
from shrinkformer.commands.latency_report import (
    DECODE,
    FORWARD,
    Cell,
    Row,
    append_records,
    markdown_table,
    text_table,
)
from shrinkformer.commands.locate import Source, class_of, empty_model, find_any, generates, holds_weights, load_model
from shrinkformer.commands.options import resolve_device, torch_dtype
from shrinkformer.commands.runtimes import (
    CachedStep,
    CompiledModel,
    eager,
    export_for,
    find_onnx,
    open_onnx,
    require_compiler,
    require_onnx_packages,
)
from shrinkformer.efficiency.latency import Timed, compare_latency
from shrinkformer.efficiency.macs import LayerSize, model_macs, step_macs
from shrinkformer.errors import InputError, OutOfMemoryError
from shrinkformer.prune.budget import layer_sizes
from shrinkformer.utils.progress import each


@dataclass(frozen=True)
class Candidate:
    """A model to be timed, found and checked; no weight is read yet.

    Attributes:
        name: In the table.
        source: Where it is.
        sizes: Of its blocks.
        hidden_size: Width of its residual stream.
        onnx: Its ONNX file, if it has one.
    """

    name: str
    source: Source
    sizes: tuple[LayerSize, ...]
    hidden_size: int
    onnx: Path | None

    def macs(self, shape: tuple[int, int], step: str, options: LatencyOptions) -> float:
        """MACs of one call; for decoding steps, which see more and more tokens, of the middle one."""
        examples, tokens = shape
        if step == DECODE:
            return examples * step_macs(self.sizes, self.hidden_size, tokens + WARMUP + (options.repeats + 1) / 2)
        return examples * model_macs(self.sizes, self.hidden_size, tokens)


def compare(options: LatencyOptions) -> None:
    """Everything that ``shrinkformer latency`` does."""
    device = resolve_device(options.device)
    candidates = _named([read_candidate(name, options) for name in options.models])
    if ONNX in options.runtime:
        require_onnx_packages()
    if COMPILE in options.runtime:
        require_compiler(device)
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        say(f"loading {', '.join(candidate.name for candidate in candidates)}")
        runs = open_models(candidates, options, device, threads, stack)
        rows = measure(candidates, runs, options, device, threads)
    print_rows(rows, candidates, options, f"{device}, {threads} thread{'s' if threads > 1 else ''}")


def read_candidate(name: str, options: LatencyOptions) -> Candidate:
    """Find a model, and see that it can be timed as it was asked for.

    Raises:
        InputError: It cannot.
    """
    source = find_any(name, "DIR")
    longest = max_positions(source.config)
    if options.longest > longest:
        steps = f" and {options.longest - max(options.length)} decoding steps" if options.decode else ""
        raise InputError(f"--length {max(options.length)}{steps}: {name} takes at most {longest} tokens.")
    if options.decode and not generates(source.config):
        raise InputError(f"--decode: {name} is no language model; leave --decode out.")
    views = layer_views(empty_model(source, class_of(source)))
    folder = Path(source.location)
    onnx = find_onnx(folder)
    if not holds_weights(source) and (onnx is None or set(options.runtime) != {ONNX}):
        remedy = f"use --runtime {ONNX} alone" if onnx else "it is no whole checkpoint"
        raise InputError(f"DIR {name}: it holds no weights that torch loads; {remedy}.")
    return Candidate(source.name, source, layer_sizes(views), views[0].hidden_size, onnx)


def _named(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates whose names differ: with the folder above them where that helps, else with numbers."""
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names):
        longer = [f"{Path(one.source.location).parent.name}/{one.name}" for one in candidates]
        numbered = [f"{name} ({number})" for number, name in enumerate(names, start=1)]
        names = longer if len(set(longer)) == len(longer) else numbered
    return [replace(one, name=name) for name, one in zip(names, candidates, strict=True)]


Run = tuple[str, str, dict[str, Timed]]
"""A runtime, what it does, and the models in it by name."""


def open_models(
    candidates: Sequence[Candidate], options: LatencyOptions, device: str, threads: int, stack: ExitStack
) -> list[Run]:
    """All models in all runtimes.

    Args:
        candidates: The models.
        options: Of the command.
        device: Where they go.
        threads: For runtimes with threads of their own.
        stack: Closes what has to stay open while they run.
    """
    runs: list[Run] = [(runtime, FORWARD, {}) for runtime in options.runtime]
    if options.decode:
        runs.append((EAGER, DECODE, {}))
    for candidate in candidates:
        model = None
        if set(options.runtime) != {ONNX} or candidate.onnx is None:
            model = _load(candidate, options, device)
        for runtime, step, models in runs:
            if runtime == ONNX:
                path = candidate.onnx
                if path is None:
                    assert model is not None
                    say(f"exporting {candidate.name} as ONNX")
                    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="shrinkformer-"))
                    path = export_for(model, Path(folder))
                models[candidate.name] = open_onnx(path, threads)
            else:
                assert model is not None
                kind = CachedStep if step == DECODE else CompiledModel if runtime == COMPILE else eager
                models[candidate.name] = kind(model)
    return runs


def _load(candidate: Candidate, options: LatencyOptions, device: str) -> PreTrainedModel:
    dtype = torch_dtype(options.dtype)
    if dtype is None:
        dtype = candidate.source.dtype if torch.device(device).type == "cuda" else torch.float32
    model, _ = load_model(candidate.source, class_of(candidate.source), device, dtype)
    return model


def measure(
    candidates: Sequence[Candidate], runs: Sequence[Run], options: LatencyOptions, device: str, threads: int
) -> list[Row]:
    """Time everything; what is measured is written at once.

    Raises:
        OutOfMemoryError: Nothing fits into memory.
    """
    vocabulary = min(candidate.source.config.vocab_size for candidate in candidates)
    shared = {"device": device, "threads": threads, "dtype": options.dtype, "seed": options.seed}
    locations = {candidate.name: candidate.source.location for candidate in candidates}
    rows = []
    pairs = [(run, shape) for shape in options.shapes for run in runs]
    for (runtime, step, models), shape in each(pairs, "timing", "shape"):
        # Models take turns within a runtime: threads of one runtime still spin when another one starts.
        found = compare_latency(
            models,
            [shape],
            device=device,
            vocabulary_size=vocabulary,
            repeats=options.repeats,
            warmup=WARMUP,
            seed=options.seed,
        )
        if not all(shape in times for times in found.values()):
            continue  # it does not fit into memory, which was said
        cells = [Cell(one.name, found[one.name][shape], one.macs(shape, step, options)) for one in candidates]
        rows.append(Row(shape, runtime, step, tuple(cells)))
        if options.output is not None:
            append_records(options.output, rows[-1].records(shared, locations))
    if not rows:
        raise OutOfMemoryError("no shape fits into memory; pass a smaller --batch_size or --length.")
    return rows


def print_rows(rows: Sequence[Row], candidates: Sequence[Candidate], options: LatencyOptions, machine: str) -> None:
    """Tell the user."""
    say("\n" + (markdown_table(rows) if options.markdown else text_table(rows)) + "\n")
    say(f"{machine}, medians [and quartiles] of {options.repeats} runs in turns, random tokens without padding.")
    if len(candidates) > 1:
        say(
            f"latency, MACs: fraction of {candidates[0].name}'s; reached: how much of what the MACs save the latency "
            "saves, (1 - latency) / (1 - MACs)."
        )
    elif candidates[0].source.pruned:
        say(f"Pass the dense model too, before {candidates[0].name}, for ratios of latency and MACs.")
    for one in candidates:
        if one.source.quantized and set(options.runtime) != {ONNX}:
            say(f"{one.name}: torch computes with decoded weights; --runtime {ONNX} with what an ONNX file holds.")
    if options.output is not None:
        say(f"records: {options.output}")
