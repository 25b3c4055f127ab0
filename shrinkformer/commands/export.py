"""``shrinkformer export``: any checkpoint as an ONNX file that was checked in onnxruntime."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shrinkformer.architectures.limits import max_positions
from shrinkformer.commands.card_metadata import side_folder
from shrinkformer.commands.checkpoint_options import INT8_FILE, ONNX_FILE, ExportOptions
from shrinkformer.commands.console import say
from shrinkformer.commands.exporting import describe_onnx, write_onnx
from shrinkformer.commands.locate import (
    Source,
    bundled_decoder,
    bundled_model,
    class_of,
    empty_model,
    find_any,
    generates,
    load_model,
)
from shrinkformer.commands.options import require_writable
from shrinkformer.commands.tokenizers import load_tokenizer, may_have_tokenizer, require_fitting_tokens
from shrinkformer.dataset.encoding import pad
from shrinkformer.dataset.loading import load_split
from shrinkformer.dataset.tasks import get_task
from shrinkformer.errors import InputError
from shrinkformer.export.int8 import Deviation, quantize_dynamic_int8
from shrinkformer.export.onnx_export import TOLERANCE, require_exportable
from shrinkformer.prune.checkpoint import PLAN_FILE, may_be_replaced, replacing
from shrinkformer.prune.side_files import add_side_files
from shrinkformer.quantize.grid import QuantizedWeight
from shrinkformer.quantize.onnx_export import packable
from shrinkformer.quantize.reading import read_quantized_weights

_SENTENCES = 32
"""Bundled sentences that outputs are compared on."""

_LONGEST = 64
"""Tokens of each."""


def export_model(options: ExportOptions) -> None:
    """Everything that ``shrinkformer export`` does."""
    source = find_any(options.model, "MODEL")
    if options.dynamic_int8 and (generates(source.config) or source.quantized):
        what = "quantized already" if source.quantized else "a language model, and 8-bit activations are for encoders"
        raise InputError(f"--dynamic_int8: {source.name} is {what}; leave --dynamic_int8 out.")
    folder = find_target(source, options.output)
    tokenizer = load_tokenizer(source) if may_have_tokenizer(source.location) else None
    require_exportable(empty_model(source, class_of(source)))
    say(f"loading {source.name} from {source.location}")
    model, _ = load_model(source, class_of(source), "cpu", torch.float32)
    weights = integers(source, model) if source.quantized else {}
    example = example_of(source, tokenizer)
    with writable(folder, source, model, tokenizer) as place:
        path = write_onnx(model, place, example, weights=weights)
        found = quantize_dynamic_int8(path, place / INT8_FILE, example) if options.dynamic_int8 else {}
        if (place / PLAN_FILE).is_file():  # the folder is ours, and so is its model card
            describe_onnx(place, model, found)
    size = _megabytes(folder / ONNX_FILE)
    say(f"exported to {folder / ONNX_FILE} ({size}); ONNX Runtime gives equal outputs to {TOLERANCE:g}")
    if options.dynamic_int8:
        tell(folder / INT8_FILE, found, tokenizer)


def find_target(source: Source, output: Path | None) -> Path:
    """The folder that gets the file.

    Raises:
        InputError: It holds another model or something else.
    """
    own = Path(source.location).resolve()
    mine = own.is_dir() and own not in {path.resolve() for path in (bundled_model(), bundled_decoder()) if path}
    folder = (own if mine else Path("output") / "onnx" / source.name) if output is None else output
    flag = f"--output {folder}" if output is not None else f"MODEL {folder}"
    if output is None:
        require_writable("--output", folder)
    if folder.resolve() != own and (not may_be_replaced(folder) or any(folder.glob("*.safetensors"))):
        raise InputError(f"{flag}: it holds something else than an earlier export; choose a new --output folder.")
    return Path(source.location) if output is None and mine else folder


def integers(source: Source, model: PreTrainedModel) -> dict[str, QuantizedWeight]:
    """Those of a model's quantized layers that an ONNX file holds as they are; the others become float32 there."""
    every = read_quantized_weights(Path(source.location), source.config.quantization_config)
    found = packable(model, every)
    say(f"{len(found)} of {len(every)} quantized layers keep their integers (4 or 8 bits, no embeddings)")
    return found


@contextmanager
def writable(folder: Path, source: Source, model: PreTrainedModel, tokenizer: Any) -> Iterator[Path]:
    """Where files are written: the model's own folder, or one that appears with all that a model's folder needs.

    Args:
        folder: The target.
        source: The model.
        model: The same, loaded.
        tokenizer: Its tokenizer, if it has one.
    """
    location = Path(source.location)
    if folder.resolve() == location.resolve():
        yield folder
        return
    with replacing(folder) as place:
        config = copy.deepcopy(source.config)
        if source.quantized:
            del config.quantization_config  # nothing in the file is
        config.save_pretrained(place)
        add_side_files(place, model, source=side_folder(source), tokenizer=tokenizer)
        (place / PLAN_FILE).write_text("{}")
        yield place


def example_of(source: Source, tokenizer: Any) -> dict[str, Tensor]:
    """Inputs that outputs are compared on: bundled sentences, or random tokens for a model without a tokenizer."""
    longest = min(_LONGEST, max_positions(source.config))
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(source.config.vocab_size, (4, longest), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    texts = load_split(get_task("similarity"), "validation", data_dir=None, bundled=True)["sentence1"][:_SENTENCES]
    features = [dict(tokenizer(text, truncation=True, max_length=longest)) for text in texts]
    require_fitting_tokens(source, [features])
    if generates(source.config):
        row = torch.tensor([token for one in features for token in one["input_ids"]])
        ids = row[: len(row) // longest * longest].view(-1, longest)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return pad(features, tokenizer)


def tell(path: Path, found: Mapping[str, Deviation], tokenizer: Any) -> None:
    """Print how far the outputs of 8-bit weights are from the float ones."""
    what = "random tokens" if tokenizer is None else f"{_SENTENCES} bundled sentences"
    say(f"8-bit weights in {path} ({_megabytes(path)}); of the float outputs, on {what}:")
    for name, deviation in found.items():
        say(f"  {name}: cosine {deviation.cosine:.4f}, relative difference {deviation.relative:.3f}")


def _megabytes(path: Path) -> str:
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    return f"{size / 1e6:,.1f} MB"
