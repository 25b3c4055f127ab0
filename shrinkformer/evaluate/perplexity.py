"""Perplexity of a language model: exp of the mean negative log-likelihood of the tokens that it has to predict."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from shrinkformer.errors import CheckpointError, DataError, InputError, NumericalError
from shrinkformer.utils.inputs import call
from shrinkformer.utils.memory import Halving
from shrinkformer.utils.modes import evaluation_mode
from shrinkformer.utils.parallel import ALONE, Workers
from shrinkformer.utils.progress import counted

_SLICE = 2**24
"""Logits that are turned to float32 at a time: 64 MiB, whatever the batch, the length and the vocabulary."""


@dataclass(frozen=True)
class Perplexity:
    """What an evaluation found and what it cost."""

    value: float
    """exp(nll), per token; infinity where that is beyond float64."""
    stderr: float
    """Standard error of ``value`` by the spread of the windows (delta method); 0 for a single window."""
    nll: float
    """Negative log-likelihood per predicted token, in nats."""
    tokens: int
    """Predicted tokens: all but the first of each window."""
    windows: int
    seconds: float
    """Wall time of this process, from the first batch on."""
    deviations: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)
    """How much each window moves ``value``, (windows,), in the order of the windows; ``stderr`` is their length."""


def evaluate_perplexity(
    model: nn.Module,
    windows: Tensor,
    *,
    batch_size: int,
    device: str | torch.device = "cpu",
    workers: Workers = ALONE,
    progress: bool = False,
) -> Perplexity:
    """Measure a causal language model on windows of text, each on its own.

    Args:
        model: a transformers model with ``.logits``. Moved to ``device``; its training mode is restored.
        windows: token ids, (windows, length); every process gets all of them and evaluates its share.
        batch_size: windows per forward pass; the figure does not depend on it but for rounding.
        device: where the model runs.
        workers: the processes that share the work; all of them return the same figure.
        progress: show a progress bar with the time left on a terminal, else lines.

    Raises:
        InputError: ``batch_size`` is not positive, or the windows are longer than the model's positions.
        DataError: there is nothing to predict.
        CheckpointError: the model gives no logits, or has fewer tokens than its tokenizer.
        NumericalError: the model produced NaN or infinity.
        OutOfMemoryError: there is not enough memory even for one window at a time.

    Warns:
        ShrinkformerWarning: a batch did not fit into memory and was halved.
    """
    if batch_size < 1:
        raise InputError(f"--batch_size {batch_size} must be at least 1")
    require_fit(model, windows)
    with evaluation_mode(model), torch.no_grad():
        model.to(device)
        return accumulate(_forward(model, workers.share_rows(windows), batch_size, device, progress), workers)


def accumulate(outputs: Iterable[tuple[Tensor, Tensor]], workers: Workers = ALONE) -> Perplexity:
    """Sum up the likelihoods of what a model predicted.

    Every token counts the same, in whatever window: exp(total NLL / predicted tokens). For equal windows this is GPTQ's
    figure, exp(sum(mean NLL * length) / (windows * length)), and that of transformers' guide for windows that do not
    overlap (https://huggingface.co/docs/transformers/perplexity).

    Args:
        outputs: pairs of token ids (batch, length) and logits (batch, length, vocabulary), on one device, taken one by
            one; logit t is the prediction of token t + 1.
        workers: the processes that share the work; each passes the outputs of its share.

    Returns:
        The figure of all processes' windows. Log-likelihoods are float32, sums float64.

    Raises:
        DataError: there is nothing to predict.
        CheckpointError: the logits do not fit the tokens.
        NumericalError: a logit is NaN or infinite, in whatever process.
    """
    began = time.perf_counter()
    sums, counts, bad = _window_sums(outputs)
    totals = torch.tensor([sums.sum(), counts.sum(), len(sums), bad], dtype=torch.float64)
    workers.sum_(totals)
    total, tokens, windows, bad = totals.tolist()
    if bad:  # only now: a process that raises alone would leave the others waiting
        raise NumericalError(
            "logits of the model are NaN or infinite, so there is no perplexity; check the checkpoint, or use float32"
        )
    if not tokens:
        raise DataError("the perplexity of nothing: there is no window of at least 2 tokens")
    nll = total / tokens
    # van der Vaart, "Asymptotic Statistics", chapter 3: the ratio of two means varies as its influence values do
    influence = sums - nll * counts
    spread = influence.square().sum().reshape(1)
    workers.sum_(spread)
    value = math.exp(nll) if nll < 709 else math.inf
    scale = math.sqrt(windows / (windows - 1)) / tokens if windows > 1 else 0.0
    relative = math.sqrt(spread.item() * windows / (windows - 1)) / tokens if windows > 1 else 0.0
    return Perplexity(
        value=value,
        stderr=value * relative,
        nll=nll,
        tokens=int(tokens),
        windows=int(windows),
        seconds=time.perf_counter() - began,
        deviations=value * scale * np.array(workers.gather(influence.tolist())),
    )


def require_fit(model: nn.Module, windows: Tensor) -> None:
    """Check that a model would not index past its embeddings, which on a GPU ends the process.

    Raises:
        InputError: the windows are longer than the model's positions.
        CheckpointError: the model has fewer tokens than its tokenizer.
    """
    config = getattr(model, "config", None)
    positions, tokens = (getattr(config, name, None) for name in ("max_position_embeddings", "vocab_size"))
    if positions is not None and windows.shape[1] > positions:
        raise InputError(f"windows of {windows.shape[1]} tokens exceed the model's {positions} positions; use shorter")
    if tokens is not None and windows.numel() and int(windows.max()) >= tokens:
        raise CheckpointError(
            f"the tokenizer gave token {int(windows.max())}, the model knows {tokens}; use the model's own tokenizer"
        )


def _forward(
    model: nn.Module, windows: Tensor, batch_size: int, device: str | torch.device, progress: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and logits, batch by batch."""

    def outputs(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        ids = batch["input_ids"].to(device)
        logits = getattr(call(model, {"input_ids": ids, "use_cache": False}), "logits", None)
        if logits is None:
            raise CheckpointError(f"{type(model).__name__} gives no logits; perplexity needs a causal decoder")
        return ids, logits

    in_parts = Halving("perplexity")
    with counted(len(windows), "perplexity", "window", shown=progress) as bar:
        for start in range(0, len(windows), batch_size):
            for _, found in in_parts(outputs, {"input_ids": windows[start : start + batch_size]}):
                yield found
                bar.update(len(found[0]))


def _window_sums(outputs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, bool]:
    """NLL and number of predictions of each window, (windows,) float64 each, and whether a logit is not finite.

    The first batch with such a logit is the last one that is looked at.
    """
    sums, counts = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, dtype=torch.float64)]
    for ids, logits in outputs:
        if logits.shape[:-1] != ids.shape:
            raise CheckpointError(f"logits of shape {tuple(logits.shape)} do not fit tokens of {tuple(ids.shape)}")
        batch, finite = _batch_sums(ids, logits)
        if not finite:
            return sums[0], counts[0], True
        sums.append(batch)
        counts.append(torch.full_like(batch, ids.shape[1] - 1))
    return torch.cat(sums), torch.cat(counts), False


def _batch_sums(ids: Tensor, logits: Tensor) -> tuple[Tensor, bool]:
    """NLL of each row, (batch,) float64 on the CPU, and whether all logits are finite."""
    sums = torch.zeros(len(ids), dtype=torch.float64, device=logits.device)
    finite = torch.ones((), dtype=torch.bool, device=logits.device)
    step = max(1, _SLICE // max(1, logits.shape[-1] * len(ids)))
    for start in range(0, ids.shape[1] - 1, step):
        stop = min(start + step, ids.shape[1] - 1)
        part = logits[:, start:stop].float()
        finite &= torch.stack(torch.aminmax(part)).isfinite().all()  # NaN goes through; ten times as fast as isfinite
        losses = functional.cross_entropy(
            part.flatten(0, 1), ids[:, start + 1 : stop + 1].flatten().long(), reduction="none"
        )
        sums += losses.view(len(ids), -1).double().sum(1)
    return sums.cpu(), bool(finite)
