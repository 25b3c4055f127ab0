"""Save a pruned model so that others can load it, and load it again.

The folder is an ordinary Hugging Face folder. Sizes per block stand in ``config.json`` in transformers' own
``per_layer_config``; the classes that read them travel in the folder (``pruned_modeling.py``, named in ``auto_map``),
because the stock classes of transformers do not yet. Where all blocks are alike, and the ordinary fields of the
configuration can say what they are, the folder is that of a stock model, with no code and no section of ours.
"""

import importlib.metadata
import inspect
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from shrinkformer.architectures import find_architecture, layer_views
from shrinkformer.efficiency.macs import LayerSize
from shrinkformer.errors import CheckpointError
from shrinkformer.prune import pruned_modeling
from shrinkformer.prune.budget import layer_sizes
from shrinkformer.prune.health import require_finite_weights
from shrinkformer.prune.opening import load_pretrained, open_config
from shrinkformer.prune.plan import Plan
from shrinkformer.prune.side_files import add_side_files
from shrinkformer.prune.stock import is_stock, stock_values
from shrinkformer.prune.surgery import kept_sizes
from shrinkformer.utils.files import new_folder

FORMAT = 1
PLAN_FILE = "shrinkformer_plan.json"

_AUTO_CLASSES = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
}
"""The Auto class of a model with a head, by how the name of its class ends."""


def save(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: str | None = None,
    extras_from: Path | None = None,
    sentence_encoder: bool = False,
) -> Path:
    """Write a pruned model as a Hugging Face folder; all of it appears, or nothing.

    Args:
        model: The model; it is also what any reader of the folder gets, to the last bit.
        directory: Where to; replaced when it is an earlier checkpoint of this package.
        plan: What was kept and why, for the record.
        tokenizer: Saved beside the model.
        card: Text of the model card, README.md.
        extras_from: Folder of the dense model; what is not written anew is copied: what sentence-transformers needs
            (pooling), processors, other files of the tokenizer, the license.
        sentence_encoder: Write that for mean pooling where the dense model has nothing of the kind.

    Raises:
        CheckpointError: The folder exists and holds something else.
        NumericalError: A weight is NaN or infinite.
    """
    require_finite_weights(model, when=" of the model to be saved")
    describe_sizes(model, plan)
    with replacing(Path(directory)) as folder:
        model.save_pretrained(folder)
        complete(folder, type(model), plan=plan, card=card)
        add_side_files(folder, model, source=extras_from, tokenizer=tokenizer, sentence_encoder=sentence_encoder)
    return Path(directory)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new folder beside the target, which takes its place when everything went well, and otherwise disappears.

    Raises:
        CheckpointError: The target exists and is no checkpoint of this package.
    """
    if not may_be_replaced(target):
        raise CheckpointError(f"{target} exists and is not a checkpoint of shrinkformer; choose another --save_dir.")
    with new_folder(target) as folder:
        yield folder


def may_be_replaced(folder: Path) -> bool:
    """Whether a folder is absent, empty, or an earlier checkpoint of this package."""
    return not folder.exists() or not any(folder.iterdir()) or (folder / PLAN_FILE).exists()


def complete(
    folder: Path,
    kind: type[PreTrainedModel],
    *,
    plan: Plan | None,
    card: str | None,
) -> None:
    """Add to weights and configuration what makes a folder load anywhere: classes, plan, model card.

    A configuration without our section is that of a stock model, which needs no classes.
    """
    stock = stock_class(kind)  # a model that came from load() has our class; its config must name the stock one
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text())
    config["architectures"] = [stock.__name__]
    code = Path(inspect.getfile(pruned_modeling))
    if config.get("shrinkformer"):
        config["auto_map"] = _auto_map(stock)
        shutil.copyfile(code, folder / code.name)
    else:  # save_pretrained copies the code of classes that came from a folder with code
        config.pop("auto_map", None)
        (folder / code.name).unlink(missing_ok=True)
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / PLAN_FILE).write_text(plan.to_json() if plan is not None else "{}")
    if card is not None:
        (folder / "README.md").write_text(card)


def describe_sizes(model: PreTrainedModel, plan: Plan | None = None) -> None:
    """Write the real size of every block, and where it came from, into ``model.config``."""
    views = layer_views(model)
    describe(model.config, layer_sizes(views), plan)


def describe(config: PreTrainedConfig, sizes: Sequence[LayerSize], plan: Plan | None) -> None:
    """Write the sizes of all blocks into a configuration, in place.

    Args:
        config: The configuration. Its ordinary fields say it all where blocks are of stock shape. Otherwise
            transformers' own ``per_layer_config`` holds what it can say, the section ``shrinkformer`` all of it.
        sizes: Of each block.
        plan: Where the sizes came from.
    """
    architecture = find_architecture(config.model_type)
    values = stock_values(architecture, sizes, config)
    if values is not None:
        config.per_layer_config = None
        for name in ("shrinkformer", "auto_map"):  # of the folder that the model came from
            if hasattr(config, name):
                delattr(config, name)
        config.update(values)
        return
    keys = (architecture.heads_key, architecture.neurons_key)
    config.per_layer_config = {
        index: {key: size for key, size in zip(keys, (layer.heads, layer.neurons), strict=True) if key}
        for index, layer in enumerate(sizes)
    }
    section: dict[str, Any] = {
        **(getattr(config, "shrinkformer", None) or {}),
        "format": FORMAT,
        "architecture": architecture.to_dict(),
        "head_size": max(layer.head_size for layer in sizes),
        "layers": [kept_sizes(layer) for layer in sizes],
        "versions": {
            "shrinkformer": importlib.metadata.version("shrinkformer"),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }
    if plan is not None:
        section["plan"] = {
            "method": plan.method,
            "mu": plan.mu,
            "seed": plan.seed,
            "sequence_length": plan.sequence_length,
            "dense_macs": plan.dense_macs,
            "macs": plan.macs,
            "heads": [list(layer.heads) for layer in plan.layers],  # which; neurons stand in the plan's own file
        }
    config.shrinkformer = section


def load(directory: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Load a pruned model with the task head it was saved with.

    Args:
        directory: A folder that :func:`save` wrote.
        **kwargs: Passed to ``from_pretrained``: ``dtype``, ``device_map``, ``attn_implementation``, ...

    Raises:
        CheckpointError: The folder is not there or not a checkpoint of this package, or it is damaged.
    """
    path = Path(directory)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json; pass the folder that a pruning run wrote.")
    config = open_config(path)
    if is_stock(config) and not (path / PLAN_FILE).exists():
        raise CheckpointError(f"{path} was not pruned by shrinkformer; load it with transformers' Auto classes.")
    return load_pretrained(written_class(path, config), path, **{"config": config} | kwargs)


def written_class(folder: Path, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that reads a folder: of transformers where that is enough, otherwise ours.

    Raises:
        CheckpointError: There is none.
    """
    name = (config.architectures or ["nothing"])[0]
    try:
        ours: type[PreTrainedModel] = getattr(pruned_modeling, name)
    except AttributeError:
        raise CheckpointError(f"{folder}: config.json names {name!r}, which is no model of transformers.") from None
    return stock_class(ours) if is_stock(config) else ours


def stock_class(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of transformers that a model's class is made from, or is."""
    return next(base for base in kind.__mro__ if base.__module__.startswith("transformers.models."))


def auto_class(architecture: str) -> str:
    """The Auto class that opens a model by the name of its class: ``AutoModel`` where it has no head that we know."""
    return _AUTO_CLASSES.get(_head(architecture), "AutoModel")


def _head(architecture: str) -> str:
    return next((suffix for suffix in _AUTO_CLASSES if architecture.endswith(suffix)), "Model")


def _auto_map(stock: type[PreTrainedModel]) -> dict[str, str]:
    """Which class of the folder each Auto class should use."""
    module = Path(inspect.getfile(pruned_modeling)).stem
    head = _head(stock.__name__)
    family = stock.__name__.removesuffix(head)
    entries = {"AutoModel": f"{module}.{family}Model"}
    if head in _AUTO_CLASSES:
        entries[_AUTO_CLASSES[head]] = f"{module}.{stock.__name__}"
    return entries
