"""Open checkpoints of others: configuration, headers and shapes are checked against each other before a weight is read.

Every command and :func:`shrinkformer.load` come through here.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from shrinkformer.architectures import find_architecture
from shrinkformer.errors import CheckpointError
from shrinkformer.prune import pruned_modeling
from shrinkformer.prune.corrected import correct_class, correct_dtype, correct_heads, correct_tying
from shrinkformer.prune.sentence_encoder import MODULES, module_folders
from shrinkformer.prune.tensors import AGAIN, require_all, require_used, stored_names, wholes_of
from shrinkformer.trust.configs import CONFIG, read_config, require_section
from shrinkformer.trust.entries import require_known_entries
from shrinkformer.trust.folders import ADAPTER, adapter_in, require_own_files
from shrinkformer.trust.foreign import foreign_errors, shortened
from shrinkformer.trust.json_files import read_object
from shrinkformer.trust.weights import (
    WEIGHT_FILES,
    StoredTensor,
    block_of,
    read_weight_headers,
    weight_map,
)


def open_config(location: str | Path) -> PreTrainedConfig:
    """The configuration of a checkpoint, after everything that can be known without its weights was checked.

    Where it and the files differ in the type of weights, in a head that is tied or not, or in heads that an old version
    of transformers took away, or where it names no class, the files are believed.

    Args:
        location: A folder, or a name on the hub, of which no more than the configuration is fetched.

    Raises:
        CheckpointError: A file is damaged or leads elsewhere, or configuration and weights do not fit each other.
        UnsupportedModelError: No architecture record fits.
        OSError: There is no such model on the hub.
    """
    folder = Path(location)
    local = folder.is_dir()
    if local:
        require_own_files(folder)
    else:
        folder = Path(cached_file(str(location), CONFIG)).parent
    raw = read_config(folder)
    record = find_architecture(raw["model_type"])  # others may need code of their own, which is never run
    require_known_entries(raw, CONFIG_MAPPING[record.model_type], folder / CONFIG)
    with foreign_errors(CheckpointError, f"{folder / CONFIG} is no configuration of transformers", AGAIN):
        config: PreTrainedConfig = AutoConfig.from_pretrained(location, trust_remote_code=False)
    require_section(raw, record.to_dict(), int(config.num_hidden_layers), folder / CONFIG)
    correct_heads(config, raw, record, folder / CONFIG)
    if local:
        require_weights(folder, config)
        _require_side_files(folder)
    return config


def _require_side_files(folder: Path) -> None:
    """Check what is copied into new checkpoints, hours before it is."""
    if (folder / MODULES).is_file():
        module_folders(folder)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        read_object(folder / GENERATION_CONFIG_NAME)
        remedy = "correct it, or remove the file."
        with foreign_errors(CheckpointError, f"{folder / GENERATION_CONFIG_NAME} cannot be read", remedy):
            GenerationConfig.from_pretrained(folder).validate()


def require_weights(folder: Path, config: PreTrainedConfig) -> None:
    """Check that weight files are sound and hold what a configuration says, from their headers.

    Args:
        folder: With the files; a folder without any, such as one with an ONNX file, passes.
        config: Of the model; corrected in place where it may be, see :func:`open_config`.

    Raises:
        CheckpointError: They do not, or no model can be built from the configuration.
    """
    headers = read_weight_headers(folder)
    require_blocks(headers, config, folder)
    correct_dtype(config, headers, folder)
    correct_class(config, headers, find_architecture(config.model_type), folder / CONFIG)
    model = shapes_of(config, folder)
    if getattr(config, "quantization_config", None) is not None:  # shapes are checked when integers are unpacked
        wholes = {name: wholes_of(name) for name in headers}
        placed = set(stored_names(model, {name for some in wholes.values() for name in some}).values())
        require_used(model, [name for name, some in wholes.items() if not placed & some], f"{folder}: ")
        return
    known, stored = model.state_dict(), stored_names(model, headers)
    for name, key in stored.items():
        if known[name].is_floating_point() and not headers[key].is_number:
            raise CheckpointError(
                f"{folder}: {shortened(key)} is of type {headers[key].dtype}, which packs a weight; {CONFIG} has no "
                "quantization_config that says how. Use the float checkpoint it was made from."
            )
        wanted, found = tuple(known[name].shape), headers[key].shape
        if wanted != found:
            raise CheckpointError(f"{folder}: {shortened(key)} is {found} in the file, {wanted} by {CONFIG}; {AGAIN}")
    require_used(model, headers.keys() - stored.values(), f"{folder}: ")
    correct_tying(config, model, stored, folder)


def require_blocks(headers: Mapping[str, StoredTensor], config: PreTrainedConfig, folder: Path) -> None:
    """Check that files hold the blocks that a configuration says, neither fewer nor more.

    Raises:
        CheckpointError: They do not.
    """
    path, blocks = find_architecture(config.model_type).layers, int(config.num_hidden_layers)
    found = {index for name in headers if (index := block_of(name, path)) is not None}
    if headers and found != set(range(blocks)):
        raise CheckpointError(
            f"{folder}: {CONFIG} says {blocks} blocks, the weight files hold {len(found)}; these are two models."
        )


def shapes_of(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """The model of a configuration without weights, from classes of transformers and of this package only.

    Raises:
        CheckpointError: The configuration describes no model.
    """
    sized = bool(getattr(config, "shrinkformer", None)) and bool(getattr(config, "per_layer_config", None))
    name = (config.architectures or [""])[0]
    own = copy.deepcopy(config)
    own._attn_implementation = "eager"  # another one might be looked for, even on the hub
    chosen = getattr(pruned_modeling if sized else transformers, name, None)
    if sized and chosen is None:
        raise CheckpointError(f"{folder}: {CONFIG} names {shortened(repr(name))}, which is no model of transformers.")
    where = f"{folder / CONFIG} describes no {shortened(name) or config.model_type}"
    remedy = f"transformers {transformers.__version__} takes no such value: correct the entry, or {AGAIN}"
    with foreign_errors(CheckpointError, where, remedy), torch.device("meta"):
        if isinstance(chosen, type) and issubclass(chosen, PreTrainedModel):
            made: PreTrainedModel = chosen(own)
        else:
            made = AutoModel.from_config(own, trust_remote_code=False)
    return made


def fetch_weights(location: str, config: PreTrainedConfig) -> None:
    """Bring the weights of a model on the hub here, and check them as those of a folder.

    Raises:
        CheckpointError: They are damaged, or do not fit the configuration.
    """
    if Path(location).is_dir():
        return  # checked when it was opened
    quietly = {
        f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")
    }
    if cached_file(location, ADAPTER, **quietly) is not None:
        raise CheckpointError(adapter_in(location))
    for name in WEIGHT_FILES:
        found = cached_file(location, name, _raise_exceptions_for_missing_entries=False)
        if found is None:
            continue
        if name.endswith(".json"):
            for shard in sorted(set(weight_map(Path(found), present=False).values())):
                cached_file(location, shard)
        require_weights(Path(found).parent, config)
        return


def load_pretrained(chosen: Any, location: str | Path | None, **kwargs: Any) -> PreTrainedModel:
    """What ``from_pretrained`` of a class returns, unless it made up a weight or let one fall.

    Args:
        chosen: The class.
        location: A folder or name that :func:`open_config` has checked; None with ``state_dict``.
        **kwargs: Passed on.

    Raises:
        CheckpointError: The weights cannot be read, some are missing, or the model has no place for some.
    """
    where = "" if location is None else f"{location}: "
    with foreign_errors(CheckpointError, f"{where}the weights cannot be read", AGAIN):
        model, found = chosen.from_pretrained(location, output_loading_info=True, **kwargs)
    require_all(model, found["missing_keys"], where)
    require_used(model, found["unexpected_keys"], where)
    loaded: PreTrainedModel = model
    pruned_modeling.align(loaded)  # dense and smaller models are compared, in bits and in time
    return loaded
