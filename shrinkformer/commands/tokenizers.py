"""Read the tokenizer of a checkpoint, and check that the model has an embedding for what it makes."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from shrinkformer.architectures import ENCODERS
from shrinkformer.commands.locate import Source
from shrinkformer.errors import CheckpointError, InputError, warn
from shrinkformer.trust.foreign import foreign_errors
from shrinkformer.trust.tokenizers import require_known_tokens, require_sane, require_tokenizer_files

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
"""Files that hold a vocabulary; a tokenizer has one of them at least."""


def may_have_tokenizer(location: str) -> bool:
    """False for a folder without tokenizer files: transformers would make up a tokenizer without a vocabulary."""
    folder = Path(location)
    return not folder.is_dir() or any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        InputError: The folder has none.

    Warns:
        ShrinkformerWarning: It pads on a side that the model was not made for.
    """
    if not may_have_tokenizer(source.location):
        raise InputError(
            f"--model_name {source.name}: {source.location} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); "
            "put the tokenizer files of its base model there."
        )
    where = f"no tokenizer can be read from {source.location}"
    try:
        with foreign_errors(CheckpointError, where, "put the tokenizer files of its base model there."):
            require_tokenizer_files(Path(source.location))
            tokenizer: Any = AutoTokenizer.from_pretrained(source.location, trust_remote_code=False)
            require_sane(tokenizer)
    except CheckpointError as error:
        raise InputError(f"--model_name {source.name}: {error}") from None
    if tokenizer.padding_side == "left" and _counts_columns(source.config):
        warn(
            f"--model_name {source.name}: its tokenizer pads on the left, but the model counts positions from the first"
            " column; here texts are padded on the right, elsewhere outputs will depend on the texts beside them: "
            'save the tokenizer with padding_side="right"'
        )
    _leave_out_types(source, tokenizer)
    checked: PreTrainedTokenizerBase = tokenizer
    return checked


def _counts_columns(config: PreTrainedConfig) -> bool:
    """Whether an encoder's positions begin with the first column, be it padding or not."""
    record = ENCODERS.get(config.model_type)
    return record is not None and not record.positions_follow_padding


def _leave_out_types(source: Source, tokenizer: Any) -> None:
    """Let a tokenizer make no token types where the model knows one: it would look for the second, and fail.

    Warns:
        ShrinkformerWarning: It made some.
    """
    if getattr(source.config, "type_vocab_size", None) != 1 or "token_type_ids" not in tokenizer.model_input_names:
        return
    if any(tokenizer("a", "b").get("token_type_ids", [])):
        warn(
            f"--model_name {source.name}: its tokenizer tells the texts of a pair apart by token types, its "
            "config.json knows one (type_vocab_size 1); they are left out, in the saved tokenizer, too"
        )
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names


def require_fitting_tokens(source: Source, groups: Iterable[Iterable[Mapping[str, Any]]]) -> None:
    """Check that a model has an embedding for every token of some inputs.

    Raises:
        InputError: It has not.
    """
    for features in groups:
        sizes = {
            "input_ids": int(source.config.vocab_size),
            "token_type_ids": getattr(source.config, "type_vocab_size", None) or None,
        }
        require_known_tokens(features, sizes, f"--model_name {source.name}")
