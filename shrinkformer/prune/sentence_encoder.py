"""Files that make a checkpoint a sentence encoder for sentence-transformers.

Source: the layout of sentence-transformers; the names of modules and keys are those of its versions 2 to 6.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from shrinkformer.architectures import find_architecture
from shrinkformer.errors import CheckpointError
from shrinkformer.trust.folders import require_own_files
from shrinkformer.trust.foreign import foreign_errors, shortened
from shrinkformer.trust.json_files import read_json

MODULES = "modules.json"

WEIGHTS, PICKLED = "model.safetensors", "pytorch_model.bin"
"""Of a module, in its folder."""

SIDE_FILES = (MODULES, "sentence_bert_config.json", "config_sentence_transformers.json")

SIDE_PATTERNS = (*SIDE_FILES, *(f"[0-9]*_*/{name}" for name in ("*.json", "*.safetensors", PICKLED)))
"""The same and the folders of modules (pooling, dense layers), as they are called on the hub."""


def copy_side_files(source: Path, folder: Path) -> bool:
    """Copy what sentence-transformers needs beside the model.

    Args:
        source: Folder of the dense model.
        folder: Of the new checkpoint.

    Returns:
        Whether the source is a sentence encoder.

    Raises:
        CheckpointError: Its list of modules is damaged, or names a folder elsewhere.
    """
    if not (source / MODULES).is_file():
        return False
    files = [source / name for name in SIDE_FILES]
    for path in module_folders(source):
        files += [file for suffix in ("json", "safetensors") for file in sorted((source / path).glob(f"*.{suffix}"))]
        _convert_weights(source / path, folder / path)
    for file in files:
        if file.is_file():
            target = folder / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    return True


def _convert_weights(source: Path, folder: Path) -> None:
    """Write the weights of a module that has them as a pickle alone as safetensors."""
    if (source / PICKLED).is_file() and not (source / WEIGHTS).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in module_weights(source).items()}, folder / WEIGHTS)


def module_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a module; of one that has none, none.

    Raises:
        CheckpointError: They cannot be read.
    """
    with foreign_errors(CheckpointError, f"{folder}: the weights cannot be read", "download them again."):
        if (folder / WEIGHTS).is_file():
            return dict(load_file(folder / WEIGHTS))
        if (folder / PICKLED).is_file():
            return dict(torch.load(folder / PICKLED, map_location="cpu", weights_only=True))
    return {}


def module_folders(source: Path) -> list[str]:
    """Folders that ``modules.json`` names; the model itself lies in the source, and is not among them.

    Raises:
        CheckpointError: It is damaged, or names a folder elsewhere.
    """
    require_own_files(source)
    modules = read_json(source / MODULES)
    if not isinstance(modules, list) or not all(_is_module(module) for module in modules):
        raise CheckpointError(f"{source / MODULES} is no list of modules; download the file again, or remove it.")
    paths = [module.get("path") or "" for module in modules]
    for path in paths:
        # A folder "." would put the dense model's weights in the place of the new ones.
        if not isinstance(path, str) or (path and not re.fullmatch(r"[\w-][\w.-]*", path)):
            raise CheckpointError(
                f"{source / MODULES} names {shortened(repr(path))}, which is no folder beside it; do not use it."
            )
    return [path for path in paths if path]


def inner_model(folder: Path) -> str | None:
    """The folder inside of a sentence encoder's that holds its model, where that is not the folder itself.

    Raises:
        CheckpointError: Its list of modules is damaged.
    """
    paths = module_folders(folder) if (folder / MODULES).is_file() else []
    return next((path for path in paths if (folder / path / "config.json").is_file() and "Transformer" in path), None)


def _is_module(module: Any) -> bool:
    """Whether an entry has what sentence-transformers reads of it."""
    return isinstance(module, dict) and type(module.get("idx", 0)) is int and isinstance(module.get("type"), str)


def write_side_files(folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Make a folder a sentence encoder as our evaluation reads it: mean over the tokens, then length 1.

    Args:
        folder: With a plain encoder.
        config: Of the encoder.
        tokenizer: For the longest input.
    """
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    files: dict[str, Any] = {
        MODULES: [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in enumerate(modules)
        ],
        "sentence_bert_config.json": {"max_seq_length": _longest(config, tokenizer), "do_lower_case": False},
        "config_sentence_transformers.json": {
            "__version__": {"transformers": transformers.__version__, "pytorch": torch.__version__},
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": config.hidden_size,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _longest(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Tokens that an encoder takes; some families begin to count positions behind that of padding."""
    reserved = find_architecture(config.model_type).positions_follow_padding
    longest = int(config.max_position_embeddings) - (int(config.pad_token_id or 0) + 1 if reserved else 0)
    return longest if tokenizer is None else min(longest, int(tokenizer.model_max_length))
