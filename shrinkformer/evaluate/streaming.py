"""Perplexity of a model that does not fit into memory."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shrinkformer.architectures import layer_views
from shrinkformer.evaluate.perplexity import Perplexity, accumulate, require_fit
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.stream import BlockStream
from shrinkformer.utils.memory import with_smaller_batches


def stream_perplexity(
    model: PreTrainedModel, windows: Tensor, resources: Resources, *, batch_size: int = 1
) -> Perplexity:
    """Measure perplexity with one block in memory: all windows pass the first block, then the second, and so on.

    Args:
        model: A causal language model whose blocks need not have weights.
        windows: Token ids, ``(windows, length)`` int64; those of all workers.
        resources: Where the weights of the blocks come from and where hidden states go.
        batch_size: Windows per forward pass.

    Returns:
        The same figure as that of ``evaluate_perplexity``, but for rounding.

    Raises:
        InputError: The windows are longer than the model's positions.
        CheckpointError: The model has fewer tokens than its tokenizer.
        NumericalError: The model produced NaN or infinity.
        OutOfMemoryError: There is not enough memory even for one window at a time.

    Warns:
        ShrinkformerWarning: A batch did not fit into memory and was halved.
    """
    require_fit(model, windows)

    def attempt(most: int) -> Perplexity:
        return _stream(model, windows, resources, most)

    # Processes meet only at the very end, so each of them may take its share in batches of its own.
    return with_smaller_batches(attempt, batch_size, what="perplexity")


def _stream(model: PreTrainedModel, windows: Tensor, resources: Resources, batch_size: int) -> Perplexity:
    workers = resources.workers
    share = torch.split(workers.share_rows(windows), batch_size)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in share if len(ids)]
    stream = BlockStream(model, batches, resources.offload)
    for view in layer_views(model):
        with resources.weights.resident(view.index):
            stream.run(view.block)
    pairs = zip((batch["input_ids"].to(model.device) for batch in batches), stream.outputs(), strict=True)
    return accumulate(((ids, output.logits) for ids, output in pairs), workers)
