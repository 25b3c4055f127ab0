"""What stands before and behind the blocks, quantized by choice: embeddings, and the layers of the head."""

from time import perf_counter

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shrinkformer.architectures import layer_views
from shrinkformer.errors import InputError
from shrinkformer.prune.moments import Moments
from shrinkformer.prune.passes import watched
from shrinkformer.prune.sites import EMBEDDINGS, HEAD, POSITIONS
from shrinkformer.prune.statistics import Batches
from shrinkformer.prune.stream import token_rows
from shrinkformer.prune.streamed import tied_weights
from shrinkformer.quantize.config import LayerReport, QuantizeConfig, Quantized
from shrinkformer.quantize.layer import quantize_weight
from shrinkformer.quantize.scales import require_scales
from shrinkformer.quantize.solver import Hessian
from shrinkformer.utils.inputs import outputs_of, token_mask
from shrinkformer.utils.parallel import ALONE, Workers


def require_outside(model: PreTrainedModel, config: QuantizeConfig) -> None:
    """Check, from shapes alone, that a model has what should be quantized outside its blocks.

    Raises:
        InputError: It has not, or one matrix serves as both and only one of them is wanted.
    """
    wanted = {name for kind in config.also for name in outside_layers(model, kind) if config.scheme_of(name)}
    for kind in config.also:
        if not outside_layers(model, kind):
            missing = "layer behind its blocks" if kind == HEAD else "position embeddings"
            raise InputError(f"--also {kind}: {type(model).__name__} has no {missing}; leave it out.")
    for ours, theirs in tied_weights(model).items():
        pair = {ours.removesuffix(".weight"), theirs.removesuffix(".weight")}
        if len(pair & wanted) == 1:
            raise InputError(
                f"--also {' '.join(config.also)}: {' and '.join(sorted(pair))} are one matrix; pass --also "
                f"{EMBEDDINGS} {HEAD}, or leave it out."
            )
    for name in wanted:
        width = _weight(model.get_submodule(name)).shape[1]
        if config.group_size > width:
            raise InputError(f"--group_size {config.group_size}: larger than {name}, which is {width} wide.")


class Outside:
    """Quantizes, in place, what ``config.also`` names; embeddings first, the head when all else is done.

    Args:
        model: In memory as a whole.
        batches: Calibration examples of all workers.
        config: What is done.
        workers: Share the examples.
    """

    def __init__(
        self, model: PreTrainedModel, batches: Batches, config: QuantizeConfig, workers: Workers = ALONE
    ) -> None:
        self._model, self._batches, self._config, self._workers = model, batches, config, workers

    @torch.no_grad()
    def before(self, into: Quantized) -> None:
        """Quantize the embeddings: to the nearest code each, as an embedding looks up one row at a time.

        Embeddings that also are the output layer are solved as this, with both uses counting the same.
        """
        for name in [name for kind in (EMBEDDINGS, POSITIONS) for name in self._wanted(kind)]:
            matrix, second = self._model.get_submodule(name).weight, None
            heads = outside_layers(self._model, HEAD)
            heads = [head for head in heads if self._model.get_submodule(head).weight is matrix]
            if heads and self._config.recipe.look_ahead:
                second = self.inputs(heads)[heads[0]]
                second = second / second.diagonal().mean().clamp(min=1e-30)
                second.diagonal().add_(1.0)
            self._solve(name, second, into)
            for head in heads:
                into.weights[head] = into.weights[name]

    @torch.no_grad()
    def behind(self, into: Quantized) -> None:
        """Quantize the layers of the head, given what the quantized blocks make."""
        names = [name for name in self._wanted(HEAD) if name not in into.weights]
        known = self.inputs(names) if names and self._config.recipe.look_ahead else {}
        for name in names:
            self._solve(name, known.get(name), into)

    def _wanted(self, kind: str) -> list[str]:
        if kind not in self._config.also:
            return []
        return [name for name in outside_layers(self._model, kind) if self._config.scheme_of(name) is not None]

    def _solve(self, name: str, second: Tensor | None, into: Quantized) -> None:
        began, config, scheme = perf_counter(), self._config, self._config.scheme_of(name)
        assert scheme is not None
        weight, recipe = _weight(self._model.get_submodule(name)), config.recipe
        require_scales(name, weight, scheme, config.scale_dtype)
        hessian = None
        if second is not None:
            hessian = Hessian.of(second, damping=recipe.damping, by_activity=recipe.by_activity)
        solved = quantize_weight(weight, hessian, scheme.fitting(weight.shape[1]), recipe, dtype=config.scale_dtype)
        weight.copy_(solved.weight.decode().to(weight.dtype))
        into.weights[name] = solved.weight
        errors = (solved.error, solved.nearest_error, solved.damping)
        stored, seconds = solved.weight.scheme, perf_counter() - began
        fitted = 0 if hessian is None else weight.shape[1]
        into.layers.append(LayerReport(None, name, *errors, (), seconds, stored.bits, stored.group_size, fitted))

    def inputs(self, names: list[str]) -> dict[str, Tensor]:
        """Second moments of the inputs of layers behind the blocks, which one pass of the examples reaches."""
        layers = {name: self._model.get_submodule(name) for name in names}
        device = self._model.device
        moments = {name: Moments.zeros(_weight(layer).shape[1], device) for name, layer in layers.items()}
        for batch in self._workers.share(self._batches):
            mask = token_mask(batch).to(device)
            with watched(layers) as seen:
                outputs_of(self._model, batch)
            for name, given in seen.inputs.items():  # of tokens, or pooled: one row for each example
                whole = given.shape[:2] == mask.shape
                moments[name].update(token_rows(given, mask) if whole else given.reshape(-1, given.shape[-1]))
        for one in moments.values():
            one.all_reduce()
        return {name: one.second for name, one in moments.items() if one.count}


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def outside_layers(model: PreTrainedModel, kind: str) -> list[str]:
    """Names of layers outside the blocks of a model.

    Args:
        model: The model; shapes are enough.
        kind: ``embeddings`` of tokens; ``positions``: embeddings of anything else; ``head``: all linear layers that
            stand behind the blocks.
    """
    embeddings = model.get_input_embeddings()
    if kind == EMBEDDINGS:
        return [name for name, module in model.named_modules() if module is embeddings]
    if kind == POSITIONS:
        others = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
        return [name for name, module in others if module is not embeddings]
    blocks = {id(module) for view in layer_views(model) for module in view.block.modules()}
    names, behind = [], False
    for name, module in model.named_modules():
        behind = behind or id(module) in blocks
        if behind and id(module) not in blocks and isinstance(module, nn.Linear):
            names.append(name)
    return names
