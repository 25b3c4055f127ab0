"""What a model is trained towards: labels, or the first and last token of the answer in each window."""

from typing import Any

import numpy as np
import torch

from shrinkformer.dataset.encoding import Encoded, Window, pad
from shrinkformer.dataset.tasks import Task
from shrinkformer.errors import DataError

TARGETS = ("labels", "start_positions", "end_positions")
"""Names that transformers' models take their targets by."""


def answer_tokens(window: Window, start: int, text: str) -> tuple[int, int]:
    """Find the first and last token of an answer in a window.

    Args:
        window: one piece of the context.
        start: first character of the answer in the context.
        text: the answer; empty for a question without one.

    Returns:
        Token positions; (0, 0), the first token, when the window does not hold the whole answer (Devlin et al. 2019,
        section 4.3, treat an unanswerable question so).
    """
    end = start + len(text)
    begins, ends = window.offsets[:, 0], window.offsets[:, 1]
    inside = np.flatnonzero((begins < end) & (ends > start) & (begins >= 0))
    if not text or len(inside) == 0 or begins[inside[0]] > start or ends[inside[-1]] < end:
        return 0, 0
    return int(inside[0]), int(inside[-1])


def training_rows(encoded: Encoded, task: Task) -> list[dict[str, Any]]:
    """Join features and targets.

    Args:
        encoded: features with labels, or windows with the examples behind them.
        task: the task that they were encoded for.

    Returns:
        One dictionary per feature: the feature and its ``labels``, or ``start_positions`` and ``end_positions``.

    Raises:
        DataError: the examples have no labels or answers.
    """
    if encoded.windows is None or encoded.examples is None:
        if encoded.labels is None:
            raise DataError(f"the examples have no column {task.label_column}, which training for {task.name} needs")
        return [{**row, "labels": label} for row, label in zip(encoded.features, encoded.labels, strict=True)]
    if task.label_column not in encoded.examples.column_names:
        raise DataError(f"the examples have no column {task.label_column}, which training for {task.name} needs")
    answers = list(encoded.examples[task.label_column])
    rows = []
    for feature, window in zip(encoded.features, encoded.windows, strict=True):
        answer = answers[window.example]
        start, text = (answer["answer_start"][0], answer["text"][0]) if answer["text"] else (0, "")
        first, last = answer_tokens(window, start, text)
        rows.append({**feature, "start_positions": first, "end_positions": last})
    return rows


def collate(rows: list[dict[str, Any]], tokenizer: Any, task: Task) -> dict[str, torch.Tensor]:
    """Pad a batch and stack its targets.

    Args:
        rows: from :func:`training_rows`.
        tokenizer: pads them.
        task: decides whether targets are numbers or classes.

    Returns:
        Inputs of shape (batch, length), int64; targets of shape (batch,), float32 for regression, else int64.
    """
    targets = [name for name in TARGETS if name in rows[0]]
    batch = pad([{name: row[name] for name in row if name not in targets} for row in rows], tokenizer)
    dtype = torch.float32 if task.kind == "regression" else torch.int64
    return {**batch, **{name: torch.tensor([row[name] for row in rows], dtype=dtype) for name in targets}}
