"""The norm behind the last block of a pre-norm model, fitted to what the quantized blocks hand on."""

from typing import Any

import torch
from transformers import PreTrainedModel

from shrinkformer.architectures import layer_views
from shrinkformer.prune.stream import BlockStream
from shrinkformer.utils.parallel import Workers


def final_norm(model: PreTrainedModel) -> Any:
    """The norm behind the last block; None where there is none, or none with weights that could be fitted.

    Architecture records say where it would be; configurations may leave it out (OPT-350m, whose blocks end in norms of
    their own) or make it without weights (``layer_norm_elementwise_affine`` of OPT).
    """
    path = layer_views(model)[0].architecture.final_norm
    module: Any = model.base_model
    for name in path.split(".") if path else ():
        module = getattr(module, name, None)  # `get_submodule` refuses what is there, but None
    return module if path and getattr(module, "weight", None) is not None else None


@torch.no_grad()
def refit_final_norm(model: PreTrainedModel, dense: BlockStream, quantized: BlockStream, workers: Workers) -> None:
    """Scale each channel of the final norm so that it gives the dense model's, on average over the examples.

    Errors of the blocks are noise to what comes behind. The best answer to a noisy input is smaller than that to a
    clean one; a model that goes on as before is too sure of itself. In layers that are quantized the corrected target
    does this; behind the last block only the norm can. Its weights (and bias, where it has one) are fitted channel by
    channel, by least squares; nothing is added to the file.

    Args:
        model: The quantized model; its final norm is changed. Nothing happens where there is none with weights.
        dense: At the exit of the last block of the dense model.
        quantized: The same of the quantized model.
        workers: Share the examples.
    """
    norm = final_norm(model)
    if norm is None:
        return
    bias = getattr(norm, "bias", None)
    sums = torch.zeros(5, len(norm.weight), dtype=torch.float64, device=norm.weight.device)
    for index in range(len(dense)):
        wanted, given = (norm(some.hidden(index))[some.mask(index)].double() for some in (dense, quantized))
        if bias is not None:
            wanted, given = wanted - bias, given - bias
        sums += torch.stack(
            [
                torch.full_like(given[0], len(given)),
                given.sum(0),
                wanted.sum(0),
                given.square().sum(0),
                (given * wanted).sum(0),
            ]
        )
    workers.sum_(sums)
    count, given, wanted, square, product = sums
    if bias is None:
        factor = product / square.clamp(min=1e-300)
    else:
        factor = (product - given * wanted / count) / (square - given**2 / count).clamp(min=1e-300)
        bias.add_(((wanted - factor * given) / count).to(bias.dtype))
    norm.weight.mul_(factor.to(norm.weight.dtype))
