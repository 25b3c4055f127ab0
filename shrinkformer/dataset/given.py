"""What people hold examples in, one piece at a time: token ids of a batch or of one example, or texts."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from shrinkformer.dataset.tasks import TASKS
from shrinkformer.errors import InputError
from shrinkformer.trust.foreign import shortened

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
"""What is taken of an example; labels and other columns are not looked at."""

WAYS = (
    "pass token ids (a DataLoader, a list or a Dataset of what a tokenizer returns), or texts with tokenizer=; "
    "docs/python.md lists all forms"
)

WORDS = ("tokens", "words")
"""Names of a column that holds the words of an example, as data for token classification does."""


@dataclass(frozen=True)
class Words:
    """One text that somebody has split into words."""

    words: tuple[str, ...]


Text = str | Words | tuple[str, str] | list[Any]
"""A text, whole or in words, a pair of them, or a list of either: one for each choice."""

Values = Tensor | list[Any]
"""Integers: a tensor, or nested lists of tensors of several lengths."""


@dataclass
class Piece:
    """One piece of what was given.

    Attributes:
        columns: Token ids and what goes with them, by name; all have as many dimensions.
        texts: Texts, where it holds those.
        several: Whether it holds several examples for sure; otherwise its dimensions tell.
    """

    columns: dict[str, Values] = field(default_factory=dict)
    texts: list[Text] = field(default_factory=list)
    several: bool = False

    @property
    def ndim(self) -> int:
        """Dimensions of the token ids."""
        return dimensions(self.columns["input_ids"])


def pieces_of(data: Any, pad_id: int | None) -> Iterator[Piece]:
    """The pieces of anything that holds examples, in order.

    Args:
        data: See :func:`~shrinkformer.dataset.batches.as_batches`.
        pad_id: Of the model's padding, to tell a mask from token types.

    Raises:
        InputError: It holds something else, which the message names.
    """
    if isinstance(data, str | bytes) or data is None or not isinstance(data, Iterable | Mapping):
        data = _indexed(data)
    if hasattr(data, "iloc") and hasattr(data, "columns"):  # a DataFrame; of its own it gives names of columns
        names = list(map(str, data.columns))
        data = (dict(zip(names, row, strict=True)) for row in data.itertuples(index=False, name=None))
    if isinstance(data, Mapping):
        if data and all(hasattr(value, "column_names") for value in data.values()):
            raise InputError(f"the examples are a dict of data sets ({', '.join(map(str, data))}); pass one of them.")
        yield replace(_piece(data, "the examples", pad_id, batch=True), several=True)
        return
    if isinstance(data, Tensor | np.ndarray) and data.ndim > 1:
        yield replace(_piece(data, "the examples", pad_id), several=True)
        return
    loader = isinstance(data, DataLoader) and data.batch_sampler is not None
    transposed = isinstance(data, DataLoader) and data.collate_fn is default_collate
    for number, item in enumerate(_items(data)):
        given = _collated(item) if transposed else item
        where = f"batch {number}" if loader else f"example {number}"
        yield replace(_piece(given, where, pad_id, batch=loader), several=loader)


def _indexed(data: Any) -> Any:
    """The items of a map-style data set of torch, which cannot be iterated."""
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, str | bytes):
        return (data[index] for index in range(len(data)))
    raise InputError(f"the examples are {described(data)}; {WAYS}.")


def _items(data: Iterable[Any]) -> Iterator[Any]:
    """Of a loader, with its own errors as one of ours: padding is what most of them lack."""
    iterator = iter(data)
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except (RuntimeError, ValueError, TypeError) as error:
            if not isinstance(data, DataLoader) or isinstance(error, InputError):
                raise
            reason = str(error).strip().splitlines()[-1][:160]
            raise InputError(
                f"the DataLoader cannot make a batch ({type(error).__name__}: {reason}); give it "
                "collate_fn=DataCollatorWithPadding(tokenizer), or pass the data set itself."
            ) from error
        yield item


def _collated(item: Any) -> Any:
    """Undo what torch's own collation makes of lists: one tensor for each position instead of one for each example."""
    if isinstance(item, Mapping):
        return {name: _stacked(value, words=name in WORDS) for name, value in item.items()}
    if isinstance(item, list) and item and all(isinstance(part, tuple | list) for part in item):
        columns = [list(part) for part in item]
        if all(isinstance(text, str) for column in columns for text in column):
            return list(zip(*columns, strict=True))  # pairs of texts
    return item


def _stacked(value: Any, *, words: bool = False) -> Any:
    if words and isinstance(value, list) and all(isinstance(part, tuple) for part in value):
        return list(zip(*value, strict=True))
    if isinstance(value, list) and value and not isinstance(value[0], str):
        parts = [_stacked(part) for part in value]
        if all(isinstance(part, Tensor) for part in parts):
            return torch.stack(parts, dim=1 if parts[0].ndim else 0)
    return value


def _piece(item: Any, where: str, pad_id: int | None, *, batch: bool = False) -> Piece:
    """What one item holds."""
    if isinstance(item, tuple | list) and item and isinstance(item[0], Mapping) and not isinstance(item, list):
        item = item[0]  # (inputs, labels)
    if isinstance(item, Mapping):
        return _of_names(item, where, batch=batch)
    texts = _texts(item, batch=batch)
    if texts is not None:
        return Piece(texts=texts)
    try:
        if isinstance(item, tuple) or (isinstance(item, list) and item and _is_matrix(item[0])):
            return Piece(_by_position([integers(part) for part in item], pad_id, where))
        return Piece({"input_ids": integers(item)})
    except _NoNumbersError:
        raise InputError(f"{where}: found {described(item)}; {WAYS}.") from None


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray) and value.ndim > 1


def _texts(item: Any, *, batch: bool) -> list[Text] | None:
    """The texts of an item; a list of several is one example, unless a loader made it."""
    if isinstance(item, str | Words):
        return [item]
    if isinstance(item, np.ndarray) and item.dtype.kind in "UO":
        item = item.tolist()
    if not isinstance(item, list | tuple) or not item or not all(_is_text(part) for part in item):
        return None
    if batch:
        return list(item)
    return [tuple(item) if isinstance(item, tuple) and len(item) == 2 else list(item)]


def _is_text(value: Any) -> bool:
    """Whether it is a text, or a list of nothing else."""
    several = isinstance(value, list | tuple) and bool(value) and all(isinstance(part, str) for part in value)
    return isinstance(value, str) or several


def _of_names(item: Mapping[str, Any], where: str, *, batch: bool) -> Piece:
    """A batch or example with names."""
    if "input_ids" in item:
        try:
            columns = {name: _or_empty(item[name]) for name in INPUTS if item.get(name) is not None}
        except _NoNumbersError:
            shown = {name: described(item[name]) for name in INPUTS if name in item}
            raise InputError(f"{where}: {shown}, which are no integers; {WAYS}.") from None
        return Piece(columns)
    found = {name: value for name, value in item.items() if _holds_texts(value)}
    words = word_column(item)
    if words is not None:
        return Piece(texts=_split(item[words]))
    columns_of_text = text_columns(found)
    if not columns_of_text:
        raise InputError(f"{where}: no input_ids and no texts, but {shortened(', '.join(map(str, item)))}; {WAYS}.")
    values = [item[name] for name in columns_of_text]
    lists = [name for name, value in zip(columns_of_text, values, strict=True) if not isinstance(value, str)]
    if lists and not batch and (len(lists) < len(values) or _known_columns(found) is None):
        raise InputError(
            f"{where}: {lists[0]} holds a list of texts; the words of one example go under {' or '.join(WORDS)}, one "
            "text for each example under text."
        )
    rows = list(zip(*values, strict=True)) if lists else [tuple(values)]
    return Piece(texts=[row[0] if len(row) == 1 else (row[0], row[1]) for row in rows])


def word_column(item: Mapping[str, Any]) -> str | None:
    """The column with the words of an example, or of each of several; None where the text itself stands beside it."""
    if _known_columns(name for name, value in item.items() if _holds_texts(value)) is not None:
        return None
    for name in WORDS:
        value = _listed(item.get(name))
        if isinstance(value, list | tuple) and all(_is_text(part) or _are_words(part) for part in value):
            return name
    return None


def _split(value: Any) -> list[Text]:
    """The words of one example, or of several."""
    rows = _listed(value)
    one = all(isinstance(word, str) for word in rows)
    return [Words(tuple(_listed(row))) for row in ([rows] if one else rows)]


def _are_words(value: Any) -> bool:
    value = _listed(value)
    return isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _holds_texts(value: Any) -> bool:
    return _is_text(_listed(value))


def text_columns(item: Mapping[str, Any]) -> tuple[str, ...]:
    """Which columns of texts make an input: those of a known task, or all there are if these are one or two.

    Raises:
        InputError: There are more.
    """
    names = tuple(name for name in item if name not in {"label", "labels", "id", "idx", "guid"})
    known = _known_columns(names)
    if known is not None:
        return known
    if len(names) > 2:
        raise InputError(
            f"the examples have texts in {', '.join(names)}; pass those that make an input alone, such as "
            f"dataset.select_columns({list(names[:2])})."
        )
    return names


def _known_columns(names: Iterable[str]) -> tuple[str, ...] | None:
    """Those of a known task."""
    given = set(names)
    of_tasks = sorted((task.columns for task in TASKS.values()), key=len, reverse=True)
    known = [("text", "text_pair"), *of_tasks, ("text",)]
    return next((columns for columns in known if set(columns) <= given), None)


def _by_position(parts: list[Values], pad_id: int | None, where: str) -> dict[str, Values]:
    """Names for a tuple: token ids, then a mask and token types in either order; what has another shape is no input."""
    ids, others = parts[0], [part for part in parts[1:] if shape_of(part) == shape_of(parts[0])]
    columns: dict[str, Values] = {"input_ids": ids}
    masks = [part for part in others if _is_mask(part, ids, pad_id)]
    if len(masks) > 1 and not all(_equal(masks[0], mask) for mask in masks[1:]):
        raise InputError(f"{where} is a tuple with {len(masks)} tensors that could be its mask; pass dicts with names.")
    if masks:
        columns["attention_mask"] = masks[0]
    types = [part for part in others if not any(part is mask for mask in masks) and _is_binary(part)]
    if masks and types:
        columns["token_type_ids"] = types[0]
    return columns


def _is_binary(values: Values) -> bool:
    if isinstance(values, list):
        return all(_is_binary(part) for part in values)
    return bool(((values == 0) | (values == 1)).all())


def _is_mask(values: Values, ids: Values, pad_id: int | None) -> bool:
    """Whether some values are one where there is a token and zero where there is padding."""
    if isinstance(values, list):
        return all(_is_mask(part, own, pad_id) for part, own in zip(values, ids, strict=True))
    if not _is_binary(values) or not bool(values.sum(-1).all()):
        return False
    kept = torch.as_tensor(ids)[values == 0]
    return not len(kept) or bool((kept == (kept[0] if pad_id is None else pad_id)).all())


def _equal(one: Values, other: Values) -> bool:
    if isinstance(one, list):
        return all(_equal(*pair) for pair in zip(one, other, strict=True))
    return torch.equal(one, torch.as_tensor(other))


class _NoNumbersError(Exception):
    """A value is something else than integers."""


def integers(value: Any) -> Values:
    """Integers as a tensor, or as nested lists of tensors where lengths differ."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "O":
        value = value.tolist()
    if isinstance(value, Tensor | np.ndarray):
        tensor = torch.as_tensor(value)
        if tensor.is_complex() or (tensor.is_floating_point() and not bool((tensor == tensor.round()).all())):
            raise _NoNumbersError
        return tensor.to(torch.int64)
    if not isinstance(value, list | tuple) or not value:
        raise _NoNumbersError
    if all(isinstance(number, int | np.integer | bool) for number in value):
        return torch.tensor([int(number) for number in value])
    parts = [_or_empty(part) for part in value]
    if all(isinstance(part, Tensor) and part.shape == shape_of(parts[0]) for part in parts):
        return torch.stack([torch.as_tensor(part) for part in parts])
    return parts


def _or_empty(value: Any) -> Values:
    return integers(value) if _is_full(value) else torch.zeros(0, dtype=torch.int64)


def _is_full(value: Any) -> bool:
    return not isinstance(value, list | tuple) or len(value) > 0


def dimensions(values: Values) -> int:
    """How many, as of a tensor."""
    return values.ndim if isinstance(values, Tensor) else 1 + dimensions(values[0])


def shape_of(values: Values) -> Any:
    """As of a tensor; of values of several lengths, a list of the shapes of all parts."""
    return tuple(values.shape) if isinstance(values, Tensor) else [shape_of(part) for part in values]


def described(value: Any) -> str:
    """What a value is, in a few words."""
    if isinstance(value, Tensor | np.ndarray):
        return f"a {type(value).__name__} of {value.dtype} and shape {tuple(value.shape)}"
    if isinstance(value, str):
        return f"one text, {shortened(repr(value))}"
    if isinstance(value, list | tuple):
        kinds = sorted({type(part).__name__ for part in value}) or ["nothing"]
        return f"a {type(value).__name__} of {', '.join(kinds)}"
    return f"a {type(value).__name__}"
