"""Save a pruned model so that others can load it, and load it again.

The folder is an ordinary Hugging Face folder. Sizes per block stand in ``config.json`` in transformers' own
``per_layer_config``; the classes that read them travel in the folder (``pruned_modeling.py``, named in ``auto_map``),
because the stock classes of transformers do not yet. Where all blocks are alike, and the ordinary fields of the
configuration can say what they are, the folder is that of a stock model, with no code and no section of ours.
"""

import copy
import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from shrinkformer.architectures import find_architecture, layer_views
from shrinkformer.architectures.wrapped import unwrap
from shrinkformer.efficiency.macs import LayerSize
from shrinkformer.errors import CheckpointError
from shrinkformer.prune import pruned_modeling
from shrinkformer.prune.budget import layer_sizes
from shrinkformer.prune.health import require_finite_weights
from shrinkformer.prune.opening import load_pretrained, open_config
from shrinkformer.prune.plan import Plan
from shrinkformer.prune.side_files import add_side_files, save_wrapper
from shrinkformer.prune.stock import is_stock, stock_values
from shrinkformer.prune.surgery import kept_sizes
from shrinkformer.utils.files import new_folder

FORMAT = 1
PLAN_FILE = pruned_modeling.PLAN_FILE


def save(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: str | None = None,
    extras_from: str | os.PathLike[str] | None = None,
    sentence_encoder: bool = False,
) -> Path:
    """Write a pruned model as a Hugging Face folder; all of it appears, or nothing.

    Args:
        model: The model, or what holds it (:func:`~shrinkformer.architectures.wrapped.unwrap`); it is also what any
            reader of the folder gets, to the last bit. Of a ``SentenceTransformer`` or ``CrossEncoder`` all modules.
        directory: Where to; replaced when it is an earlier checkpoint of this package.
        plan: What was kept and why, for the record.
        tokenizer: Saved beside the model; by default the one that a wrapper brings.
        card: Text of the model card, README.md; without it there is none, or what sentence-transformers writes.
        extras_from: Folder of the dense model; what is not written anew is copied: what sentence-transformers needs
            (pooling), processors, other files of the tokenizer, the license.
        sentence_encoder: Write that for mean pooling where the dense model has nothing of the kind.

    Raises:
        CheckpointError: The folder exists and holds something else.
        InputError: There is no model, its adapters are not merged, or it was pruned within another sentence encoder
            than the files say that go with it.
        NumericalError: A weight is NaN or infinite.
    """
    inside = unwrap(model)
    inner, tokenizer = inside.model, tokenizer or inside.tokenizer
    require_finite_weights(inner, when=" of the model to be saved")
    describe_sizes(inner, plan)
    with replacing(Path(directory)) as folder:
        save_wrapper(inside, folder)
        inner.save_pretrained(folder)
        complete(folder, inner.config, type(inner), plan=plan, card=card)
        add_side_files(folder, inner, source=extras_from, tokenizer=tokenizer, sentence_encoder=sentence_encoder)
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
    config: PreTrainedConfig,
    kind: type[PreTrainedModel],
    *,
    plan: Plan | None,
    card: str | None,
) -> None:
    """Add to weights what makes a folder load anywhere: configuration and classes, plan, model card.

    A configuration without our section is that of a stock model, which needs no classes; another brings them along.
    """
    own = copy.deepcopy(config)
    own.architectures = [stock_class(kind).__name__]  # classes of users are not there for others
    if is_stock(own):  # save_pretrained copies the code of classes that came from a folder with code
        own.__dict__.pop("auto_map", None)
        (folder / Path(pruned_modeling.__file__).name).unlink(missing_ok=True)
    own.save_pretrained(folder)
    if plan is not None:
        (folder / PLAN_FILE).write_text(plan.to_json())
    elif not (folder / PLAN_FILE).exists():
        (folder / PLAN_FILE).write_text("{}")
    if card is not None:
        (folder / "README.md").write_text(card)


def describe_sizes(model: PreTrainedModel, plan: Plan | None = None) -> None:
    """Write the real size of every block, and where it came from, into ``model.config``.

    The model, and every stock model around it that shares the configuration, then saves itself whole by any tool.
    """
    views = layer_views(model)
    describe(model.config, layer_sizes(views), plan)
    pruned_modeling.adopt(model)


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
        for name in ("shrinkformer", "auto_map", "plan_text"):  # of the folder that the model came from
            config.__dict__.pop(name, None)
        config.update(values)
        pruned_modeling.adopt_config(config)
        return
    keys = (architecture.heads_key, architecture.neurons_key)
    config.per_layer_config = {
        index: {key: size for key, size in zip(keys, (layer.heads, layer.neurons), strict=True) if key}
        for index, layer in enumerate(sizes)
    }
    section: dict[str, Any] = dict(getattr(config, "shrinkformer", None) or {})
    layers = [kept_sizes(layer) for layer in sizes]
    if section.get("layers") != layers:  # what is known of another plan does not hold
        section.pop("plan", None)
        config.plan_text = None
    section |= {
        "format": FORMAT,
        "architecture": architecture.to_dict(),
        "head_size": max(layer.head_size for layer in sizes),
        "layers": layers,
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
        config.plan_text = plan.to_json()
    config.shrinkformer = section
    pruned_modeling.adopt_config(config)


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
