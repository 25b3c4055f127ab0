"""Tokenizers of others: the files before they are read, and what came of them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shrinkformer.errors import CheckpointError, InputError
from shrinkformer.trust.foreign import shortened
from shrinkformer.trust.json_files import read_object

_LONGEST = 256 * 2**20
"""Bytes of a vocabulary; those of 250,000 words have 30 million."""

_MOST_WORDS = 2**24

_FILES: Mapping[str, int | None] = {
    "tokenizer_config.json": None,
    "special_tokens_map.json": None,
    "added_tokens.json": None,
    "tokenizer.json": 128,  # the tokenizers library reads no deeper
    "vocab.json": 128,
}
"""JSON files of a tokenizer, and how deep they may be; None for as deep as configurations."""


def require_tokenizer_files(folder: Path) -> None:
    """Check that the JSON files of a tokenizer are objects of a sane size; names on the hub pass.

    Raises:
        CheckpointError: One is not.
    """
    for name, deepest in _FILES.items():
        file = folder / name
        if file.exists():
            if deepest is None:
                read_object(file)
            else:
                _require_numbers(read_object(file, longest=_LONGEST, deepest=deepest), file)


def _require_numbers(content: dict[str, Any], file: Path) -> None:
    """Check the numbers of a vocabulary: the library makes room for all numbers up to the largest."""
    model = content.get("model") if file.name == "tokenizer.json" else {"vocab": content}
    words = model.get("vocab") if isinstance(model, dict) else None
    for word, number in words.items() if isinstance(words, dict) else ():
        if type(number) is not int or not 0 <= number < _MOST_WORDS:
            raise CheckpointError(f"{file}: {shortened(word)} has number {shortened(repr(number))}; it is damaged")


def require_sane(tokenizer: Any) -> None:
    """Check that a tokenizer has a limit of tokens that is a number, and makes tokens at all.

    Raises:
        CheckpointError: It has not, or does not.
    """
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest >= 1:
        raise CheckpointError(f"model_max_length is {longest!r}; it must be a number of tokens, at least 1")
    if not len(tokenizer):
        raise CheckpointError("its vocabulary is empty")
    ids = tokenizer("a b")["input_ids"]
    if not (isinstance(ids, list) and all(isinstance(token, int) and token >= 0 for token in ids)):
        raise CheckpointError("it makes something else than numbers of tokens of a text")


def require_known_tokens(
    features: Iterable[Mapping[str, Sequence[int]]], sizes: Mapping[str, int | None], where: str
) -> None:
    """Check that a model has an embedding for every token of its inputs.

    Args:
        features: Inputs, each a list of numbers by name.
        sizes: Number of embeddings by name of the input; None for any.
        where: The tokenizer, for messages.

    Raises:
        InputError: It has not.
    """
    for feature in features:
        for name, size in sizes.items():
            if size is not None and feature.get(name) and max(feature[name]) >= size:
                raise InputError(
                    f"{where}: its tokenizer makes {name} up to {max(feature[name])}, its config.json has room for "
                    f"{size}; put the tokenizer files of its base model there."
                )
