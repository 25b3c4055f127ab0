"""Whatever people hold examples in, as the batches that everything here computes with: one reader for every door."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shrinkformer.architectures.heads import chooses
from shrinkformer.architectures.limits import has_position_table, max_positions
from shrinkformer.dataset.given import INPUTS, WAYS, Piece, Text, Values, Words, dimensions, pieces_of, shape_of
from shrinkformer.errors import InputError, warn
from shrinkformer.utils.inputs import require_padding_id

Batch = Mapping[str, Tensor]

ROWS = 32

LONGEST_TEXT = 512
"""Tokens that are taken of a text at most."""


def as_batches(
    data: Any, model: PreTrainedModel, *, tokenizer: Any = None, most: int | None = None, rows: int = ROWS
) -> Sequence[Batch]:
    """Batches of model inputs from anything that holds examples.

    Args:
        data: Token ids: a DataLoader, list, generator or other iterable of batches or of single examples, each a dict,
            ``BatchEncoding``, tuple (ids, mask, token types) or array; a single dict, tensor or DataFrame of all of
            them; a ``datasets.Dataset``. Or texts, pairs of texts, or lists of words (a column ``tokens`` or ``words``,
            or lists of which not all have two) in any of these. Padded or not, with a mask or not; labels and other
            columns are not looked at.
        model: That they are for. One that answers by choosing takes examples of several choices each.
        tokenizer: For texts.
        most: Examples to take at most, the first ones.
        rows: Examples of a batch, where what was given has none.

    Returns:
        Int64 tensors by name, ``attention_mask`` among them: ``(examples, length)`` or ``(examples, choices, length)``.
        Batches that have this form already are handed back as they are.

    Raises:
        InputError: There are none, or the model cannot take them; it says what was found and what to pass.

    Warns:
        ShrinkformerWarning: There is padding and no mask, examples without tokens, token types that the model does not
            know, or texts that were cut.
    """
    if most is None and _are_ready(data, model):
        return data  # type: ignore[no-any-return]
    reader = _Reader(model, tokenizer, most, rows)
    for piece in pieces_of(data, _pad_id(model)):
        reader.take(piece)
        if reader.full:
            break
    batches = reader.batches()
    if not batches:
        raise InputError("the calibration data is empty; give a few hundred examples, without labels")
    _require_fit(batches, model)
    return batches


def _pad_id(model: PreTrainedModel) -> int | None:
    number = getattr(model.config, "pad_token_id", None)
    return number if isinstance(number, int) else None


def _are_ready(data: Any, model: PreTrainedModel) -> bool:
    """Whether something is what :func:`as_batches` returns."""
    ndim = 2 + chooses(model)
    ready = isinstance(data, list | tuple) and bool(data) and all(_is_ready(batch, ndim) for batch in data)
    if ready:
        _require_fit(data, model)
    return ready


def _is_ready(batch: Any, ndim: int) -> bool:
    if type(batch) is not dict or not {"input_ids", "attention_mask"} <= set(batch) <= set(INPUTS):
        return False
    mask = batch["attention_mask"]
    alike = all(
        isinstance(value, Tensor) and value.dtype == torch.int64 and value.shape == batch["input_ids"].shape
        for value in batch.values()
    )
    return alike and mask.ndim == ndim and bool(mask.any(-1).all()) and bool(mask[..., -1].any() or mask[..., 0].any())


class _Reader:
    """Gathers pieces: batches stay batches, single examples are joined to some."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, most: int | None, rows: int) -> None:
        self._model, self._tokenizer, self._most, self._rows = model, tokenizer, most, rows
        self._ndim = 1 + chooses(model)  # of an example
        self._batches = list[dict[str, Tensor]]()
        self._examples = list[dict[str, Values]]()
        self._texts = list[Text]()
        self._taken = 0
        self._unmasked = self._without_tokens = 0

    @property
    def full(self) -> bool:
        """Whether there are as many examples as wanted."""
        return self._most is not None and self._taken >= self._most

    def take(self, piece: Piece) -> None:
        """Take what is still wanted of a piece."""
        left = None if self._most is None else self._most - self._taken
        if piece.texts:
            self._texts += piece.texts[:left]
            self._taken += len(piece.texts[:left])
            return
        found, columns = piece.ndim, _aligned(piece.columns)
        if found == self._ndim and not piece.several:
            self._examples.append(columns)
            self._taken += 1
        elif found == self._ndim + 1 and isinstance(columns["input_ids"], Tensor):
            whole = {name: torch.as_tensor(value)[:left] for name, value in columns.items()}
            self._take_batch(whole)
        elif found == self._ndim + 1:
            rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            self._examples += rows[:left]
            self._taken += len(rows[:left])
        else:
            raise InputError(self._wrong_form(found))

    def _wrong_form(self, found: int) -> str:
        kind = type(self._model).__name__
        wanted = "(examples, choices, length)" if self._ndim == 2 else "(examples, length)"
        return f"input_ids have {found} dimensions, and {kind} takes {wanted}; {WAYS}."

    def _take_batch(self, batch: dict[str, Tensor]) -> None:
        self._taken += len(batch["input_ids"])
        if "attention_mask" not in batch:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            self._unmasked += _seem_padded(batch["input_ids"], _pad_id(self._model))
        has_tokens = batch["attention_mask"].flatten(1).any(1)
        self._without_tokens += int((~has_tokens).sum())
        columns = batch["attention_mask"].flatten(0, -2).any(0).nonzero()
        length = int(columns.max()) + 1 if len(columns) else 0
        kept = {name: value[has_tokens][..., :length] for name, value in batch.items()}
        parts = {name: torch.split(value, self._rows) for name, value in kept.items()}
        if len(kept["input_ids"]):
            self._batches += [dict(zip(parts, rows, strict=True)) for rows in zip(*parts.values(), strict=True)]

    def batches(self) -> list[dict[str, Tensor]]:
        """Everything that was taken."""
        if self._texts:
            self._examples += self._tokenized()
        full = [example for example in self._examples if _length(example) > 0]
        self._without_tokens += len(self._examples) - len(full)
        full.sort(key=lambda example: -_length(example))  # little is padded then, and memory peaks at once
        pad = _pad_id(self._model) or 0
        for start in range(0, len(full), self._rows):
            self._batches.append(_padded(full[start : start + self._rows], pad))
        self._warn()
        return [_known_types(batch, self._model) for batch in self._batches]

    def _warn(self) -> None:
        if self._unmasked:
            warn(
                f"{self._unmasked} of {self._taken} calibration examples have no attention_mask and end or begin with "
                f"padding (id {_pad_id(self._model)}), which counts as tokens; pass attention_mask beside input_ids"
            )
        if self._without_tokens:
            warn(f"{self._without_tokens} of {self._taken} calibration examples have no tokens; they are left out")

    def _tokenized(self) -> list[dict[str, Values]]:
        """The texts as single examples."""
        if self._tokenizer is None:
            raise InputError("the calibration data holds texts; pass tokenizer= beside it.")
        if self._batches or self._examples:
            raise InputError("the calibration data holds texts and token ids; pass one or the other.")
        choices = [list(text) if isinstance(text, list | tuple) else [text] for text in self._texts]
        several = self._ndim == 2
        rows: list[Any] = [one for each in choices for one in each] if several else list(self._texts)
        encoded = _encode(rows, self._tokenizer, self._model)
        if not several:
            return list(encoded)
        grouped, start = [], 0
        for each in choices:
            some = encoded[start : start + len(each)]
            start += len(each)
            grouped.append({name: [torch.as_tensor(one[name]) for one in some] for name in some[0]})
        return [dict(example) for example in grouped]


def _aligned(columns: dict[str, Values]) -> dict[str, Values]:
    """The same, all of one shape; a mask of tokens against tokens, and the like, is none."""
    ids = columns["input_ids"]
    for name, value in columns.items():
        if dimensions(value) != dimensions(ids) or shape_of(value) != shape_of(ids):
            raise InputError(
                f"{name} and input_ids of an example differ in form ({shape_of(value)} and {shape_of(ids)}); give both "
                "one number for each token."
            )
    return columns


def _seem_padded(ids: Tensor, pad_id: int | None) -> int:
    """How many rows begin or end with two tokens of padding; one alone may be the end of a text."""
    if pad_id is None or ids.shape[-1] < 2:
        return 0
    padding = (ids == pad_id).flatten(1, -2) if ids.ndim > 2 else ids == pad_id
    ends = padding[..., :2].all(-1) | padding[..., -2:].all(-1)
    return int(ends.flatten(1).any(1).sum()) if ends.ndim > 1 else int(ends.sum())


def _length(example: Mapping[str, Values]) -> int:
    """Tokens of an example, of its longest choice where it has several."""
    ids = example["input_ids"]
    return ids.shape[-1] if isinstance(ids, Tensor) else max(len(part) for part in ids)


def _padded(examples: Sequence[Mapping[str, Values]], pad: int) -> dict[str, Tensor]:
    """One batch, padded on the right: positions count from the first token."""
    length = max(map(_length, examples))
    fill = {"input_ids": pad}
    names = [name for name in INPUTS if all(name in example for example in examples)]
    if "attention_mask" not in names:
        names.append("attention_mask")
    batch = {}
    for name in names:
        rows = [_row(example, name, length, fill.get(name, 0)) for example in examples]
        if len({row.shape for row in rows}) > 1:
            raise InputError("the examples have different numbers of choices; give all of them as many.")
        batch[name] = torch.stack(rows)
    return batch


def _row(example: Mapping[str, Values], name: str, length: int, fill: int) -> Tensor:
    ids = example["input_ids"]
    value = example.get(name)
    if value is None:  # a mask
        value = torch.ones_like(ids) if isinstance(ids, Tensor) else [torch.ones_like(part) for part in ids]
    if isinstance(value, Tensor):
        return torch.nn.functional.pad(value, (0, length - value.shape[-1]), value=fill)
    return torch.stack([torch.nn.functional.pad(part, (0, length - len(part)), value=fill) for part in value])


def _encode(texts: Sequence[Any], tokenizer: Any, model: PreTrainedModel) -> list[dict[str, Values]]:
    """Texts, pairs of texts and lists of words, cut where the model, the tokenizer or :data:`LONGEST_TEXT` ends."""
    limit = min(LONGEST_TEXT, int(tokenizer.model_max_length), max_positions(model.config))
    columns, split = _columns(texts, tokenizer)
    whole = tokenizer(*columns, padding=False, truncation=False, verbose=False, is_split_into_words=split)
    cut = sum(len(ids) > limit for ids in whole["input_ids"])
    if cut:
        warn(f"{cut} of {len(texts)} texts have more than {limit} tokens, and are cut there")
        whole = tokenizer(*columns, padding=False, truncation=True, max_length=limit, is_split_into_words=split)
    names = [name for name in INPUTS if name in whole]
    return [
        {name: torch.tensor(values, dtype=torch.int64) for name, values in zip(names, row, strict=True)}
        for row in zip(*(whole[name] for name in names), strict=True)
    ]


def _columns(texts: Sequence[Any], tokenizer: Any) -> tuple[list[list[Any]], bool]:
    """What a tokenizer gets: texts, both sides of pairs, or lists of words; and whether it is the last.

    Lists of two texts each are pairs, lists of any other lengths the words of one example each.

    Raises:
        InputError: Some are this and some are that.
    """
    lists = [isinstance(text, list | tuple) for text in texts]
    if all(lists) and all(len(text) == 2 for text in texts):
        return [[str(text[place]) for text in texts] for place in range(2)], False
    if all(lists) and not any(isinstance(text, tuple) and len(text) == 2 for text in texts):
        texts = [Words(tuple(text)) for text in texts]
    split = [isinstance(text, Words) for text in texts]
    if all(split):
        before = "" if getattr(tokenizer, "add_prefix_space", True) else " "  # else words of byte-level ones are glued
        return [[[before * (place > 0) + word for place, word in enumerate(text.words)] for text in texts]], True
    if any(lists) or any(split):
        raise InputError("the calibration data mixes texts, pairs of texts and lists of words; give one kind.")
    return [list(texts)], False


def _known_types(batch: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Without the token types of a tokenizer whose model tells none apart."""
    sizes = getattr(model.config, "type_vocab_size", None)
    if sizes == 1 and "token_type_ids" in batch and bool(batch["token_type_ids"].any()):
        warn("the examples have token types 0 and 1, the model knows one: they are left out")
        return {name: value for name, value in batch.items() if name != "token_type_ids"}
    return batch


def _require_fit(batches: Sequence[Batch], model: PreTrainedModel) -> None:
    """Check that a model has an embedding for everything in its inputs.

    Raises:
        InputError: It has not.
    """
    embeddings: Any = model.get_input_embeddings()
    kinds = getattr(model.config, "type_vocab_size", None) or None
    limits = {"input_ids": embeddings.num_embeddings, "token_type_ids": kinds}
    for name, limit in limits.items():
        found = [batch[name] for batch in batches if name in batch]
        highest, lowest = (max((int(f.max()) for f in found), default=0), min((int(f.min()) for f in found), default=0))
        if limit is not None and (highest >= limit or lowest < 0):
            wrong = highest if highest >= limit else lowest
            raise InputError(
                f"{name} of the calibration data hold {wrong}, and {type(model).__name__} has {limit}; use the "
                "tokenizer that belongs to it."
            )
    longest = max(batch["input_ids"].shape[-1] for batch in batches)
    positions = max_positions(model.config)
    if longest > positions and has_position_table(model.config):
        raise InputError(
            f"the calibration data has {longest} tokens in a row, and {type(model).__name__} takes {positions}; cut "
            "them (truncation=True, max_length=...)."
        )
    if any(len(batch["input_ids"]) > 1 for batch in batches):
        require_padding_id(model)
