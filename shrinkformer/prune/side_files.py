"""What stands beside weights and configuration, and goes with them wherever a model goes.

One function, for every way out: pruned, quantized, streamed, exported. Files that are made of what is in memory (how to
generate, the tokenizer) are written; all others are copied from the folder that the model came from.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from shrinkformer.prune.objective import is_headless
from shrinkformer.prune.sentence_encoder import SIDE_PATTERNS as SENTENCE_ENCODER
from shrinkformer.prune.sentence_encoder import copy_side_files, write_side_files
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

SIDE_PATTERNS = (*SENTENCE_ENCODER, *_COPIED)
"""All that is copied, as it is called on the hub."""


def add_side_files(
    folder: Path,
    model: PreTrainedModel,
    *,
    source: Path | None,
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
    """
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
    copied = source is not None and copy_side_files(source, folder)
    if not copied and is_headless(model):
        own = _own_folder(model, on_hub=sentence_encoder)
        copied = own is not None and copy_side_files(own, folder)
    if sentence_encoder and not copied:
        write_side_files(folder, model.config, tokenizer)


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
