"""Quantizing in place, tried anew when memory runs out early."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from shrinkformer.architectures import layer_views
from shrinkformer.errors import OutOfMemoryError
from shrinkformer.quantize.config import Quantized
from shrinkformer.utils.memory import REMEDIES, is_out_of_memory


@contextmanager
def repeatable(model: PreTrainedModel, found: Quantized) -> Iterator[None]:
    """When memory runs out before the first block is finished, put back what has changed, so that all can start anew.

    Raises:
        OutOfMemoryError: Memory ran out later: what was there before is gone.
    """
    first = {id(parameter) for parameter in layer_views(model)[0].block.parameters()}
    later = {id(parameter) for view in layer_views(model)[1:] for parameter in view.block.parameters()}
    outside = found.config.also
    changed = [one for one in model.parameters() if id(one) in first or (outside and id(one) not in later)]
    before = [parameter.detach().clone() for parameter in changed]
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if any(report.layer is not None for report in found.layers):
            raise OutOfMemoryError(
                "quantizing: out of memory when some blocks were finished, so the model is partly quantized; load it "
                f"again and {REMEDIES}."
            ) from None
        with torch.no_grad():
            for parameter, value in zip(changed, before, strict=True):
                parameter.copy_(value)
        raise
