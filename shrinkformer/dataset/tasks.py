"""The tasks an encoder can be pruned for and judged on, as data: one frozen record each."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from shrinkformer.errors import InputError

Kind = Literal["classification", "regression", "question_answering", "similarity"]


@dataclass(frozen=True)
class Task:
    """What a task reads, how long its inputs may be, and which figures its report shows.

    Source of the GLUE tasks and their metrics: Wang et al. 2018, "GLUE", table 1. Sequence lengths: Kwon et al. 2022,
    "A Fast Post-Training Pruning Framework for Transformers", section 5.1.
    """

    name: str
    kind: Kind
    columns: tuple[str, ...]
    """Text columns, by their names on the hub, in the order in which a tokenizer gets them."""
    metrics: tuple[str, ...]
    """Names in the report; the first one is the main figure."""
    num_labels: int | None
    """Outputs of the classifier: classes, 1 for a score, 2 for the start and end of a span, None without a head."""
    max_length: int
    """Longest input in tokens, special tokens included."""
    hub: tuple[str, str | None]
    """Data set and configuration on the Hugging Face hub."""
    folder: str
    """Folder below ``--data_dir``."""
    evaluation_splits: tuple[str, ...] = ("validation",)
    label_column: str = "label"
    stride: int = 128
    """Tokens that two neighbouring windows of one long context share (question answering only)."""

    @property
    def is_pair(self) -> bool:
        """Whether one input of the model is made of two texts (a sentence encoder reads them one by one)."""
        return len(self.columns) == 2 and self.kind != "similarity"


def _glue(
    name: str,
    columns: tuple[str, ...],
    metrics: tuple[str, ...] = ("accuracy",),
    *,
    num_labels: int = 2,
    max_length: int = 128,
    evaluation_splits: tuple[str, ...] = ("validation",),
) -> Task:
    return Task(
        name=name,
        kind="regression" if num_labels == 1 else "classification",
        columns=columns,
        metrics=metrics,
        num_labels=num_labels,
        max_length=max_length,
        hub=("nyu-mll/glue", name),
        folder=f"glue/{name}",
        evaluation_splits=evaluation_splits,
    )


def _squad(name: str) -> Task:
    return Task(
        name=name,
        kind="question_answering",
        columns=("question", "context"),
        metrics=("f1", "exact_match"),
        num_labels=2,
        max_length=384,
        hub=(f"rajpurkar/{name}", None),
        folder=name,
        label_column="answers",
    )


_SENTENCES = ("sentence1", "sentence2")

_ALL = (
    _glue(
        "mnli",
        ("premise", "hypothesis"),
        num_labels=3,
        evaluation_splits=("validation_matched", "validation_mismatched"),
    ),
    _glue("qqp", ("question1", "question2"), ("accuracy", "f1")),
    _glue("qnli", ("question", "sentence")),
    _glue("sst2", ("sentence",), max_length=64),
    _glue("stsb", _SENTENCES, ("spearmanr", "pearson"), num_labels=1),
    _glue("mrpc", _SENTENCES, ("accuracy", "f1")),
    _glue("cola", ("sentence",), ("matthews_correlation",), max_length=64),
    _glue("rte", _SENTENCES),
    _squad("squad"),
    _squad("squad_v2"),
    Task(
        name="similarity",
        kind="similarity",
        columns=_SENTENCES,
        metrics=("spearmanr", "pearson"),
        num_labels=None,
        max_length=128,
        hub=("nyu-mll/glue", "stsb"),
        folder="glue/stsb",
    ),
)

TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _ALL})
"""Every task by its ``--task_name``."""


def get_task(name: str) -> Task:
    """Look a task up by its name.

    Args:
        name: the value of ``--task_name``.

    Returns:
        The task's record.

    Raises:
        InputError: there is no such task; the message lists those that there are.
    """
    try:
        return TASKS[name]
    except KeyError:
        raise InputError(f"--task_name {name!r} is not known; choose one of {', '.join(TASKS)}") from None
