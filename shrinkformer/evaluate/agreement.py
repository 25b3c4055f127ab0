"""How far a model's own answers are from those of the dense one, where nobody has labelled anything."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from shrinkformer.errors import NumericalError
from shrinkformer.evaluate.paired import Scores
from shrinkformer.prune.objective import Objective, Predictions
from shrinkformer.utils.inputs import outputs_of, token_mask
from shrinkformer.utils.modes import evaluation_mode
from shrinkformer.utils.parallel import ALONE, Workers

AGREEMENT, DIVERGENCE, COSINE = "agreement", "divergence", "cosine"

Sums = NDArray[np.float64]
"""Of each example: its number of predictions, the sum of one figure over them."""


def compare(
    dense: PreTrainedModel,
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    objective: Objective,
    *,
    mask_id: int | None = None,
    workers: Workers = ALONE,
) -> Scores:
    """Compare the predictions of two models on the same examples.

    Args:
        dense: The model whose predictions count as right.
        model: The model that is judged; may be the same one.
        batches: Model inputs that neither was calibrated on.
        objective: What they predict.
        mask_id: Only predictions for tokens with this id count.
        workers: Share the batches; all of them get the same figures.

    Returns:
        ``agreement``: the fraction of equal answers (the likeliest class of an example, or of each token, both ends of
        an answer, each of several labels); for embeddings ``cosine``, their mean similarity; for numbers neither.
        ``divergence``: mean Kullback-Leibler divergence per answer, or half a squared distance.

    Raises:
        NumericalError: A model computes NaN or infinity.
    """
    found: list[dict[str, Sums]] = []
    with evaluation_mode(dense, model), torch.no_grad():
        for batch in workers.share(batches):
            mask = token_mask(batch)
            judged = mask if mask_id is None else mask & (batch["input_ids"] == mask_id).flatten(0, -2)
            pair = [objective.predictions(outputs_of(one, batch), judged.to(one.device)) for one in (dense, model)]
            found.append(_figures(pair[0], pair[1], judged, len(batch["attention_mask"])))
    together = workers.gather(found)
    sums = {name: np.concatenate([part[name] for part in together]) for name in together[0]}
    if not all(np.isfinite(one).all() for one in sums.values()):
        raise NumericalError("the model's predictions on the examples that judge it are NaN or infinity.")
    ratios = {name: one[:, 1].sum() / max(1.0, one[:, 0].sum()) for name, one in sums.items()}
    # Of a ratio of sums over examples: the delta method (van der Vaart, chapter 3).
    moved = {name: (one[:, 1] - ratios[name] * one[:, 0]) / max(1.0, one[:, 0].sum()) for name, one in sums.items()}
    return Scores.of(ratios, moved)


def _figures(dense: Predictions, other: Predictions, mask: Tensor, examples: int) -> dict[str, Sums]:
    """Sums over the predictions of each example, by figure."""
    counts = _predictions_of(dense, mask, examples)
    divergence, equal = list[Sums](), list[Sums]()
    for ours, theirs, count in zip(dense.parts, other.parts, counts, strict=True):
        if dense.distribution:
            divergence.append(_by_example((ours.exp() * (ours - theirs)).sum(-1), count))
            equal.append(_by_example((ours.argmax(-1) == theirs.argmax(-1)).double(), count))
        else:
            divergence.append(_by_example((ours - theirs).square().sum(-1) / 2, count))
    found = {DIVERGENCE: _joined(divergence)}
    if dense.distribution:
        same = [len(part) for part in dense.parts] == [examples] * len(dense.parts)
        # An answer has two ends, and is equal when both are.
        found = {AGREEMENT: _both(equal) if same else np.sum(equal, axis=0), **found}
    elif dense.parts[0].shape[-1] > 1:
        cosines = torch.nn.functional.cosine_similarity(dense.parts[0], other.parts[0], dim=-1)
        found = {COSINE: _by_example(cosines, counts[0]), **found}
    return found


def _predictions_of(found: Predictions, mask: Tensor, examples: int) -> list[Tensor]:
    """For each part, the number of rows of each example: of its tokens, or as many for all."""
    by_token = mask.reshape(examples, -1).sum(1)
    counts = []
    for part in found.parts:
        if len(part) == int(by_token.sum()) and len(part) != examples:
            counts.append(by_token)
        else:
            counts.append(torch.full((examples,), len(part) // examples))
    return counts


def _by_example(rows: Tensor, counts: Tensor) -> Sums:
    sums = [part.sum() for part in torch.split(rows.double().cpu(), counts.tolist())]
    return np.stack([counts.double().numpy(), torch.stack(sums).numpy()], axis=1)


def _joined(parts: list[Sums]) -> Sums:
    """Figures of all parts; predictions are counted once, as those of the first part."""
    total = parts[0].copy()
    for part in parts[1:]:
        total[:, 1] += part[:, 1]
    return total


def _both(parts: list[Sums]) -> Sums:
    total = parts[0].copy()
    for part in parts[1:]:
        total[:, 1] *= part[:, 1]
    return total
