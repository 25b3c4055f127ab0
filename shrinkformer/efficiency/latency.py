"""How long a forward pass takes: models are timed in turns, so that a noisy machine slows all of them alike."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

import torch
from torch import nn

from shrinkformer.errors import InputError
from shrinkformer.utils.modes import evaluation_mode

DEFAULT_SHAPES = ((1, 128), (8, 128))
"""(examples, tokens) of the inputs that reports show: one short request, and a small batch."""


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
    """Time the forward pass of several models on the same random, unpadded inputs.

    The models take turns (dense, pruned, dense, pruned, ...): compare them within one call only.

    Args:
        models: by name, such as ``{"dense": ..., "pruned": ...}``. Moved to ``device``; training modes are restored.
        shapes: (examples, tokens) of each input.
        device: where the models run; accelerators are synchronised before the clock is read.
        vocabulary_size: token ids are drawn below it.
        repeats: timed runs of each model and shape; the median is returned.
        warmup: runs before that are not timed.
        seed: of the private generator that draws the token ids.

    Returns:
        ``{name: {"8x128": milliseconds}}``.

    Raises:
        InputError: no repeats, or an empty shape or vocabulary.
    """
    if repeats < 1 or warmup < 0 or vocabulary_size < 1 or any(min(shape) < 1 for shape in shapes):
        raise InputError(
            f"latency needs positive sizes: shapes {list(shapes)}, vocabulary_size {vocabulary_size}, "
            f"repeats {repeats}, warmup {warmup}"
        )
    place = torch.device(device)
    generator = torch.Generator().manual_seed(seed)
    results: dict[str, dict[str, float]] = {name: {} for name in models}
    with evaluation_mode(*models.values()), torch.inference_mode():
        for model in models.values():
            model.to(place)
        for examples, tokens in shapes:
            ids = torch.randint(vocabulary_size, (examples, tokens), generator=generator)
            batch = {"input_ids": ids.to(place), "attention_mask": torch.ones_like(ids).to(place)}
            times: dict[str, list[float]] = {name: [] for name in models}
            for turn in range(warmup + repeats):
                for name, model in models.items():
                    elapsed = time_once(partial(model, **batch), place)
                    if turn >= warmup:
                        times[name].append(elapsed)
            for name, values in times.items():
                results[name][f"{examples}x{tokens}"] = 1000.0 * median(values)
    return results


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
        torch.accelerator.synchronize()
