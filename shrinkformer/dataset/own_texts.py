"""Texts for a model that is pruned by its own head, without a task: the user's file, or what comes with the package."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shrinkformer.architectures.heads import Head
from shrinkformer.dataset.calibration import sample_indices
from shrinkformer.dataset.files import read_file, read_lines, read_text
from shrinkformer.dataset.given import WORDS, Text, Words, text_columns, word_column
from shrinkformer.dataset.loading import load_split
from shrinkformer.dataset.tasks import get_task
from shrinkformer.errors import DataError, InputError
from shrinkformer.trust.foreign import shortened

PAIRED = ("question-answering", "multiple-choice")
"""Heads whose inputs are two texts, whatever they were trained on."""

CHOICE_COLUMNS = ("choices", "options", "endings")

_CHOICES, _ASIDE, _MOST_ASIDE, _FEWEST = 4, 5, 512, 10
_MASKED = 0.15  # of the tokens, as in Devlin et al. 2019, section 3.1


@dataclass(frozen=True)
class OwnTexts:
    """Texts that nobody has labelled.

    Attributes:
        calibration: Those that a model is calibrated on.
        judged: Others, on which dense and smaller models are compared.
        where: What they are, in words.
    """

    calibration: Sequence[Text]
    judged: Sequence[Text]
    where: str


def read_own_texts(path: Path | None, head: Head, *, size: int, seed: int) -> OwnTexts:
    """Read texts, and set a fifth of them aside, 512 at most.

    Args:
        path: The user's file; None for the bundled sentences.
        head: That they are for.
        size: Texts to calibrate on at most.
        seed: Of the draw.

    Raises:
        DataError: The file cannot be read, or has no columns that make an input.
    """
    texts = _bundled(head) if path is None else _of_file(path, head)
    if len(texts) < _FEWEST:
        raise DataError(
            f"--calibration_file {path}: {len(texts)} examples; give at least {_FEWEST}, some hundred are good"
        )
    order = [texts[index] for index in sample_indices(len(texts), len(texts), seed)]
    aside = min(_MOST_ASIDE, max(2, len(texts) // _ASIDE))
    calibration = order[aside : aside + size]
    source = "bundled sentences, which need not be like those that the model is for" if path is None else str(path)
    where = f"{len(calibration)} of {len(texts)} examples of {source}; {aside} others judge"
    return OwnTexts(calibration, order[:aside], where)


def _of_file(path: Path, head: Head) -> list[Text]:
    if path.suffix.lower() == ".txt":
        return _of_lines(path, head)
    rows = read_file(path, text_columns=())
    first: dict[str, Any] = rows[0] if len(rows) else {}
    choices = next((name for name in CHOICE_COLUMNS if name in first), None)
    if head.task == "multiple-choice" and choices is None:
        raise DataError(
            f"{path} has no column {', '.join(CHOICE_COLUMNS)} with a list of texts, which a multiple choice model "
            f"needs beside a prompt (found: {', '.join(first)})"
        )
    words = word_column(first)
    if words is not None and head.task not in PAIRED:
        return _of_words(rows[words][:], words, path)
    try:
        columns = text_columns({name: value for name, value in first.items() if isinstance(value, str)})
    except InputError as error:
        raise DataError(f"{path}: {error}") from None
    if not columns or (head.task == "question-answering" and len(columns) < 2):
        need = (
            "two columns of texts (question, context)"
            if head.task == "question-answering"
            else f"a column of texts, or one of lists of words ({' or '.join(WORDS)})"
        )
        raise DataError(f"{path}: {head.task} needs {need} (found: {', '.join(first)})")
    texts: list[Text] = []
    for number, row in enumerate(rows):
        parts = [row[name] for name in columns]
        if not all(isinstance(part, str) for part in parts):
            raise DataError(f"{path}, row {number}: {', '.join(columns)} hold something else than texts")
        prompt = " ".join(parts)
        own: Text = parts[0] if len(parts) == 1 else (parts[0], parts[1])
        texts.append([(prompt, choice) for choice in _choices(row[choices], path, number)] if choices else own)
    return texts


def _of_words(rows: Sequence[Any], name: str, path: Path) -> list[Text]:
    """Each row one example in words."""
    for number, row in enumerate(rows):
        if not isinstance(row, list) or not all(isinstance(word, str) for word in row):
            raise DataError(f"{path}, row {number}: {name} holds {shortened(repr(row))}, which is no list of words")
    return [Words(tuple(row)) for row in rows]


def _choices(value: Any, path: Path, number: int) -> list[str]:
    found = value.get("text") if isinstance(value, Mapping) else value
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(choice, str) for choice in found):
        raise DataError(f"{path}, row {number}: the choices are no list of texts")
    return found


def _of_lines(path: Path, head: Head) -> list[Text]:
    """One example per line; tabs stand between the texts of one, the choices of a prompt behind it."""
    if head.task != "multiple-choice":
        first = next((line for line in read_text(path).split("\n") if line.strip()), "")
        columns = ("question", "context") if head.task == "question-answering" or "\t" in first else ("text",)
        rows = read_lines(path, columns)
        return [row[columns[0]] if len(columns) == 1 else (row[columns[0]], row[columns[1]]) for row in rows]
    texts: list[Text] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        prompt, *choices = line.rstrip("\r").split("\t")
        if line.strip() and len(choices) < 2:
            raise DataError(f"{path}, line {number}: give a prompt and its choices, with tabs between them")
        if line.strip():
            texts.append([(prompt, choice) for choice in choices])
    return texts


def _bundled(head: Head) -> list[Text]:
    rows = load_split(get_task("similarity"), "train", data_dir=None, bundled=True)
    first, second = rows["sentence1"][:], rows["sentence2"][:]
    if head.task == "multiple-choice":  # the sentence that belongs to it, and some of others
        last = len(second)
        return [
            [(prompt, second[(index + step) % last]) for step in range(_CHOICES)] for index, prompt in enumerate(first)
        ]
    return list(zip(first, second, strict=True)) if head.task in PAIRED else list(first)


def masked(batches: Sequence[Mapping[str, Tensor]], tokenizer: Any, *, seed: int) -> list[dict[str, Tensor]]:
    """Inputs as a masked language model gets them: some tokens, special ones aside, are hidden; at least one of each.

    Raises:
        InputError: The tokenizer has no mask.
    """
    mask_id = tokenizer.mask_token_id
    if mask_id is None:
        raise InputError("the checkpoint fills in masked words, but its tokenizer has no mask token; add its files.")
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for batch in batches:
        ids = batch["input_ids"]
        chances = torch.rand(ids.shape, generator=generator)
        chances[torch.isin(ids, special) | (batch["attention_mask"] == 0)] = 2.0
        hidden = chances < torch.maximum(torch.tensor(_MASKED), chances.min(-1, keepdim=True).values + 1e-6).clamp(
            max=1
        )
        found.append({**batch, "input_ids": ids.masked_fill(hidden, mask_id)})
    return found
