"""Tasks of EleutherAI's lm-evaluation-harness, run on a model that is in memory."""

import contextlib
import copy
import importlib.util
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shrinkformer.errors import DataError, InputError
from shrinkformer.utils.installation import how_to_install
from shrinkformer.utils.modes import evaluation_mode

FLAG = "--lm_eval"


def harness_is_installed() -> bool:
    """Whether the harness can be imported; it is an extra."""
    return importlib.util.find_spec("lm_eval") is not None


def run_harness(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    batch_size: int,
    limit: int | None = None,
    include_path: Path | None = None,
) -> dict[str, float]:
    """Measure a causal language model on tasks of the harness, each in the harness' own default way.

    Args:
        model: a transformers model, where it is to run; its training mode is restored.
        tokenizer: its tokenizer; left as it is.
        tasks: names of tasks or groups, such as ``lambada_openai`` or ``hellaswag``.
        batch_size: requests per forward pass.
        limit: examples per task; None for all, which is the only choice that gives the figures of papers.
        include_path: a folder with task descriptions (YAML) of the user's own.

    Returns:
        ``{"lm_eval/<task>/<metric>": value, "lm_eval/<task>/<metric>_stderr": ...}`` in the harness' units; a metric
        that reads the answers through a filter is ``<metric>_<filter>``. Empty in all but the first process of a job.

    Raises:
        InputError: the harness is not installed, there is no such task, or a number is out of range.
        DataError: the data of a task cannot be had.

    Source: Gao et al., "A framework for few-shot language model evaluation", https://zenodo.org/records/10256836.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise InputError(f"{FLAG}: batch size {batch_size} and limit {limit} must be at least 1")
    if not tasks:
        raise InputError(f"{FLAG} names no task; give at least one, such as lambada_openai")
    try:
        from lm_eval.evaluator import simple_evaluate  # imported here: it is an extra, and takes seconds
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"{FLAG} needs the lm-evaluation-harness ({error}): {how_to_install('lm-eval')}") from error
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    _require_tasks(tasks, manager.all_tasks)
    with evaluation_mode(model), torch.no_grad(), _random_states_kept():
        _load(manager, tasks)
        own = copy.deepcopy(tokenizer)  # the harness gives it a padding token
        wrapped = HFLM(pretrained=model, tokenizer=own, batch_size=batch_size)
        found = simple_evaluate(model=wrapped, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False)
    return {} if found is None else _figures(found["results"])


def _load(manager: Any, tasks: Sequence[str]) -> None:
    """Load the data beforehand, so that what fails then is known to be the data; the harness finds it in the cache."""
    try:
        manager.load(list(tasks))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise DataError(
            f"{FLAG} {' '.join(tasks)}: the data could not be loaded ({reason}); connect to the network, or leave the "
            "task out"
        ) from error


def _require_tasks(tasks: Sequence[str], known: Sequence[str]) -> None:
    names = set(known)
    missing = [name for name in tasks if name not in names]
    if missing:
        raise InputError(
            f"{FLAG} {' '.join(missing)}: the lm-evaluation-harness has no such task; `lm_eval ls tasks` lists its "
            f"{len(names)} tasks and groups"
        )


def _figures(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The numbers of the harness' table, whose keys are ``<metric>,<filter>`` and ``<metric>_stderr,<filter>``."""
    figures = {}
    for task, row in results.items():
        for key, value in row.items():
            metric, comma, view = key.partition(",")
            if not comma or not isinstance(value, (int, float)):  # the task's name; a standard error "N/A"
                continue
            name = metric.removesuffix("_stderr") + ("" if view == "none" else f"_{view}")
            ending = "_stderr" if metric.endswith("_stderr") else ""
            figures[f"lm_eval/{task}/{name}{ending}"] = float(value)
    return figures


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    """Put the global generators back as they were: the harness seeds all of them."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
