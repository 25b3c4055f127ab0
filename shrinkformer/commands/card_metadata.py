"""What the hub reads of a model card: its YAML section."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, metadata_load
from yaml import YAMLError

from shrinkformer.architectures.heads import BARE, head_of
from shrinkformer.commands.locate import Source
from shrinkformer.dataset.corpus import CORPORA
from shrinkformer.dataset.tasks import TASKS
from shrinkformer.prune.side_files import SIDE_PATTERNS
from shrinkformer.utils.hub import NAME, some_files

_COPIED = ("language", "license", "license_name", "license_link")

_LONGEST_CARD, _MOST_WORDS, _LONGEST_WORD = 2**20, 500, 500
"""Bytes of a card, texts of a list and characters of a text that are read."""

_PERPLEXITY = "perplexity_"


def side_folder(source: Source) -> Path | None:
    """Folder with the model card of the dense model and what goes with its weights; None if it cannot be had."""
    return some_files(source.location, ("README.md", *SIDE_PATTERNS))


def inherited(source: Source, folder: Path | None) -> dict[str, Any]:
    """What the card of the dense model says and holds for what is made of it, and the name of the dense model.

    Args:
        source: The dense model.
        folder: With its card, from :func:`side_folder`.
    """
    theirs = {} if folder is None else _metadata_of(folder / "README.md")
    found = {name: theirs[name] for name in _COPIED if theirs.get(name)}
    on_hub = NAME.fullmatch(source.location) and not Path(source.location).exists()
    namespaced = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source.name) and not Path(source.name).exists()
    base = source.location if on_hub else source.name if namespaced else theirs.get("base_model")
    return found | ({"base_model": base} if base else {})


def _metadata_of(card: Path) -> dict[str, Any]:
    """What a model card says in its YAML section, as far as it is texts and short lists of texts; {} for no card."""
    try:
        if card.stat().st_size > _LONGEST_CARD:
            return {}
        read = metadata_load(card)
    except (OSError, ValueError, YAMLError, RecursionError):  # no card, or one that cannot be read
        return {}
    found = read if isinstance(read, dict) else {}
    return {str(name): value for name, value in found.items() if _is_text(value)}


def _is_text(value: Any) -> bool:
    """Whether a value is a text or a short list of texts; others may be made of each other without end."""
    words = value if isinstance(value, list) else [value]
    return len(words) <= _MOST_WORDS and all(isinstance(word, str) and len(word) <= _LONGEST_WORD for word in words)


def pipeline_tag(architecture: str, *, sentence_encoder: bool) -> str:
    """What a model is for, in the hub's words."""
    return "sentence-similarity" if sentence_encoder else (head_of(architecture) or BARE).task


def metadata(
    name: str,
    *,
    tags: list[str],
    library: str,
    pipeline: str,
    inherited: Mapping[str, Any],
    results: list[EvalResult],
) -> str:
    """The YAML section, without the lines around it."""
    data = ModelCardData(
        **inherited,
        library_name=library,
        pipeline_tag=pipeline,
        tags=tags,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def results_of(task_name: str, metrics: Mapping[str, float], pipeline: str) -> list[EvalResult]:
    """Metrics of a model in the form of the hub's ``model-index``; standard errors have no place there.

    Args:
        task_name: Of the run.
        metrics: By their names in reports; measured on the evaluation splits of public data sets.
        pipeline: Task of the model, in the hub's words.
    """
    plain = {name: value for name, value in metrics.items() if not name.endswith("_stderr")}
    results = []
    for metric, value in plain.items():
        where = _data_of(task_name, metric)
        if where is not None:
            hub, config, split, title, kind = where
            results.append(
                EvalResult(
                    task_type=pipeline,
                    dataset_type=hub,
                    dataset_name=title,
                    dataset_config=config,
                    dataset_split=split,
                    metric_type=kind,
                    metric_name=kind,
                    metric_value=round(value, 5),
                )
            )
    return results


def _data_of(task_name: str, metric: str) -> tuple[str, str | None, str, str, str] | None:
    """Data set, configuration, split, title, and kind of a metric; None for what is measured elsewhere."""
    corpus = CORPORA.get(metric.removeprefix(_PERPLEXITY))
    if metric.startswith(_PERPLEXITY) and corpus is not None:
        return (*corpus.hub, corpus.evaluation_split, corpus.name, "perplexity")
    task = TASKS.get(task_name)
    if task is None:
        return None
    mismatched = metric.endswith("_mm")
    kind = metric.removesuffix("_mm")
    if kind not in task.metrics:
        return None
    split = task.evaluation_splits[-1 if mismatched else 0]
    return (*task.hub, split, task.hub[1] or task.name, kind)
