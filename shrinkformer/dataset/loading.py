"""Reading examples: from ``--data_dir``, from the bundled samples, from the hub, or from a file of the user's own.

A local file is read straight into memory (Arrow, no cache folder), so the same file always gives the same examples.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shrinkformer.dataset.files import SUFFIXES, read_file, read_lines
from shrinkformer.dataset.tasks import Task
from shrinkformer.errors import DataError, MissingDataError
from shrinkformer.trust.foreign import shortened

if TYPE_CHECKING:
    import datasets

SAMPLES = Path(__file__).resolve().parent / "samples"


def find_split(task: Task, split: str, data_dir: Path | None, bundled: bool = False) -> Path | None:
    """Find the file that :func:`load_split` would read, without reading it.

    Args:
        task: the task.
        split: ``train``, ``validation``, ...; for a task with several evaluation splits (mnli) ``validation`` means
            the first of them that is there.
        data_dir: the user's ``--data_dir``, searched first.
        bundled: whether the samples that come with the package may be used.

    Returns:
        The file, or None when only the hub is left.

    Raises:
        DataError: ``data_dir`` is not a folder.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise DataError(
            f"--data_dir {data_dir} is not a folder; give a folder that holds {task.folder}/{split}.parquet"
        )
    for name in _aliases(task, split):
        if data_dir is not None:
            for suffix in SUFFIXES:
                path = data_dir / task.folder / f"{name}{suffix}"
                if path.is_file():
                    return path
        if bundled:
            path = SAMPLES / f"{task.folder.replace('/', '_')}_{name}.parquet"
            if path.is_file():
                return path
    return None


def evaluation_splits(task: Task, data_dir: Path | None, bundled: bool = False) -> tuple[str, ...]:
    """Name the evaluation splits that can be read.

    Args:
        task: the task; only mnli has more than one evaluation split.
        data_dir: the user's ``--data_dir``.
        bundled: whether the bundled samples may be used.

    Returns:
        The splits that have a local file, or all of the task's when none has one and the hub has to be asked.

    Raises:
        DataError: ``data_dir`` is not a folder.
    """
    found = tuple(name for name in task.evaluation_splits if find_split(task, name, data_dir, bundled) is not None)
    if not found and find_split(task, "validation", data_dir, bundled) is not None:
        return ("validation",)
    return found or task.evaluation_splits


def load_split(task: Task, split: str, *, data_dir: Path | None, bundled: bool = False) -> "datasets.Dataset":
    """Load one labelled split of a task.

    Looked for in ``data_dir/<task.folder>/<split>.{parquet,json,jsonl,csv}``, then among the bundled samples if
    ``bundled``, then on the hub.

    Args:
        task: the task.
        split: ``train``, ``validation``, ... (see :func:`find_split`).
        data_dir: the user's ``--data_dir`` or None.
        bundled: whether the bundled samples may be used.

    Returns:
        The examples, with at least the task's text columns and its label column.

    Raises:
        DataError: nothing found, an empty or unreadable file, missing columns, or labels that do not fit the task.
    """
    path = find_split(task, split, data_dir, bundled)
    if path is None:
        examples, where = _from_hub(task, split, data_dir), f"the hub's {_hub_name(task)} {split}"
    else:
        examples, where = read_file(path, text_columns=task.columns), str(path)
    _check(examples, (*task.columns, task.label_column), task, where)
    _check_labels(examples, task, where)
    return examples


def load_examples(path: Path, task: Task) -> "datasets.Dataset":
    """Load the user's own calibration examples; labels are not needed.

    Args:
        path: a .jsonl, .json, .parquet, .csv or .tsv file with the task's text columns, or a .txt file with one example
            per line (the two texts of a pair separated by a tab). A sentence encoder needs one of its columns only.
        task: the task that the examples are for.

    Returns:
        The examples.

    Raises:
        DataError: a missing, empty or unreadable file, an unknown file type, or missing columns.
    """
    if not path.is_file():
        raise DataError(f"--calibration_file {path} does not exist; give a file with one example per line or row")
    columns: Sequence[str] = task.columns
    if path.suffix.lower() == ".txt":
        columns = task.columns if task.is_pair or task.kind == "question_answering" else task.columns[:1]
        examples = read_lines(path, columns)
    else:
        examples = read_file(path, text_columns=task.columns)
        if task.kind == "similarity":
            columns = [name for name in task.columns if name in examples.column_names] or task.columns
    _check(examples, columns, task, str(path))
    return examples


def _aliases(task: Task, split: str) -> tuple[str, ...]:
    if split == "validation" and split not in task.evaluation_splits:
        return (split, *task.evaluation_splits)
    return (split,)


def _hub_name(task: Task) -> str:
    name, configuration = task.hub
    return name if configuration is None else f"{name} ({configuration})"


def _from_hub(task: Task, split: str, data_dir: Path | None) -> "datasets.Dataset":
    import datasets  # takes a second: here, for those who need it

    wanted = task.evaluation_splits[0] if split == "validation" else split
    try:
        return datasets.load_dataset(*task.hub, split=wanted)
    except Exception as error:
        raise MissingDataError(_not_found(task, split, data_dir, error)) from error


def _not_found(task: Task, split: str, data_dir: Path | None, error: Exception) -> str:
    wanted = f"{task.folder}/{split}.{{{','.join(suffix[1:] for suffix in SUFFIXES)}}}"
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    hub = f"the hub's {_hub_name(task)} could not be loaded ({reason})"
    if data_dir is None:
        return f"--data_dir is not given and {hub}; pass a folder that holds {wanted}, or connect to the network"
    others = [name for name in task.evaluation_splits if name != split and find_split(task, name, data_dir)]
    only = f" (it has only {', '.join(others)})" if others else ""
    return f"--data_dir {data_dir} has no {wanted}{only} and {hub}; add that file, or connect to the network"


def _check(examples: "datasets.Dataset", columns: Sequence[str], task: Task, where: str) -> None:
    found = examples.column_names
    if len(examples) == 0:
        raise DataError(f"{where} holds no examples; task {task.name} needs at least one")
    missing = [name for name in columns if name not in found]
    if missing:
        raise DataError(
            f"{where} has no column {', '.join(missing)} (found: {shortened(', '.join(found))}); task {task.name} "
            f"needs {', '.join(columns)}: rename the columns or choose another --task_name"
        )
    for name in task.columns:
        if name not in found:
            continue
        texts = examples[name][:]
        bad = next((row for row, text in enumerate(texts) if not isinstance(text, str)), None)
        if bad is not None:
            held = shortened(repr(texts[bad]))
            raise DataError(f"{where}, row {bad}: column {name} holds {held}, which is not a text")


def _check_labels(examples: "datasets.Dataset", task: Task, where: str) -> None:
    if task.kind == "question_answering":
        _check_answers(examples, task, where)
        return
    for row, label in enumerate(examples[task.label_column][:]):
        if task.kind == "classification":
            fits = isinstance(label, int) and not isinstance(label, bool) and 0 <= label < (task.num_labels or 0)
            wanted = f"a class 0 to {(task.num_labels or 0) - 1}"
        else:
            fits, wanted = isinstance(label, (int, float)) and math.isfinite(label), "a number"
        if not fits:
            raise DataError(
                f"{where}, row {row}: column {task.label_column} holds {shortened(repr(label))}, task {task.name} "
                f"needs {wanted} (the hub's test splits carry no labels: use validation)"
            )


def _check_answers(examples: "datasets.Dataset", task: Task, where: str) -> None:
    for row, answers in enumerate(examples[task.label_column][:]):
        if not _are_answers(answers):
            raise DataError(
                f"{where}, row {row}: column {task.label_column} holds {shortened(repr(answers))}, task {task.name} "
                "needs {'text': [texts], 'answer_start': [numbers]}: convert the column"
            )


def _are_answers(answers: Any) -> bool:
    """Whether a row's answers have texts, and a start for each."""
    texts, starts = (answers.get(name) if isinstance(answers, dict) else None for name in ("text", "answer_start"))
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        return False
    return all(isinstance(text, str) for text in texts) and all(type(start) is int for start in starts)
