"""From the outputs of a model to named figures with standard errors."""

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrinkformer.dataset.encoding import Encoded
from shrinkformer.dataset.tasks import Task
from shrinkformer.errors import DataError
from shrinkformer.evaluate.paired import Scores
from shrinkformer.evaluate.standard_errors import DEVIATIONS, mean_deviations

_METRICS = Path(__file__).resolve().parent / "metrics"


def load_metric(name: str, configuration: str | None = None) -> Any:
    """Load one of our `evaluate` modules from its file; works offline and in many processes at once.

    Args:
        name: ``glue``, ``squad`` or ``similarity``.
        configuration: the task, where the module has several.

    Returns:
        The ``evaluate.Metric``; it keeps what it is given in memory, so processes share no data file.
    """
    import evaluate as hf_evaluate  # takes a second

    path = str(_METRICS / f"{name}.py")
    return hf_evaluate.load(path, configuration, keep_in_memory=True, experiment_id=uuid.uuid4().hex)


def require_labels(task: Task, split: str, encoded: Encoded) -> None:
    """Check, before a model runs for minutes, that a split can be scored.

    Raises:
        DataError: fewer than two examples (a standard error needs two), no labels, the hidden ones of a test set, or
            questions without answer where SQuAD v1.1 is scored.
    """
    where = f"task {task.name}, {split}"
    remedy = "evaluate on validation data"
    if task.kind == "question_answering":
        _require_answers(task, encoded, where)
    labels = encoded.labels
    if task.kind != "question_answering":
        if labels is None:
            raise DataError(f"{where}: the data has no column {task.label_column}; {remedy}")
        hidden = any(label is None or label < 0 for label in labels)
        if hidden and (task.kind == "classification" or set(labels) <= {None, -1}):
            raise DataError(f"{where}: labels of -1 or none at all, as in a hidden test set; {remedy}")
    if count_examples(task, encoded) < 2:
        raise DataError(f"{where}: {count_examples(task, encoded)} examples; a figure and its standard error need two")


def _require_answers(task: Task, encoded: Encoded, where: str) -> None:
    """The part of :func:`require_labels` for question answering."""
    if encoded.windows is None or encoded.examples is None:
        raise DataError(f"{where}: the encoded data has no windows; encode it with the same task")
    if "answers" not in encoded.examples.column_names:
        raise DataError(f"{where}: the data has no column answers; evaluate on validation data")
    bare = [row for row, answer in enumerate(encoded.examples["answers"]) if not answer["text"]]
    if bare and task.name != "squad_v2":
        name = encoded.examples[bare[0]].get("id", bare[0])
        raise DataError(f"{where}: question {name} has no reference answer; use --task_name squad_v2")


def count_examples(task: Task, encoded: Encoded) -> int:
    """Sentences, pairs or questions of a split (a question may have several windows, a pair has two features)."""
    if task.kind == "question_answering" and encoded.examples is not None:
        return len(encoded.examples)
    return len(encoded.features) // 2 if task.kind == "similarity" else len(encoded.features)


def score_labels(task: Task, predictions: NDArray[Any], references: Sequence[float]) -> Scores:
    """Figures of a classification, regression or similarity task.

    Args:
        task: names the metrics.
        predictions: (examples,) predicted labels or scores.
        references: the true ones.

    Returns:
        Metrics in the order of ``task.metrics``, in 0..1 (correlations -1..1).
    """
    metric = load_metric("similarity") if task.kind == "similarity" else load_metric("glue", task.name)
    values = metric.compute(predictions=predictions.tolist(), references=list(references))
    true = np.asarray(references, dtype=np.float64)
    deviations = {name: DEVIATIONS[name](predictions, true) for name in task.metrics}
    return Scores.of({name: values[name] for name in task.metrics}, deviations)


def score_answers(
    task: Task, texts: Sequence[str], questions: Mapping[str, Sequence[Any]], *, version_2: bool
) -> Scores:
    """Figures of extractive question answering, in percent (0..100) as the official scorers print them.

    Args:
        task: names the metrics.
        texts: the predicted answer of each question; empty for "no answer".
        questions: columns ``id`` and ``answers`` (each with a list ``text``).
        version_2: SQuAD v2: questions without answers are scored, too.

    Returns:
        Metrics in the order of ``task.metrics``.
    """
    from shrinkformer.evaluate.metrics import squad  # takes the seconds that evaluate takes

    truths = [list(answer["text"]) for answer in questions["answers"]]
    names = [str(name) for name in questions["id"]] if "id" in questions else [str(row) for row in range(len(texts))]
    extra = {"no_answer_probability": 0.0} if version_2 else {}
    predictions = [{"id": name, "prediction_text": text, **extra} for name, text in zip(names, texts, strict=True)]
    references = [
        {"id": name, "answers": {"text": truth, "answer_start": [0] * len(truth)}}  # the starts are not scored
        for name, truth in zip(names, truths, strict=True)
    ]
    values = load_metric("squad", "squad_v2" if version_2 else "squad").compute(
        predictions=predictions, references=references
    )
    scores = [
        squad.question_scores(text, truth, version_2=version_2) for text, truth in zip(texts, truths, strict=True)
    ]
    exact, f1 = (100.0 * np.array(column) for column in zip(*scores, strict=True))
    deviations = {"exact_match": mean_deviations(exact), "f1": mean_deviations(f1)}
    return Scores.of({name: values[name] for name in task.metrics}, deviations)
