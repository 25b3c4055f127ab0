"""How much errors in a layer's outputs matter to what the model predicts: one backward pass, no labels.

An error ``e`` in the output of a layer changes the predicted distribution by about ``e' G e / 2`` (Kullback-Leibler),
where ``G`` is the Fisher information: the second moment of gradients of the log-likelihood of answers that are drawn
from the model's own predictions. Errors in directions that softmax, ReLU or the next layer ignore cost nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shrinkformer.errors import NumericalError
from shrinkformer.prune.objective import Objective
from shrinkformer.prune.samples import spread
from shrinkformer.prune.statistics import Batches
from shrinkformer.utils.inputs import outputs_of, token_mask
from shrinkformer.utils.parallel import ALONE, Workers
from shrinkformer.utils.precision import fast_products, half_precision, is_finite

Name = TypeVar("Name")

TOKENS = 16_384
"""Tokens that are enough: the sums have a few hundred thousand entries, which are shrunk towards their diagonal."""


def output_metrics(
    model: PreTrainedModel,
    layers: Mapping[Name, nn.Module],
    batches: Batches,
    *,
    objective: Objective,
    tokens: int = TOKENS,
    seed: int = 0,
    workers: Workers = ALONE,
) -> dict[Name, Tensor]:
    """Fisher information of the outputs of linear layers.

    Args:
        model: The model, in evaluation mode and in memory as a whole; gradients pass through it, nothing is changed.
        layers: The layers by any name.
        batches: Examples of all workers; as many are used as hold ``tokens`` tokens.
        objective: What the model predicts.
        tokens: See above.
        seed: Of the drawn answers; the global generator stays as it is.
        workers: Share the examples; all of them get the sums.

    Returns:
        ``(outputs, outputs)`` float32 for each layer, of any scale.

    Raises:
        NumericalError: There is NaN or infinity among the gradients.

    Source:
        Martens, "New insights and perspectives on the natural gradient method", arXiv 1412.1193, section 5 (Fisher by
        sampling). For quantization: Tseng et al., YAQA, arXiv 2505.22988.
    """
    sums: dict[Name, Tensor] = {}

    def add(name: Name, gradients: Tensor) -> None:
        sums[name] = sums[name] + square(gradients) if name in sums else square(gradients)

    pass_gradients(model, layers, workers.share(spread(batches, tokens)), add, objective=objective, seed=seed)
    for name in layers:
        workers.sum_(sums[name])
        require_finite_gradients(sums[name], str(name), model.dtype)
    return sums


def require_finite_gradients(second: Tensor, where: str, dtype: torch.dtype) -> None:
    """Check second moments of gradients.

    Args:
        second: The moments.
        where: The layer, for the message.
        dtype: Of the model.

    Raises:
        NumericalError: There is NaN or infinity among them.
    """
    if not is_finite(second):
        kind = str(dtype).removeprefix("torch.")
        raise NumericalError(
            f"gradients at the output of {where} are NaN or infinity: the model overflows in {kind}; run it in float32 "
            "(--dtype float32), or look at the calibration examples."
        )


def pass_gradients(
    model: PreTrainedModel,
    layers: Mapping[Name, nn.Module],
    batches: Batches,
    receive: Callable[[Name, Tensor], None],
    *,
    objective: Objective,
    seed: int = 0,
) -> None:
    """Send gradients of the log-likelihood of drawn answers back through a model.

    Args:
        model: As for :func:`output_metrics`.
        layers: The layers by any name.
        batches: Examples of this worker.
        receive: Gets the name of a layer and the gradients of its output, padding included, for every batch in turn.
        objective: What the model predicts.
        seed: Of the drawn answers; the global generator stays as it is.
    """
    # Rounding of half precision is small beside the noise of drawn answers.
    generator = torch.Generator(model.device).manual_seed(seed)
    embeddings = model.get_input_embeddings()
    with ExitStack() as stack:
        stack.enter_context(_gradients_at(layers, receive))
        stack.enter_context(frozen(model))
        # Heads look at the ids to find the last token, and some models to count positions, so embeddings do not replace
        # them.
        stack.callback(embeddings.register_forward_hook(_with_gradient).remove)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(half_precision(model.device, model.dtype))
        for batch in batches:
            found = log_likelihood(outputs_of(model, batch), batch, generator, objective)
            found.backward()  # type: ignore[no-untyped-call]


def square(gradients: Tensor) -> Tensor:
    """Second moment of gradients, ``(outputs, outputs)``."""
    rows = gradients.reshape(-1, gradients.shape[-1]).float()
    with fast_products(rows.device):
        return rows.T @ rows


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Gradients of weights are not wanted, only those that pass through."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, before in wanted:
            parameter.requires_grad_(before)


@contextmanager
def _gradients_at(layers: Mapping[Name, nn.Module], receive: Callable[[Name, Tensor], None]) -> Iterator[None]:
    """Hand on the gradients of each layer's output whenever some arrive."""

    def hook_for(name: Name) -> Any:
        def hook(_module: nn.Module, _given: Any, gradients: tuple[Tensor, ...]) -> None:
            receive(name, gradients[0])

        return hook

    with ExitStack() as stack:
        for name, module in layers.items():
            stack.callback(module.register_full_backward_hook(hook_for(name)).remove)
        yield


def _with_gradient(_module: nn.Module, _given: Any, embedded: Tensor) -> Tensor:
    """Where gradients end that pass through a model."""
    return embedded.detach().requires_grad_(True)


def log_likelihood(
    output: Any, batch: Mapping[str, Tensor], generator: torch.Generator, objective: Objective
) -> Tensor:
    """Log-likelihood of answers drawn from what a model predicts, summed over them.

    Classes and tokens are drawn from softmax, independent labels from a sigmoid each; numbers and embeddings from a
    normal distribution around them.
    """
    found = objective.predictions(output, token_mask(batch).to(generator.device))
    drawn = [(_drawn if found.distribution else _moved)(part, generator) for part in found.parts]
    return torch.stack(drawn).sum()


def _drawn(logs: Tensor, generator: torch.Generator) -> Tensor:
    """Of classes, from log-probabilities ``(rows, classes)``."""
    with torch.no_grad():
        below = logs.exp().cumsum(-1)  # torch.multinomial is slow
        point = torch.rand(len(logs), 1, generator=generator, device=logs.device) * below[:, -1:]
        answers = torch.searchsorted(below, point).clamp_(max=logs.shape[-1] - 1)
    return logs.gather(1, answers).sum()


def _moved(values: Tensor, generator: torch.Generator) -> Tensor:
    """Of numbers: the gradient of a normal log-density at a point drawn from it is the step away from the mean."""
    steps = torch.randn(values.shape, generator=generator, device=values.device)
    return (values * steps).sum()
