"""Quantize a model block by block."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shrinkformer.architectures import LayerView, Projection, layer_views
from shrinkformer.errors import InputError
from shrinkformer.prune.columns import ColumnSurvey, warn_of_few_tokens
from shrinkformer.prune.counted import require_counted
from shrinkformer.prune.fisher import output_metrics
from shrinkformer.prune.guarded import learn_guarded
from shrinkformer.prune.health import require_finite_outputs
from shrinkformer.prune.objective import Objective, objective_of
from shrinkformer.prune.passes import BlockPasses, DensePass
from shrinkformer.prune.received import receive
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.sites import Site, block_sites
from shrinkformer.prune.statistics import Batches, Progress
from shrinkformer.prune.stream import BlockStream
from shrinkformer.prune.streamed import block_prefix
from shrinkformer.quantize.attempts import repeatable
from shrinkformer.quantize.config import LayerReport, QuantizeConfig, Quantized
from shrinkformer.quantize.final_norm import refit_final_norm
from shrinkformer.quantize.grid import QuantizedWeight
from shrinkformer.quantize.layer import quantize_weights
from shrinkformer.quantize.observe import Fold, merged, observe
from shrinkformer.quantize.outside import Outside, require_outside
from shrinkformer.quantize.planned import require_formats
from shrinkformer.quantize.resume import Finished, QuantizedBlocks
from shrinkformer.quantize.scales import require_scales
from shrinkformer.quantize.scheme import Scheme
from shrinkformer.quantize.solver import Hessian
from shrinkformer.quantize.target import Target, correct
from shrinkformer.utils.precision import half_precision


def quantize_(
    model: Any,
    batches: Any,
    config: QuantizeConfig | None = None,
    *,
    dense: PreTrainedModel | None = None,
    formats: Sequence[str] = (),
    progress: Progress = iter,
    resources: Resources | None = None,
    store: QuantizedBlocks | None = None,
    objective: Objective | None = None,
    tokenizer: Any = None,
) -> Quantized:
    """Quantize the linear layers of a model's blocks, in place.

    Afterwards the model computes with what the integers stand for; :func:`shrinkformer.quantize.checkpoint.save`
    writes the integers.

    Args:
        model: Any model with an architecture record, dense or pruned, or a wrapper around one; changed.
        batches: Calibration examples in any form that :func:`~shrinkformer.dataset.batches.as_batches` reads; no labels
            are needed.
        config: What is done.
        dense: The model whose outputs are aimed at, such as the one from before pruning; by default the model itself.
        formats: What will be written; names of formats that cannot hold the layers are refused before anything is done.
        progress: Wraps the loop over the blocks, for a progress bar.
        resources: For several processes, and for hidden states that do not fit.
        store: Keeps finished blocks on disk, and gives back those of an interrupted run.
        objective: What the model predicts, by which errors of outputs are weighed; by default what its own head does.
        tokenizer: For examples that are texts.

    Raises:
        InputError: A value of ``config`` does not fit the model, or a format does not hold it.
        UnsupportedModelError: There is no architecture record for the model, or it is quantized already.
        NumericalError: Weights, or what the model computes on the examples, are NaN or infinite, or become so.
        OutOfMemoryError: There is not enough memory even for one example at a time, or too little once the first block
            is finished: then some of the model is quantized and some is not.

    Warns:
        ShrinkformerWarning: There are fewer tokens than columns, columns are dead or huge, scales are too small for
            their type, or batches had to be halved.
    """
    config, resources = config or QuantizeConfig(), resources or Resources()
    given = receive(model, batches, tokenizer=tokenizer, objective=objective)
    model, batches, objective = given.model, given.batches, given.objective
    if dense is None:
        require_counted(model)
        require_groups(model, config)
    require_outside(model, config)
    require_formats(model, config, formats)
    if config.recipe.look_ahead:
        warn_of_few_tokens(model, batches)
    began = perf_counter()

    def attempt(some: Batches) -> Quantized:
        return _quantize(
            model, some, config, dense, progress=progress, resources=resources, store=store, objective=objective
        )

    quantized = learn_guarded(attempt, model, batches, resources)
    require_finite_outputs(model, batches, resources.workers)
    quantized.seconds["quantization"] = perf_counter() - began
    return quantized


def _quantize(
    model: PreTrainedModel,
    batches: Batches,
    config: QuantizeConfig,
    dense: PreTrainedModel | None,
    *,
    progress: Progress,
    resources: Resources,
    store: QuantizedBlocks | None,
    objective: Objective | None,
) -> Quantized:
    """One attempt, which may fail and be repeated as long as no block is finished."""
    run = BlockQuantizer(model, model if dense is None else dense, batches, config, resources=resources, store=store)
    run.weigh_outputs(model, batches, objective)
    outside, quantized = Outside(model, batches, config, resources.workers), Quantized({}, [], config)
    names = {module: name for name, module in model.named_modules()}
    aims = None if dense is None else layer_views(dense)
    with repeatable(model, quantized):
        outside.before(quantized)
        run.enter(model)
        for view in progress(layer_views(model)):
            copied = {id(model.config): model.config}
            aim = aims[view.index] if aims else replace(view, block=copy.deepcopy(view.block, copied))
            for layer in run.quantize(view, aim):
                quantized.weights[names[view.linear(layer.path).module]] = layer.weight
                quantized.layers.append(layer.report)
        run.finish(model)
        outside.behind(quantized)
    return quantized


def _at_least_two(batches: Batches) -> Batches:
    """The same examples in two micro-batches or more: one half of them judges what was learnt from the other."""
    if len(batches) > 1 or not batches or len(next(iter(batches[0].values()))) < 2:
        return batches
    half = len(next(iter(batches[0].values()))) // 2
    return [{name: value[part] for name, value in batches[0].items()} for part in (slice(half), slice(half, None))]


def require_groups(model: PreTrainedModel, config: QuantizeConfig) -> None:
    """Check, from shapes alone, that the layers of a model are at least one group wide.

    Raises:
        InputError: One is not.
        UnsupportedModelError: A layer is none that could be quantized.
    """
    view = layer_views(model)[0]
    for site in block_sites(view.architecture, config.layers):
        for path in site.paths:
            inputs = view.linear(path).in_features
            if config.group_size > inputs:
                raise InputError(
                    f"--group_size {config.group_size}: larger than {path} of layer {view.index}, which has {inputs} "
                    f"inputs; choose at most {inputs}, or -1 for one scale per output."
                )


class BlockQuantizer:
    """Quantizes one block after the other; calibration examples stand at the entrance of the next one.

    Args:
        model: The model that becomes quantized; only what stands before its blocks is used here.
        dense: The model whose outputs are aimed at.
        batches: Calibration examples of all workers.
        config: What is done.
        resources: Where data goes and who shares the work.
        store: Keeps finished blocks on disk, and gives back those of an interrupted run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dense: PreTrainedModel,
        batches: Batches,
        config: QuantizeConfig,
        *,
        resources: Resources,
        store: QuantizedBlocks | None = None,
    ) -> None:
        self._config, self._recipe, self._resources, self._store = config, config.recipe, resources, store
        self._prefix = block_prefix(model)
        self._dtype = model.dtype
        self._fast = config.fast and model.dtype != torch.float64
        self._sites = block_sites(layer_views(model)[0].architecture, config.layers)
        self._metrics: dict[tuple[int, str], Tensor] = {}
        self._share = resources.workers.share(_at_least_two(batches))
        self._dense = BlockStream(dense, self._share, resources.offload) if self._recipe.correct else None
        self._stream: BlockStream | None = None
        self._survey = ColumnSurvey()

    def enter(self, model: PreTrainedModel) -> None:
        """Put the examples at the entrance of the first block, once what stands before it is settled."""
        if self._recipe.look_ahead:
            self._stream = BlockStream(model, self._share, self._resources.offload)

    def weigh_outputs(self, model: PreTrainedModel, batches: Batches, objective: Objective | None = None) -> None:
        """Learn how much errors of each layer's outputs matter; the whole model must be in memory."""
        store, workers = self._store, self._resources.workers
        finished = {view.index for view in layer_views(model) if store is not None and store.holds(view.index)}
        finished = workers.broadcast(finished)
        layers = {
            (view.index, path): view.linear(path).module
            for view in layer_views(model)
            for site in self._sites
            for path in site.paths
            if view.index not in finished and self._scheme(view, site) is not None
        }
        if self._recipe.output_aware and layers:
            settled = (objective or objective_of(model)).scaled(model, batches, workers)
            self._metrics = output_metrics(model, layers, batches, objective=settled, workers=workers)

    @torch.no_grad()
    def quantize(self, view: LayerView, aim: LayerView) -> list[Finished]:
        """Quantize a block in place, and move the examples on.

        Args:
            view: The block.
            aim: The block of the dense model.
        """
        store, workers = self._store, self._resources.workers
        if workers.broadcast(store is not None and store.holds(view.index)) and store is not None:
            return self._restore(store.read(view), view, aim)
        found = list(self._quantize(view, aim))
        if store is not None and workers.is_main:
            store.write(view.index, found)
        workers.barrier()
        return found

    def _restore(self, found: list[Finished], view: LayerView, aim: LayerView) -> list[Finished]:
        with self._precision(view.attention_output.weight.device):
            if self._dense is not None:
                self._dense.run(aim.block)
            for layer in found:
                layer.put(view.linear(layer.path))
            if self._stream is not None:
                self._stream.run(view.block)
        return found

    def _precision(self, device: torch.device) -> AbstractContextManager[object]:
        """In which examples pass."""
        return half_precision(device, self._dtype) if self._fast else nullcontext()

    def _quantize(self, view: LayerView, aim: LayerView) -> Iterator[Finished]:
        sites = [site for site in self._sites if self._scheme(view, site) is not None]
        if self._stream is None:
            for site in sites:
                yield from self._solve(site, view, None)
            return
        offload, dense = self._resources.offload, None
        if self._dense is not None:
            with self._precision(view.attention_output.weight.device):
                dense = DensePass(self._dense, aim, self._sites, offload)
        passes = BlockPasses(self._stream, view, offload)
        if self._recipe.sequential:
            for site in sites:
                yield from self._solve(site, view, self._observe(site, passes, dense))
        else:
            known = [self._observe(site, passes, dense) for site in sites]
            for site, folds in zip(sites, known, strict=True):
                yield from self._solve(site, view, folds)
            passes = BlockPasses(self._stream, view, offload)
        with self._precision(view.attention_output.weight.device):
            passes.advance()

    def finish(self, model: PreTrainedModel) -> None:
        """Fit what stands behind the blocks to what they have become."""
        self._survey.warn()
        if self._dense is not None and self._stream is not None:
            refit_final_norm(model, self._dense, self._stream, self._resources.workers)

    def _scheme(self, view: LayerView, site: Site) -> Scheme | None:
        """How the layers of a site are stored; they have one input, and are solved as one."""
        return self._config.scheme_of(f"{self._prefix}{view.index}.{site.paths[0]}")

    def _observe(self, site: Site, passes: BlockPasses, dense: DensePass | None) -> list[Fold]:
        return observe(site, passes, dense, self._resources.workers, rounded=self._fast)

    def _solve(self, site: Site, view: LayerView, folds: list[Fold] | None) -> Iterator[Finished]:
        """Quantize the layers of a site in place; those with a bias and those without are solved apart."""
        whole, scheme = None if folds is None else merged(folds), self._scheme(view, site)
        assert scheme is not None
        if whole is not None:
            self._survey.add(f"{site.paths[0]} of layer {view.index}", whole.inputs)
        kinds = {path: self._recipe.correct and view.linear(path).bias is not None for path in site.paths}
        for centred in sorted(set(kinds.values())):
            began = perf_counter()
            linears = {path: view.linear(path) for path in site.paths if kinds[path] == centred}
            aims = {path: self._aim(linear, folds, whole, centred=centred) for path, linear in linears.items()}
            for path, aim in aims.items():
                require_scales(f"{path} of layer {view.index}", aim.weight, scheme, self._config.scale_dtype)
            hessian = None
            if whole is not None:
                second = whole.inputs.covariance() if centred else whole.inputs.second
                hessian = Hessian.of(second, damping=self._recipe.damping, by_activity=self._recipe.by_activity)
            solved = quantize_weights(
                [aim.weight for aim in aims.values()],
                hessian,
                scheme.fitting(next(iter(linears.values())).in_features),
                self._recipe,
                dtype=self._config.scale_dtype,
                metrics=[self._metrics.pop((view.index, path)) for path in linears] if self._metrics else None,
            )
            seconds = (perf_counter() - began) / len(linears)
            for (path, linear), one in zip(linears.items(), solved, strict=True):
                aim, errors = aims[path], (one.error, one.nearest_error)
                stored = one.weight.scheme
                fitted = 0 if hessian is None else linear.in_features
                report = LayerReport(
                    view.index, path, *errors, one.damping, aim.trust, seconds, stored.bits, stored.group_size, fitted
                )
                bias = _bias(linear, one.weight, aim, whole) if centred and whole is not None else linear.bias
                layer = Finished(path, one.weight, report, None if bias is None else bias.clone())
                layer.put(linear)
                yield layer

    def _aim(self, linear: Projection, folds: list[Fold] | None, whole: Fold | None, *, centred: bool) -> Target:
        """What a layer should become."""
        if folds is None or whole is None or not self._recipe.correct:
            return Target.unchanged(linear.weight)
        return correct(linear.weight, folds, whole, centred=centred)


def _bias(linear: Projection, found: QuantizedWeight, aim: Target, inputs: Fold) -> Tensor:
    """The bias that takes up what a layer loses in the mean."""
    assert linear.bias is not None
    gained = (linear.weight.double() - found.decode().double()) @ inputs.inputs.mean
    return (linear.bias.double() + aim.shift + gained).to(linear.bias.dtype)
