"""A dense model on a calibration sample, as the benchmarks of pruning and of bytes use it; how encoders get there."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax
from transformers import PreTrainedModel

from benchmarks.results import Record
from shrinkformer.commands.locate import find_model, load_model, model_class
from shrinkformer.commands.options import EncoderOptions
from shrinkformer.commands.prune_bert import read_data
from shrinkformer.commands.tokenizers import load_tokenizer
from shrinkformer.dataset.encoding import padded_batches
from shrinkformer.dataset.tasks import get_task
from shrinkformer.efficiency.size import folder_bytes
from shrinkformer.evaluate.evaluation import Evaluation, evaluate_model
from shrinkformer.prune.statistics import Batches


@dataclass(frozen=True)
class Case:
    """A dense model on one calibration sample.

    Attributes:
        model: The model.
        bytes: Of its checkpoint.
        batches: Calibration examples.
        length: At which MACs are counted.
        judge: Gives what a smaller model reaches and how far it is from the dense one.
        dense: What the dense model reaches, where that is known.
    """

    model: PreTrainedModel
    bytes: int
    batches: Batches
    length: float
    judge: Callable[[PreTrainedModel], Record]
    dense: Record = field(default_factory=dict)


def encoder_options(options: argparse.Namespace, seed: int) -> EncoderOptions:
    """What the commands for encoders take of a comparison's flags."""
    same = ("model_name", "task_name", "data_dir", "bundled_data", "sample_batch_size", "batch_size")
    return EncoderOptions(**{name: getattr(options, name) for name in same}, seed=seed)


def read_encoder(options: argparse.Namespace, seed: int) -> Case:
    """Read what a comparison's flags name, and evaluate the dense model."""
    settings = encoder_options(options, seed)
    task = get_task(settings.task_name)
    source = find_model(settings.model_name, task)
    tokenizer = load_tokenizer(source)
    most = getattr(options, "evaluation_examples", None)
    calibration, splits = read_data(settings, task, source, tokenizer, evaluation_examples=most)
    batches = [batch for _, batch in padded_batches(calibration.features, tokenizer, settings.batch_size)]
    lengths = [length for split in splits.values() for length in split.lengths]
    model, _ = load_model(source, model_class(source, task), "cpu", torch.float32)

    def evaluate(judged: PreTrainedModel) -> Evaluation:
        return evaluate_model(judged, tokenizer, task, splits, batch_size=settings.batch_size, keep_logits=True)

    dense = evaluate(model)

    def judge(judged: PreTrainedModel) -> Record:
        return figures(evaluate(judged), dense, task.metrics[0])

    length = sum(lengths) / len(lengths)
    size = folder_bytes(source.location)
    return Case(model, size, batches, length, judge, figures(dense, dense, task.metrics[0]))


def figures(found: Evaluation, dense: Evaluation, metric: str) -> Record:
    """Main metric and divergence with their standard errors."""
    assert found.logits is not None
    assert dense.logits is not None
    rows = np.concatenate([divergences(dense.logits[split], found.logits[split]) for split in dense.logits])
    error = f"{metric}_stderr"
    return {
        metric: found.metrics[metric],
        error: found.metrics[error],
        "kl": float(rows.mean()),
        "kl_stderr": float(rows.std() / len(rows) ** 0.5),
    }


def divergences(dense: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    """Kullback-Leibler divergence for each example, of answers from both ends; half squared distances of numbers."""
    ours, theirs = (np.asarray(logits, dtype=np.float64) for logits in (dense, other))
    if ours.shape[1] == 1:  # scores, or cosines of sentence pairs
        distances: NDArray[np.float64] = np.square(ours - theirs).reshape(-1) / 2
        return distances
    hidden = np.isnan(ours)  # behind the end of a window
    ours, theirs = (log_softmax(np.where(hidden, -1e4, logits), axis=1) for logits in (ours, theirs))
    rows: NDArray[np.float64] = (np.exp(ours) * (ours - theirs)).reshape(len(ours), ours.shape[1], -1).sum(axis=(1, 2))
    return rows
