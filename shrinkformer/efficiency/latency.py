"""How long a call takes: candidates are timed in turns, so that a noisy machine slows all of them alike."""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from shrinkformer.architectures.heads import chooses
from shrinkformer.errors import InputError, warn
from shrinkformer.utils.memory import free_memory, is_out_of_memory
from shrinkformer.utils.modes import evaluation_mode

DEFAULT_SHAPES = ((1, 128), (8, 128))
"""(examples, tokens) of the inputs that reports show: one short request, and a small batch."""

Key = TypeVar("Key", bound=Hashable)

Timed = Callable[[Mapping[str, Tensor]], object]
"""A model in some runtime: takes a batch, and returns when it has asked for the outputs."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of repeated runs of one thing.

    Attributes:
        median: Half of the runs took less.
        lower: A quarter of the runs took less.
        upper: A quarter of the runs took more.
        repeats: Number of runs.

    >>> Timing.of([0.004, 0.001, 0.002, 0.003, 0.009])
    Timing(median=3.0, lower=2.0, upper=4.0, repeats=5)
    """

    median: float
    lower: float
    upper: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """Of the seconds of at least one run."""
        lower, upper = np.quantile(seconds, (0.25, 0.75)).tolist()
        return cls(1000.0 * median(seconds), 1000.0 * lower, 1000.0 * upper, len(seconds))


def time_in_turns(
    calls: Mapping[Key, Callable[[], object]], device: torch.device, *, repeats: int, warmup: int = 1
) -> dict[Key, list[float]]:
    """Seconds of every run of several calls, which take turns (a, b, a, b, ...): compare them within one call only.

    Args:
        calls: What is timed.
        device: Where they run; accelerators are synchronised before the clock is read.
        repeats: Timed runs of each.
        warmup: Runs of each before them that are not timed.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    for turn in range(warmup + repeats):
        for key, call in calls.items():
            elapsed = time_once(call, device)
            if turn >= warmup:
                seconds[key].append(elapsed)
    return seconds


def random_batch(
    shape: tuple[int, int], vocabulary_size: int, generator: torch.Generator, device: torch.device
) -> dict[str, Tensor]:
    """Random, unpadded inputs of a model: ``input_ids`` and ``attention_mask``, ``(examples, tokens)`` int64."""
    ids = torch.randint(vocabulary_size, shape, generator=generator)
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}


def compare_latency(
    models: Mapping[Key, Timed],
    shapes: Sequence[tuple[int, int]],
    *,
    device: str | torch.device = "cpu",
    vocabulary_size: int,
    repeats: int = 7,
    warmup: int = 2,
    seed: int = 0,
) -> dict[Key, dict[tuple[int, int], Timing]]:
    """Time several models, or one model in several runtimes, on the same random, unpadded inputs.

    Args:
        models: What is called with ``input_ids`` and ``attention_mask``; no gradients are recorded.
        shapes: (examples, tokens) of each input.
        device: Where the inputs are made; accelerators are synchronised before the clock is read.
        vocabulary_size: Token ids are drawn below it.
        repeats: Timed runs of each model and shape.
        warmup: Runs before that are not timed; with compilers, these compile.
        seed: Of the private generator that draws the token ids.

    Returns:
        ``{model: {shape: times}}``, without shapes that do not fit into memory.

    Raises:
        InputError: No repeats, or an empty shape or vocabulary.

    Warns:
        ShrinkformerWarning: A shape does not fit into memory.
    """
    if repeats < 1 or warmup < 0 or vocabulary_size < 1 or any(min(shape) < 1 for shape in shapes):
        raise InputError(
            f"latency needs positive sizes: shapes {list(shapes)}, vocabulary_size {vocabulary_size}, "
            f"repeats {repeats}, warmup {warmup}"
        )
    place = torch.device(device)
    generator = torch.Generator().manual_seed(seed)
    results: dict[Key, dict[tuple[int, int], Timing]] = {key: {} for key in models}
    with torch.inference_mode():
        for shape in shapes:
            batch = random_batch(shape, vocabulary_size, generator, place)
            calls = {key: partial(model, batch) for key, model in models.items()}
            for key, seconds in _timed_or_skipped(calls, place, repeats, warmup, shape).items():
                results[key][shape] = Timing.of(seconds)
    return results


def _timed_or_skipped(
    calls: Mapping[Key, Callable[[], object]], place: torch.device, repeats: int, warmup: int, shape: tuple[int, int]
) -> dict[Key, list[float]]:
    """Seconds of every run; of no call where one of them runs out of memory, because times are compared."""
    try:
        return time_in_turns(calls, place, repeats=repeats, warmup=warmup)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    free_memory()
    warn(f"latency {shape_name(shape)}: out of memory; this shape is left out")
    return {}


def measure_latency(
    models: Mapping[str, nn.Module],
    shapes: Sequence[tuple[int, int]] = DEFAULT_SHAPES,
    *,
    device: str | torch.device = "cpu",
    vocabulary_size: int,
    repeats: int = 7,
    warmup: int = 2,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Median times of the forward pass of several models, as reports show them; see :func:`compare_latency`.

    Args:
        models: by name, such as ``{"dense": ..., "pruned": ...}``. Moved to ``device``; training modes are restored.
        shapes: (examples, tokens) of each input.
        device: where the models run.
        vocabulary_size: token ids are drawn below it.
        repeats: timed runs of each model and shape; the median is returned.
        warmup: runs before that are not timed.
        seed: of the private generator that draws the token ids.

    Returns:
        ``{name: {"8x128": milliseconds}}``, without shapes that do not fit into memory.

    Raises:
        InputError: no repeats, or an empty shape or vocabulary.
    """
    with evaluation_mode(*models.values()):
        for model in models.values():
            model.to(device)
        timings = compare_latency(
            {name: partial(call_model, model) for name, model in models.items()},
            shapes,
            device=device,
            vocabulary_size=vocabulary_size,
            repeats=repeats,
            warmup=warmup,
            seed=seed,
        )
    return {
        name: {shape_name(shape): timing.median for shape, timing in found.items()} for name, found in timings.items()
    }


def call_model(model: Callable[..., object], batch: Mapping[str, Tensor]) -> object:
    """A forward pass, as a :data:`Timed` model; one that answers by choosing gets one choice for each example."""
    if isinstance(model, nn.Module) and chooses(model):
        batch = {name: value.unsqueeze(1) for name, value in batch.items()}
    return model(**batch)


def shape_name(shape: tuple[int, int]) -> str:
    """How reports call a shape.

    >>> shape_name((8, 128))
    '8x128'
    """
    return f"{shape[0]}x{shape[1]}"


def time_once(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, everything on the device finished before and after."""
    _synchronize(device)
    began = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    """Wait for the device to finish; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        torch.get_device_module(device).synchronize()
