"""How good a model is at its task: one forward pass over each evaluation split, then the metrics of the task."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shrinkformer.dataset.encoding import Encoded, Features, padded_batches
from shrinkformer.dataset.tasks import Task
from shrinkformer.errors import CheckpointError, DataError, NumericalError
from shrinkformer.evaluate.answers import extract_answers
from shrinkformer.evaluate.labels import label_columns
from shrinkformer.evaluate.paired import Scores
from shrinkformer.evaluate.scores import count_examples, require_labels, score_answers, score_labels
from shrinkformer.prune.objective import Objective, objective_of
from shrinkformer.prune.pooling import MEAN, SentenceHead
from shrinkformer.utils.inputs import outputs_of, require_padding_id
from shrinkformer.utils.memory import Halving
from shrinkformer.utils.modes import evaluation_mode
from shrinkformer.utils.parallel import ALONE, Workers
from shrinkformer.utils.progress import Bar, counted

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found and what it cost."""

    scores: Scores
    """With what each example contributes, so that two models can be compared on the same examples."""
    examples: int
    """Sentences, pairs or questions, over all splits."""
    tokens: int
    """Tokens that went through the model, padding excluded."""
    seconds: float
    """Wall time of everything: model, answers and metrics."""
    logits: dict[str, Array] | None = field(default=None, repr=False, compare=False)
    """By split, only on request: (examples, labels); (windows, positions, start and end), NaN behind a window's end;
    or (pairs, 1) similarities."""

    @property
    def metrics(self) -> dict[str, float]:
        """Figures by name, as in ``{"accuracy": .83, "accuracy_stderr": .006, ...}``.

        GLUE in 0..1, SQuAD in percent; ``_mm`` marks MNLI's mismatched split.
        """
        return self.scores.metrics


def evaluate_model(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    splits: Mapping[str, Encoded],
    *,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: bool = False,
    keep_logits: bool = False,
    workers: Workers = ALONE,
    objective: Objective | None = None,
) -> Evaluation:
    """Measure a model on a task.

    Args:
        model: a transformers model with the head of the task: ``.logits`` (classification, regression),
            ``.start_logits`` and ``.end_logits`` (question answering), ``.last_hidden_state`` (similarity). Moved to
            ``device``; its training mode is restored.
        tokenizer: pads the features.
        task: what is measured.
        splits: the tokenised data by split, such as ``validation``, or ``validation_matched`` and
            ``validation_mismatched`` for MNLI.
        batch_size: features per forward pass; the figures do not depend on it but for rounding.
        device: where the model runs.
        progress: show a progress bar with the time left on a terminal, else lines.
        keep_logits: return the outputs of the model as well.
        workers: the processes that share the forward passes. All must pass the same data; all get the same figures,
            those of one process but for rounding.
        objective: what the model predicts; by default what its own head does. Similarity is that of the embeddings that
            it makes of ``.last_hidden_state``.

    Returns:
        The figures, each with its standard error.

    Raises:
        DataError: no split, fewer than two examples, or no labels.
        CheckpointError: the number of outputs, or their names, do not fit the task.
        NumericalError: the model produced NaN or infinity.
        OutOfMemoryError: there is not enough memory even for one example at a time.

    Warns:
        ShrinkformerWarning: a batch did not fit into memory and was halved; names of outputs are not those of the data.
    """
    if not splits:
        raise DataError(f"task {task.name}: no evaluation split was given; it has {', '.join(task.evaluation_splits)}")
    began = time.perf_counter()
    scores = Scores({})
    outputs: dict[str, Array] = {}
    examples = 0
    for split, encoded in splits.items():
        require_labels(task, split, encoded)
        label_columns(task, getattr(model, "config", None), encoded.examples)  # complains before minutes have passed
    require_padding_id(model)
    if task.kind == "similarity":
        objective = objective or objective_of(model)
    head = MEAN if objective is None else objective.sentence
    with evaluation_mode(model), torch.no_grad():
        model.to(device)
        for split, encoded in splits.items():
            figures, outputs[split] = _evaluate_split(
                model,
                tokenizer,
                task,
                encoded,
                split=split,
                batch_size=batch_size,
                progress=progress,
                workers=workers,
                head=head,
            )
            examples += count_examples(task, encoded)
            scores |= figures.renamed(_suffix(task, split, len(splits)))
    return Evaluation(
        scores=scores,
        examples=examples,
        tokens=sum(encoded.tokens for encoded in splits.values()),
        seconds=time.perf_counter() - began,
        logits=outputs if keep_logits else None,
    )


def _evaluate_split(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    encoded: Encoded,
    *,
    split: str,
    batch_size: int,
    progress: bool,
    workers: Workers,
    head: SentenceHead,
) -> tuple[Scores, Array]:
    """Figures and model outputs of one split."""
    features = workers.share(encoded.features)
    shown = progress and workers.is_main
    with counted(len(features), f"{task.name} {split}", "input", shown=shown) as bar:
        rows = workers.gather(_forward(model, tokenizer, task, features, batch_size=batch_size, bar=bar, head=head))
    where = f"task {task.name}, {split}"
    if task.kind == "question_answering":
        return _judge_answers(tokenizer, task, encoded, _pad_rows(rows, where))
    output = np.stack(rows)
    _require_finite(output, where)
    if task.kind == "similarity":
        output = head.compare(*np.split(output, 2))[:, None]
    else:
        output = _in_task_order(model, task, encoded, output)
    predictions = output.argmax(axis=1) if task.kind == "classification" else output[:, 0].astype(np.float64)
    return score_labels(task, predictions, encoded.labels or []), output


def _forward(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    features: Features,
    *,
    batch_size: int,
    bar: Bar,
    head: SentenceHead = MEAN,
) -> list[NDArray[np.float32]]:
    """One float32 array per feature, in the order of the features.

    Classification and regression: (labels,). Question answering: (tokens, 2). Similarity: (width of an embedding,).
    """

    def outputs(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        mask = batch["attention_mask"].bool().to(next(model.parameters()).device)
        return _read(outputs_of(model, batch), mask, task, head).float().cpu()

    rows: list[Array] = [np.zeros(0, dtype=np.float32)] * len(features)
    in_parts = Halving(f"evaluation on {task.name}")
    for indices, batch in padded_batches(features, tokenizer, batch_size):
        mask = batch["attention_mask"].bool()
        for part, output in in_parts(outputs, batch):
            for index, one, tokens in zip(indices[part], output, mask[part], strict=True):
                rows[index] = (one[tokens] if task.kind == "question_answering" else one).numpy()
            bar.update(len(output))
    return rows


def _read(output: Any, mask: torch.Tensor, task: Task, head: SentenceHead) -> torch.Tensor:
    """The part of a model's output that the task is judged by; ``mask`` is the (batch, length) attention mask."""
    wanted = {"question_answering": "start_logits", "similarity": "last_hidden_state"}.get(task.kind, "logits")
    if getattr(output, wanted, None) is None:
        raise CheckpointError(f"task {task.name} needs a model with {wanted}, got {type(output).__name__}")
    if task.kind == "question_answering":
        return torch.stack((output.start_logits, output.end_logits), dim=-1)
    if task.kind != "similarity":
        return torch.as_tensor(output.logits)
    return head.embed(output.last_hidden_state, mask)


def _in_task_order(model: nn.Module, task: Task, encoded: Encoded, logits: Array) -> Array:
    """Check the number of columns and bring them into the data's order where the checkpoint names its classes."""
    if logits.shape[1:] != (task.num_labels,):
        raise CheckpointError(
            f"task {task.name} has {task.num_labels} labels, the model gives outputs of shape {logits.shape[1:]}; "
            "use a checkpoint that was fine-tuned for this task"
        )
    columns = label_columns(task, getattr(model, "config", None), encoded.examples)
    return logits if columns is None else logits[:, columns]


def _judge_answers(tokenizer: Any, task: Task, encoded: Encoded, logits: Array) -> tuple[Scores, Array]:
    """Figures of the answers that (windows, positions, 2) logits stand for."""
    if encoded.windows is None or encoded.examples is None:  # for the type checker: require_labels has looked
        raise DataError(f"task {task.name}: the encoded data has no windows")
    version_2 = task.name == "squad_v2"
    columns = set(encoded.examples.column_names) & {"id", "context", "answers"}
    questions = {name: list(encoded.examples[name]) for name in columns}
    answers = extract_answers(
        logits[..., 0],
        logits[..., 1],
        encoded.windows,
        questions["context"],
        allow_no_answer=version_2,
        null_positions=_null_positions(tokenizer, encoded),
    )
    return score_answers(task, [answer.text for answer in answers], questions, version_2=version_2), logits


def _null_positions(tokenizer: Any, encoded: Encoded) -> NDArray[np.int64]:
    """Position of the classification token in every feature (0 where there is none)."""
    token = tokenizer.cls_token_id
    ids = (feature["input_ids"] for feature in encoded.features)
    return np.array([row.index(token) if token in row else 0 for row in ids], dtype=np.int64)


def _pad_rows(rows: list[Array], where: str) -> Array:
    """Stack (tokens, 2) arrays to (windows, most tokens, 2), NaN behind each window's end."""
    padded = np.full((len(rows), max(map(len, rows), default=1), 2), np.nan, dtype=np.float32)
    for index, row in enumerate(rows):
        _require_finite(row, where)
        padded[index, : len(row)] = row
    return padded


def _require_finite(values: Array, where: str) -> None:
    """Raise a NumericalError for NaN or infinity."""
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise NumericalError(
            f"{where}: {bad} of {values.size} outputs of the model are NaN or infinite; "
            "check the checkpoint, or run it in float32"
        )


def _suffix(task: Task, split: str, splits: int) -> str:
    """What tells the figures of a split from those of the others: nothing for the main one, ``_mm`` for mismatched."""
    if split == "validation_mismatched":
        return "_mm"
    return "" if splits == 1 or split == task.evaluation_splits[0] else f"_{split}"
