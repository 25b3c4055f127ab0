"""What stands beside weights and configuration, and goes with them wherever a model goes.

One function, for every way out: pruned, quantized, streamed, exported. Files that are made of what is in memory (how to
generate, the tokenizer) are written; all others are copied from the folder that the model came from.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from shrinkformer.architectures.wrapped import Inside
from shrinkformer.errors import InputError
from shrinkformer.prune.objective import is_headless
from shrinkformer.prune.pooling import SentenceHead, read_head
from shrinkformer.prune.sentence_encoder import MODULES, copy_side_files, write_side_files
from shrinkformer.prune.sentence_encoder import SIDE_PATTERNS as SENTENCE_ENCODER
from shrinkformer.trust.folders import require_own_files
from shrinkformer.trust.tokenizers import require_tokenizer_files
from shrinkformer.utils.hub import some_files

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)

_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")

_LEGAL = ("LICENSE*", "NOTICE*", "USE_POLICY*")

_COPIED = (*_TOKENIZER, *_PROCESSORS, *_LEGAL)

_HEAD = "sentence_head"
"""Attribute of a model."""

SIDE_PATTERNS = (*SENTENCE_ENCODER, *_COPIED)
"""All that is copied, as it is called on the hub."""


def add_side_files(
    folder: Path,
    model: PreTrainedModel,
    *,
    source: str | os.PathLike[str] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    sentence_encoder: bool = False,
) -> None:
    """Add everything that belongs to a model beside its weights, configuration and card.

    Args:
        folder: Of the new checkpoint; what it holds already stays.
        model: The model; it needs no weights.
        source: Folder that the model came from, if there is one. A model without a head keeps the pooling of the folder
            that it remembers in any case.
        tokenizer: Written; without it, the files of the source are copied.
        sentence_encoder: Write what sentence-transformers needs for mean pooling where the source has nothing of the
            kind.

    Raises:
        CheckpointError: A file of the source is damaged, or leads elsewhere.
        InputError: The model was calibrated within a sentence encoder that makes other embeddings of its outputs.
    """
    source = None if source is None else Path(source)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    if source is not None:
        for file in _files_of(source):
            target = folder / file.relative_to(source)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
    if (folder / MODULES).is_file():
        return
    copied = source is not None and copy_side_files(source, folder)
    if not copied and is_headless(model):
        own = _own_folder(model, on_hub=sentence_encoder)
        copied = own is not None and copy_side_files(own, folder)
    if sentence_encoder and not copied:
        write_side_files(folder, model.config, tokenizer)
    _require_head(folder, model)


def save_wrapper(inside: Inside, folder: Path) -> None:
    """Write what sentence-transformers has around a model, if that is where it is; its weights and classes follow.

    Raises:
        InputError: The model is in none of its first modules, so a folder of ours has no place for it.
    """
    if inside.wrapper is None:
        return
    inside.wrapper.save_pretrained(str(folder))
    if not (folder / "config.json").is_file():
        kind = type(inside.wrapper).__name__
        raise InputError(
            f"the first module of this {kind} is no model of transformers; save it by its save_pretrained."
        )
    for file in folder.glob("model*.safetensors*"):
        file.unlink()


def remember_head(model: PreTrainedModel, head: SentenceHead) -> None:
    """Note in a model what a sentence encoder makes of its outputs, for the files that go with it one day."""
    vars(model)[_HEAD] = head


def _require_head(folder: Path, model: PreTrainedModel) -> None:
    known, written = vars(model).get(_HEAD), read_head(folder) if _HEAD in vars(model) else None
    if known is not None and written is not None and not known.is_like(written):
        raise InputError(
            f"the model was calibrated in a SentenceTransformer with {known}, but the files of the folder that it came "
            f"from say {written}; pass the SentenceTransformer itself: shrinkformer.save(encoder, ...)."
        )


def _own_folder(model: PreTrainedModel, *, on_hub: bool) -> Path | None:
    """Where a model was read from, as far as it remembers that and the files of a sentence encoder can be had."""
    location = str(getattr(model, "name_or_path", ""))
    return some_files(location, SENTENCE_ENCODER) if location and (on_hub or Path(location).is_dir()) else None


def _files_of(source: Path) -> Iterator[Path]:
    require_own_files(source)
    require_tokenizer_files(source)
    for pattern in _COPIED:
        yield from (file for file in sorted(source.glob(pattern)) if file.is_file())


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer without the lengths of its last call."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)


def read_generation_config(folder: Path, model: PreTrainedModel) -> None:
    """Let a model generate as its folder says; ``from_pretrained`` does so only where it reads the weights, too."""
    if model.can_generate() and (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
