"""How much an error matters: by its direction in a sublayer's output, and by the token where it happens."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shrinkformer.architectures import layer_views
from shrinkformer.prune.fisher import TOKENS, pass_gradients, require_finite_gradients, square
from shrinkformer.prune.objective import Objective
from shrinkformer.prune.samples import spread
from shrinkformer.prune.statistics import Batches
from shrinkformer.prune.stream import count_tokens, token_rows
from shrinkformer.utils.inputs import token_mask
from shrinkformer.utils.parallel import ALONE, Workers

ATTENTION, FEED_FORWARD = "attention", "feed_forward"

_FLOOR = 0.1  # of the mean sensitivity; no direction is without effect, few examples do not show all of them
_TOKEN_FLOOR = 0.3
_EFFECTIVE = 0.1  # of the tokens; squared gradients of classifiers leave 0.01, those of sentence embeddings 0.2 to 0.6
_TOKENS = 65_536  # tokens with weights of their own; where there are more, all count the same

Sublayer = tuple[int, str]


@dataclass
class Sensitivity:
    """What errors do to a model's predictions.

    Attributes:
        metrics: For the output of each sublayer, ``(hidden size, hidden size)`` float64 with a mean diagonal of one: an
            error ``e`` costs about ``e' M e``.
        tokens: For each sublayer and micro-batch of this worker, how much each token counts, ``(tokens,)`` float32 with
            a mean of about one. Empty where there are too many tokens.
    """

    metrics: dict[Sublayer, Tensor] = field(default_factory=dict)
    tokens: dict[Sublayer, list[Tensor]] = field(default_factory=dict)

    def token_weights(self, sublayer: Sublayer, index: int, rows: Tensor) -> Tensor:
        """Weights of the tokens of a micro-batch, one for each of the rows."""
        if sublayer in self.tokens:
            return self.tokens[sublayer][index]
        return rows.new_ones(len(rows))

    def split(self, batches: Batches) -> "Sensitivity":
        """The same for the same examples in other micro-batches, of one worker."""
        sizes = [int(batch["attention_mask"].sum()) for batch in batches]
        tokens = {name: list(torch.split(torch.cat(weights), sizes)) for name, weights in self.tokens.items()}
        return Sensitivity(self.metrics, tokens)


def learn_sensitivity(
    model: PreTrainedModel, batches: Batches, *, objective: Objective, seed: int = 0, workers: Workers = ALONE
) -> Sensitivity:
    """Learn from one backward pass, without labels, how much errors in the outputs of sublayers matter.

    Tokens count by their squared gradients where these are spread over enough tokens, as those of an embedding that is
    a mean of tokens are. Elsewhere, as in classifiers, a few tokens hold nearly all of the sum and a regression on
    those is worth little, so tokens count by the root. How many tokens weights amount to: Kish, "Survey Sampling",
    section 8.2.

    Args:
        model: In evaluation mode, in memory as a whole.
        batches: Examples of all workers.
        objective: What the model predicts.
        seed: Of the drawn answers.
        workers: Share the examples; all of them get the same metrics.

    Raises:
        NumericalError: There is NaN or infinity among the gradients.
    """
    views = layer_views(model)
    layers = {(view.index, ATTENTION): view.attention_output.module for view in views}
    layers |= {(view.index, FEED_FORWARD): view.feed_forward_output.module for view in views}
    weighed = count_tokens(batches) <= _TOKENS
    share = workers.share(batches if weighed else spread(batches, TOKENS))
    masks = [token_mask(batch) for batch in share]
    sums: dict[Sublayer, Tensor] = {}
    norms: dict[Sublayer, list[Tensor]] = {name: [] for name in layers}

    def receive(name: Sublayer, gradients: Tensor) -> None:
        mask = masks[len(norms[name])].to(gradients.device)
        rows = token_rows(gradients.detach(), mask).float()
        norms[name].append(rows.square().sum(1))
        sums[name] = sums[name] + square(rows) if name in sums else square(rows)

    pass_gradients(model, layers, share, receive, objective=objective, seed=seed)
    found = Sensitivity()
    for name in layers:
        workers.sum_(sums[name])
        require_finite_gradients(sums[name], f"{name[1]} of layer {name[0]}", model.dtype)
        found.metrics[name] = _shrunk(sums[name].double())
        if weighed:
            found.tokens[name] = _weights(norms[name], workers)
    return found


def _shrunk(metric: Tensor) -> Tensor:
    """A metric with a mean diagonal of one, and with some weight on every direction."""
    scale = metric.diagonal().mean()
    identity = torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    return (metric / scale + _FLOOR * identity) / (1 + _FLOOR) if scale > 0 else identity


def _weights(norms: list[Tensor], workers: Workers) -> list[Tensor]:
    tokens = norms[0].new_tensor(sum(map(len, norms)), dtype=torch.float64)
    total = torch.stack([_sum(norms).double(), _sum([part.double().square() for part in norms]), tokens])
    workers.sum_(total)
    gradient, square_of_it, count = total.tolist()
    if not gradient > 0:
        return [torch.ones_like(part) for part in norms]
    mean, effective = gradient / count, gradient**2 / (square_of_it * count)
    weights = [((part / mean).sqrt() + _TOKEN_FLOOR) / (1 + _TOKEN_FLOOR) for part in norms]
    return [part.square() for part in weights] if effective >= _EFFECTIVE else weights


def _sum(parts: list[Tensor]) -> Tensor:
    """Of all entries of some tensors."""
    return torch.stack([part.sum() for part in parts]).sum()
