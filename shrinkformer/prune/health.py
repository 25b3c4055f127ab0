"""NaN and infinity, found where they begin: in weights, and in what a model computes on the calibration examples."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shrinkformer.architectures import LayerView, layer_views
from shrinkformer.errors import NumericalError
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.samples import spread
from shrinkformer.prune.statistics import Batches
from shrinkformer.prune.stream import BlockStream
from shrinkformer.utils.inputs import outputs_of, token_mask, token_rows_of
from shrinkformer.utils.memory import Halving
from shrinkformer.utils.parallel import ALONE, Workers
from shrinkformer.utils.precision import first_fault, is_finite

_CHECKED_TOKENS = 65_536
"""Tokens on which the outputs of a smaller model are looked at; where there are more, examples from everywhere."""

_FULL_RANGE = (torch.float32, torch.float64, torch.bfloat16)


def require_finite_weights(model: nn.Module, *, when: str = "", stored: torch.dtype | None = None) -> None:
    """Check the parameters of a model, each read once; those on the meta device, which have no values yet, are not.

    Args:
        model: The model.
        when: What was done before, for the message.
        stored: The type that they have in a file, if they come from one.

    Raises:
        NumericalError: One of them holds NaN or infinity.
    """
    there = ((name, tensor) for name, tensor in model.named_parameters() if not tensor.is_meta)
    require_finite(there, when=when, stored=stored)


def require_finite(tensors: Iterable[tuple[str, Tensor]], *, when: str = "", stored: torch.dtype | None = None) -> None:
    """Check tensors.

    Args:
        tensors: With the names that a message gives them.
        when: What was done before, for the message.
        stored: The type that they have in a file, if they come from one.

    Raises:
        NumericalError: One of them holds NaN or infinity.
    """
    for name, tensor in tensors:
        if is_finite(tensor):
            continue
        place, bad = first_fault(tensor)
        remedy = (
            "use more examples, a larger --mu, or float32"
            if when
            else _cause(tensor[place].item(), tensor.dtype, stored)
        )
        raise NumericalError(
            f"{name}{when}: {tensor[place].item()} at {list(place)}, the first of {bad:,} of {tensor.numel():,} "
            f"weights that are NaN or infinity; {remedy}."
        )


def _cause(value: float, dtype: torch.dtype, stored: torch.dtype | None) -> str:
    """Why a weight that nobody has changed is not finite, and what to do."""
    if math.isnan(value) or dtype in _FULL_RANGE or dtype == stored:
        return "the checkpoint is broken, use another one"
    kind, range_ = str(dtype).removeprefix("torch."), f"whose range ends at {torch.finfo(dtype).max:,.0f}"
    if stored is None:
        return f"they overflow in {kind}, {range_}, or the checkpoint is broken: load it in float32 or bfloat16"
    wide = str(stored).removeprefix("torch.")
    return f"they are stored in {wide} and overflow in {kind}, {range_}: leave {kind} out (--dtype {wide})"


@contextmanager
def faults_located(model: PreTrainedModel, batches: Batches, resources: Resources | None = None) -> Iterator[None]:
    """When something inside finds NaN or infinity, look where in a model they begin, and say so.

    Args:
        model: In evaluation mode; its blocks may be on disk.
        batches: The calibration examples as the user passed them.
        resources: Where weights come from and where data goes.

    Raises:
        NumericalError: The same with the place, where the model itself computes NaN or infinity on the examples.
    """
    try:
        yield
    except NumericalError as error:
        found = locate_fault(model, batches, resources)
        if found is None:
            raise
        raise NumericalError(found) from error


@torch.no_grad()
def locate_fault(model: PreTrainedModel, batches: Batches, resources: Resources | None = None) -> str | None:
    """Where a model's activations are first NaN or infinite: block, layer, example and token; None where they are not.

    Padding is not looked at. Arguments are those of :func:`faults_located`.
    """
    resources = resources or Resources()
    stream = BlockStream(model, batches, resources.offload)
    names = {module: name for name, module in model.named_modules()}
    found = _first_in(stream, batches, stream.hidden, "output of the embeddings")
    for view in layer_views(model):
        if found is not None:
            break
        with resources.weights.resident(view.index):
            for index in range(len(stream)):
                output = stream.call(view.block, index)
                if not _is_finite(output, stream.mask(index)):
                    return _in_block(stream, batches, view, index, names)
                stream.replace(index, output)
    if found is None:
        found = _behind_blocks(stream, batches)
    return None if found is None else found + _remedy(model.dtype)


def require_finite_outputs(model: PreTrainedModel, batches: Batches, workers: Workers = ALONE) -> None:
    """Check what pruning or quantizing has made, before anything is saved: weights, and outputs on the examples.

    Of language models, the outputs are the hidden states that the predictions are made from.

    Args:
        model: In memory, in evaluation mode.
        batches: Calibration examples; of many tokens, some from everywhere.
        workers: Share the examples; each of them checks its own.

    Raises:
        NumericalError: There is NaN or infinity among them.
        OutOfMemoryError: There is not enough memory even for one example at a time.
    """
    require_finite_weights(model, when=" of the smaller model")
    judged: nn.Module = model.base_model if model.can_generate() else model
    some = spread(batches, _CHECKED_TOKENS)

    def outputs(batch: Mapping[str, Tensor]) -> bool:
        given = token_rows_of(batch) if judged is model.base_model else batch
        output, mask = outputs_of(judged, given), token_mask(batch).to(model.device)
        return all(_is_finite(part, mask) for part in _tensors(output))

    in_parts = Halving("check of the smaller model")
    with torch.no_grad():
        for batch in workers.share(some):
            if not all(fine for _, fine in in_parts(outputs, batch)):
                place = locate_fault(model, some) or "NaN or infinity in its outputs on the examples"
                raise NumericalError(f"the smaller model, which was not saved: {place}")


def _tensors(output: Any) -> list[Tensor]:
    """What a model gives, as far as it is numbers."""
    return [part for part in output.to_tuple() if isinstance(part, Tensor) and part.is_floating_point()]


def _rows(tensor: Tensor, mask: Tensor) -> Tensor | None:
    """The rows of tokens, ``(tokens, features)``; None where a tensor has no row for each token."""
    if tensor.shape[:2] == mask.shape:
        return tensor[mask].reshape(int(mask.sum()), -1)
    if tensor.ndim == 2 and len(tensor) == mask.numel():  # OPT flattens examples and positions
        return tensor[mask.flatten()]
    return None


def _is_finite(tensor: Tensor, mask: Tensor) -> bool:
    rows = _rows(tensor, mask)
    return is_finite(tensor if rows is None else rows)


def _first_in(stream: BlockStream, batches: Batches, of: Callable[[int], Tensor], where: str) -> str | None:
    """The first example and token of the batches where something is not finite."""
    for index in range(len(stream)):
        if not _is_finite(of(index), stream.mask(index)):
            return _position(batches, index, of(index), stream.mask(index), where)
    return None


def _in_block(
    stream: BlockStream, batches: Batches, view: LayerView, index: int, names: Mapping[nn.Module, str]
) -> str:
    """The first layer inside a block, in the order in which they compute, that sees or makes something not finite."""
    mask, found = stream.mask(index), list[tuple[Tensor, str]]()

    def look(value: Any, where: str) -> None:
        first = value[0] if isinstance(value, tuple) and value else value
        if not found and isinstance(first, Tensor) and first.is_floating_point() and not _is_finite(first, mask):
            found.append((first, where))

    handles = []
    for path, module in view.block.named_modules():
        name = f"{names[view.block]}.{path}".removesuffix(".")
        handles.append(module.register_forward_pre_hook(lambda _m, args, n=name: look(args, f"input of {n}")))
        handles.append(module.register_forward_hook(lambda _m, _a, output, n=name: look(output, f"output of {n}")))
    try:
        stream.call(view.block, index)
    finally:
        for handle in handles:
            handle.remove()
    values, where = found[0]
    text = _position(batches, index, values, mask, f"{where} (layer {view.index})")
    return text + _remedy(view.attention_output.weight.dtype)


def _behind_blocks(stream: BlockStream, batches: Batches) -> str | None:
    for index, output in enumerate(stream.outputs()):
        for part in _tensors(output):
            if not _is_finite(part, stream.mask(index).to(part.device)):
                return _position(batches, index, part, stream.mask(index), "output of the model, behind its blocks")
    return None


def _position(batches: Batches, index: int, values: Tensor, mask: Tensor, where: str) -> str:
    """In words: what is not finite, and for which example and token."""
    before = sum(len(batch["attention_mask"]) for batch in batches[:index])
    examples = len(batches[index]["attention_mask"])
    rows = examples if values.ndim == 2 and len(values) == examples else len(mask)  # of tokens, one for each choice
    by_example = values.reshape(rows, -1, values.shape[-1]) if values.ndim < 3 else values.flatten(2)
    if by_example.shape[:2] == mask.shape:
        by_example = by_example.masked_fill(~mask[..., None], 0)
    place, bad = first_fault(by_example)
    example, token = place[0], place[1]
    shown = f"example {before + example * examples // len(by_example)}"
    if by_example.shape[:2] == mask.shape:
        shown += f", token {token} (id {int(token_rows_of(batches[index])['input_ids'][example, token])})"
    return (
        f"activations are NaN or infinity: {by_example[place].item()} in the {where}, first for {shown} of the "
        f"calibration examples, counted from 0; {bad:,} of {by_example.numel():,} values of its batch"
    )


def _remedy(dtype: torch.dtype) -> str:
    if dtype in _FULL_RANGE:
        return "; look at that example, or use another checkpoint."
    name = str(dtype).removeprefix("torch.")
    return f"; the model overflows in {name}: run it in float32 (--dtype float32), or look at that example."
