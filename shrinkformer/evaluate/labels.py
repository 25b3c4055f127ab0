"""Which output of a classifier is which label of the data: by name, never by position where a name says otherwise."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shrinkformer.dataset.tasks import Task
from shrinkformer.errors import CheckpointError, warn
from shrinkformer.evaluate.paired import STDERR

if TYPE_CHECKING:
    import datasets

_GLUE = {
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qqp": ("not_duplicate", "duplicate"),
    "cola": ("unacceptable", "acceptable"),
}
"""Class names of GLUE in the order of its label numbers (the ``ClassLabel`` of nyu-mll/glue)."""

_NUMBER = re.compile(r"(?:label_?)?(\d+)")
"""What a name looks like that says no more than a position."""

_SHORTEST = 3  # letters that a beginning needs to stand for a name

_CORRELATIONS = frozenset(("pearson", "spearmanr", "matthews_correlation"))


def label_names(task: Task, examples: "datasets.Dataset | None") -> tuple[str, ...]:
    """Names of the labels of some data, in the order of their numbers; empty where nobody says.

    Args:
        task: the task.
        examples: the data, whose label column may have names of its own.
    """
    column = None if examples is None else examples.features.get(task.label_column)
    own = tuple(getattr(column, "names", None) or ())  # of a ClassLabel
    return _GLUE.get(task.name, ()) if _numbers([_plain(name) for name in own]) is not None else own


def output_names(config: Any) -> list[str]:
    """Names of a classifier's outputs, in their order; empty where its configuration has none that can be read."""
    by_number, by_name = (getattr(config, name, None) or {} for name in ("id2label", "label2id"))
    found = _in_order(by_number.items())
    if found and _numbers([_plain(name) for name in found]) is None:
        return found
    return _in_order((number, name) for name, number in by_name.items()) or found


def _in_order(pairs: Any) -> list[str]:
    """Names by their numbers, if these are all there."""
    try:
        found = {int(number): str(name) for number, name in pairs}
    except (TypeError, ValueError):  # of a configuration that nobody has checked
        return []
    return [found[number] for number in range(len(found))] if set(found) == set(range(len(found))) else []


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def _numbers(names: Sequence[str]) -> list[int] | None:
    """What names say that are no more than numbers; None where one is more."""
    found = [_NUMBER.fullmatch(name) for name in names]
    return None if None in found else [int(match[1]) for match in found if match is not None]


def label_columns(task: Task, config: Any, examples: "datasets.Dataset | None" = None) -> list[int] | None:
    """Which output of a classifier stands for each label of the data.

    Args:
        task: the task.
        config: the model's configuration; its ``id2label`` is believed, and ``label2id`` where that says nothing.
        examples: the data; of the tasks of GLUE the names are known without it.

    Returns:
        One output index per label, or None when the outputs are taken as they are.

    Raises:
        CheckpointError: some names fit and stand elsewhere, and the others cannot be matched.

    Warns:
        ShrinkformerWarning: names differ, with both lists and what was made of them.
    """
    names, outputs = label_names(task, examples), output_names(config)
    if not names or len(names) != len(outputs):
        return None
    wanted, ours = [_plain(name) for name in names], [_plain(name) for name in outputs]
    numbers = _numbers(ours)
    if numbers is not None:  # LABEL_1 is the second label, wherever it stands
        ordered = [*range(len(names))]
        return None if sorted(numbers) != ordered or numbers == ordered else [numbers.index(label) for label in ordered]
    if set(ours) == set(wanted) and len(set(ours)) == len(ours):
        return [ours.index(name) for name in wanted]
    lists = f"the checkpoint names its outputs {', '.join(outputs)}, task {task.name} its labels {', '.join(names)}"
    found = _matched(wanted, ours)
    if found is not None:
        read = ", ".join(f"{outputs[column]} as {name}" for name, column in zip(names, found, strict=True))
        warn(f"{lists}; label names are read so: {read}")
        return found
    astray = [name for name in wanted if name in ours and ours.index(name) != wanted.index(name)]
    if astray:
        raise CheckpointError(
            f"{lists}; {', '.join(astray)} stands in another place, and the other labels cannot be matched by name; "
            "name all of them in id2label of config.json."
        )
    warn(f"{lists}; these label names cannot be matched, so outputs are taken in the order in which they stand")
    return None


def _matched(wanted: Sequence[str], ours: Sequence[str]) -> list[int] | None:
    """By name, by a beginning that no other name has, and the last one by elimination; None where that fails."""
    found: dict[str, int] = {name: ours.index(name) for name in wanted if ours.count(name) == 1}
    for column, name in enumerate(ours):
        alike = [other for other in wanted if len(name) >= _SHORTEST and other.startswith(name)]
        if column not in found.values() and len(alike) == 1:
            found.setdefault(alike[0], column)
    left = sorted(set(range(len(ours))) - set(found.values()))
    if found and len(left) == 1 and len(found) == len(wanted) - 1:
        found |= {name: left[0] for name in wanted if name not in found}
    return [found[name] for name in wanted] if len(found) == len(wanted) else None


def warn_below_chance(task: Task, metrics: Mapping[str, float], config: Any) -> None:
    """Tell of a dense model that is worse than guessing, by more than two standard errors.

    Args:
        task: the task.
        metrics: of the model, with their standard errors.
        config: of the model.

    Warns:
        ShrinkformerWarning: it is, with the figures and the most likely cause.
    """
    name = task.metrics[0]
    chance = {"accuracy": 1 / (task.num_labels or 2)}.get(name, 0.0 if name in _CORRELATIONS else None)
    value, error = metrics.get(name), metrics.get(f"{name}{STDERR}", 0.0)
    if chance is None or value is None or not value + 2 * error < chance:
        return
    cause = "its scale is most likely turned round, or it was made for another task"
    if task.kind == "classification":
        cause = (
            f"its outputs ({', '.join(output_names(config)) or 'without names'}) most likely stand in another order "
            f"than the labels of {task.name} ({', '.join(_GLUE.get(task.name, ()))}): correct id2label in config.json"
        )
    figures = f"{name} of the model is {value:.3f} (standard error {error:.3f}), below chance ({chance:.3f})"
    warn(f"task {task.name}: {figures}; {cause}")
