"""From texts to token ids: once per data set, unpadded, so that batch size and padding are nobody's concern later."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from shrinkformer.dataset.tasks import Task
from shrinkformer.errors import DataError, InputError

if TYPE_CHECKING:
    import datasets

Features = list[dict[str, list[int]]]

MAX_QUESTION = 64
"""Longest question in tokens; the rest of a longer one is cut (as Devlin et al. 2019 do in their run_squad.py)."""


@dataclass(frozen=True, eq=False)
class Window:
    """One piece of a long context, as the model sees it.

    Attributes:
        example: index of the question in ``Encoded.examples``.
        offsets: shape (tokens, 2), int32: where each token starts and ends in the context, counted in characters;
            (-1, -1) for tokens that are not of the context (question, special tokens).
    """

    example: int
    offsets: npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Encoded:
    """Tokenised, unpadded inputs.

    Attributes:
        features: one dictionary per model input: ``input_ids``, ``attention_mask`` and, where the tokenizer makes them,
            ``token_type_ids``. For similarity: all first sentences, then all second sentences.
        labels: one per example, or None (question answering, or examples without labels).
        windows: question answering: one per feature; otherwise None.
        examples: the raw examples that the features were made from.
    """

    features: Features
    labels: list[float] | list[int] | None
    windows: list[Window] | None
    examples: "datasets.Dataset | None"

    @property
    def lengths(self) -> list[int]:
        """Tokens of each feature, special tokens included."""
        return [len(feature["input_ids"]) for feature in self.features]

    @property
    def tokens(self) -> int:
        """Tokens of all features together."""
        return sum(self.lengths)

    @property
    def mean_length(self) -> float:
        """Mean unpadded length of a feature, in tokens (0.0 without features)."""
        return self.tokens / len(self.features) if self.features else 0.0


def encode(
    examples: "datasets.Dataset",
    task: Task,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    prepare: Callable[[str], str] = str,
) -> Encoded:
    """Tokenise examples for a task.

    Args:
        examples: rows with the task's text columns; the label column is used where it is there.
        task: the task.
        tokenizer: a transformers tokenizer; question answering needs a fast one.
        max_length: a limit below the task's own, in tokens.
        prepare: what a sentence encoder does to each text first (similarity only).

    Returns:
        The unpadded features. Inputs longer than the least of ``task.max_length``, the tokenizer's ``model_max_length``
        and ``max_length`` are cut; a long context of a question becomes several windows instead.

    Raises:
        DataError: the examples lack a text column of the task.
        InputError: question answering with a slow tokenizer, or a length too short to hold a question and a context.
    """
    missing = [name for name in task.columns if name not in examples.column_names]
    if missing:
        raise DataError(f"the examples have no column {', '.join(missing)}, which task {task.name} needs")
    limit = length_limit(task, tokenizer, max_length)
    if task.kind == "question_answering":
        features, windows = _windows(examples, task, tokenizer, limit)
        return Encoded(features, None, windows, examples)
    texts = [examples[name][:] for name in task.columns]
    if task.kind == "similarity":
        features = encode_texts([prepare(text) for text in texts[0] + texts[1]], tokenizer, limit)
    else:
        features = _rows(tokenizer(*texts, truncation=True, max_length=limit, padding=False))
    labels = examples[task.label_column][:] if task.label_column in examples.column_names else None
    return Encoded(features, labels, None, examples)


def encode_texts(texts: Sequence[str], tokenizer: Any, limit: int) -> Features:
    """Tokenise single texts, each cut at ``limit`` tokens (special tokens included)."""
    return _rows(tokenizer(list(texts), truncation=True, max_length=limit, padding=False))


def length_limit(task: Task, tokenizer: Any, max_length: int | None = None) -> int:
    """Return the longest input in tokens that task, tokenizer and caller allow.

    Raises:
        InputError: ``max_length`` is not positive.
    """
    if max_length is not None and max_length < 1:
        raise InputError(f"max_length is {max_length}; it is a number of tokens, at least 1")
    limits = [task.max_length, int(tokenizer.model_max_length), max_length]
    return min(limit for limit in limits if limit is not None)


def padded_batches(
    features: Features, tokenizer: Any, batch_size: int
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Cut features into batches of similar length, longest first, so that little is padded and memory peaks at once.

    Args:
        features: unpadded features.
        tokenizer: pads them (its padding token).
        batch_size: features per batch.

    Yields:
        The indices of a batch's features, and its int64 tensors of shape (batch, longest length in the batch).

    Raises:
        InputError: ``batch_size`` is not positive, or the tokenizer has no padding token.
    """
    if batch_size < 1:
        raise InputError(f"--batch_size {batch_size} is not a positive number of examples")
    if tokenizer.pad_token_id is None:
        raise InputError("the tokenizer has no padding token; set tokenizer.pad_token before batching")
    order = sorted(range(len(features)), key=lambda index: -len(features[index]["input_ids"]))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        yield indices, pad([features[index] for index in indices], tokenizer)


def pad(features: Features, tokenizer: Any) -> dict[str, torch.Tensor]:
    """Pad features to the longest of them: int64 tensors of shape (batch, length).

    Always on the right: many models count positions from the first column, padding or not.
    """
    warned = tokenizer.deprecation_warnings.get("Asking-to-pad-a-fast-tokenizer", False)
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True  # the ids exist already: pad is all we want
    try:
        return dict(tokenizer.pad(features, padding=True, padding_side="right", return_tensors="pt"))
    finally:
        tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = warned


def _rows(encoding: Any) -> Features:
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoding]
    return [dict(zip(names, values, strict=True)) for values in zip(*(encoding[name] for name in names), strict=True)]


def _windows(examples: "datasets.Dataset", task: Task, tokenizer: Any, limit: int) -> tuple[Features, list[Window]]:
    if not tokenizer.is_fast:
        raise InputError(
            f"task {task.name} needs a fast tokenizer (character offsets), this checkpoint has a slow one: "
            f"{type(tokenizer).__name__}; save it again from transformers.AutoTokenizer"
        )
    longest_question = min(MAX_QUESTION, limit // 3)
    room = limit - tokenizer.num_special_tokens_to_add(pair=True) - longest_question
    if room < 2:
        raise InputError(f"max_length {limit} cannot hold a question and a piece of its context; task {task.name}")
    texts = {
        "question": _cut([text.strip() for text in examples["question"]], tokenizer, longest_question),
        "context": examples["context"][:],
    }
    # Models that were trained with padding on the left read the context first; with a token that stands for the whole
    # input at its beginning nobody was, whatever a tokenizer was saved with.
    question_first = tokenizer.padding_side == "right" or tokenizer.cls_token_id is not None
    first, second = ("question", "context") if question_first else ("context", "question")
    encoding = tokenizer(
        texts[first],
        texts[second],
        truncation="only_second" if question_first else "only_first",
        max_length=limit,
        stride=min(task.stride, room // 2),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding=False,
    )
    context_id = 1 if question_first else 0
    windows = []
    for row, example in enumerate(encoding["overflow_to_sample_mapping"]):
        offsets = np.asarray(encoding["offset_mapping"][row], dtype=np.int32).reshape(-1, 2)
        outside = [part != context_id for part in encoding.sequence_ids(row)]
        offsets[outside] = -1
        windows.append(Window(int(example), offsets))
    return _rows(encoding), windows


def _cut(texts: list[str], tokenizer: Any, tokens: int) -> list[str]:
    encoding = tokenizer(texts, add_special_tokens=False, truncation=False, padding=False, return_offsets_mapping=True)
    cut = []
    for text, offsets in zip(texts, encoding["offset_mapping"], strict=True):
        cut.append(text if len(offsets) <= tokens else text[: offsets[tokens - 1][1]])
    return cut
