"""Prune and quantize a model so that its checkpoint takes a given number of bytes."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

from transformers import PreTrainedModel

from shrinkformer.efficiency.macs import LayerSize
from shrinkformer.errors import BudgetError
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.curves import sized
from shrinkformer.prune.guarded import learn_guarded
from shrinkformer.prune.objective import Objective
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.result import Pruned, timed
from shrinkformer.prune.shrink import Shrinker, learn
from shrinkformer.prune.shrink_config import ShrinkConfig
from shrinkformer.prune.sites import OUTSIDE
from shrinkformer.prune.statistics import Batches, Progress
from shrinkformer.quantize.byte_costs import (
    ATTENTION,
    BITS,
    FEED_FORWARD,
    SUBLAYERS,
    ByteCosts,
    require_packable,
)
from shrinkformer.quantize.byte_options import ByteOptions, Part, bits_by_name
from shrinkformer.quantize.byte_search import ByteSearch, Mixture
from shrinkformer.quantize.config import QuantizeConfig, Quantized
from shrinkformer.quantize.drafts import Drafts
from shrinkformer.quantize.outside import outside_layers
from shrinkformer.quantize.quantizer import quantize_
from shrinkformer.quantize.tempering import errors_left
from shrinkformer.utils.inputs import padded_right


@dataclass(frozen=True)
class Compressed:
    """A model within its bytes.

    Attributes:
        model: With the weights that its integers stand for.
        quantized: The integers.
        pruned: Before it was quantized; None where every block kept its size.
    """

    model: PreTrainedModel
    quantized: Quantized
    pruned: Pruned | None


@dataclass(frozen=True)
class Compressor:
    """A model with everything that was learnt about it; :meth:`plans` takes any number of bytes.

    Attributes:
        shrinker: Prunes it.
        searches: Choose widths and bits, one believing all rounding errors of drafts, one what care leaves of them.
        costs: Bytes.
        config: Groups, kind of grid, quantizer and type of the scales.
        limits: What every block must keep, and the length at which MACs are counted.
        progress: Wraps loops over the blocks.
        seconds: Time of calibration and selection.
    """

    shrinker: Shrinker
    searches: Sequence[ByteSearch]
    costs: ByteCosts
    config: QuantizeConfig
    limits: Budget
    progress: Progress = iter
    seconds: dict[str, float] = field(default_factory=dict)

    def plans(self, allowed: int) -> list[Mixture]:
        """Widths and bits for a number of bytes, of each search that found others.

        Raises:
            BudgetError: Nothing is small enough.
        """
        found: list[Mixture] = []
        for search in self.searches:
            mixture = search.run(allowed)
            if all(mixture.choices != other.choices for other in found):
                found.append(mixture)
        return found

    def best(self, mixtures: Sequence[Mixture]) -> Compressed:
        """The one that is nearest to the dense model on examples set aside, of some plans that are carried out."""
        began = perf_counter()
        made = [self.carry_out(mixture) for mixture in mixtures]
        if len(made) == 1:
            return made[0]
        divergences = [self.shrinker.judge.of(one.model) for one in made]
        shown = ", ".join(f"{value:.5f}" for value in divergences)
        self.shrinker.config.say(f"divergence on examples set aside: {shown}")
        best = made[min(range(len(made)), key=divergences.__getitem__)]
        steps = [best.quantized.seconds, {} if best.pruned is None else best.pruned.seconds]
        best.quantized.seconds["safety"] = perf_counter() - began - sum(sum(each.values()) for each in steps)
        return best

    def prune(self, mixture: Mixture) -> Pruned | None:
        """The model in the sizes of a plan, refitted; None where every block keeps its size."""
        sizes = self._sizes(mixture)
        if sizes == [level.size for level in self.shrinker.levels]:
            return None
        return self.shrinker.prune_to(sizes, self.limits.sequence_length)

    def quantization(self, mixture: Mixture) -> QuantizeConfig:
        """What a plan asks of the quantizer."""
        bits_of = bits_by_name(self.costs, mixture.choices)
        model = self.shrinker.model
        also = tuple(kind for kind in OUTSIDE if any(name in bits_of for name in outside_layers(model, kind)))
        return replace(self.config, bits_of=bits_of, also=also)

    def carry_out(self, mixture: Mixture) -> Compressed:
        """Prune and quantize as planned."""
        dense, pruned = self.shrinker.model, self.prune(mixture)
        model = copy.deepcopy(dense if pruned is None else pruned.model)
        found = quantize_(
            model,
            self.shrinker.batches,
            self.quantization(mixture),
            dense=None if pruned is None else dense,
            progress=self.progress,
            resources=replace(self.shrinker.resources, store=None),
            objective=self.shrinker.objective,
        )
        return Compressed(model, found, pruned)

    def _sizes(self, mixture: Mixture) -> list[LayerSize]:
        chosen = mixture.choices
        found = []
        for level in self.shrinker.levels:
            heads, neurons = (chosen[Part(level.view.index, sublayer)].units for sublayer in SUBLAYERS)
            found.append(sized(level.size, heads=heads, neurons=neurons))
        return found


def learn_bytes(
    model: PreTrainedModel,
    batches: Batches,
    config: QuantizeConfig,
    limits: Budget,
    shrink: ShrinkConfig | None = None,
    *,
    objective: Objective | None = None,
    seed: int = 0,
    progress: Progress = iter,
    resources: Resources | None = None,
) -> Compressor:
    """Learn everything about a model that meeting any number of bytes needs.

    Args:
        model: In memory as a whole.
        batches: Model inputs with an ``attention_mask``; labels are not needed.
        config: Groups, kind of grid, quantizer and type of the scales; bits are chosen.
        limits: What every block must keep, and the length at which MACs are counted.
        shrink: How long to search; heads keep their width in any case, as readers of packed weights expect.
        objective: What the model predicts; by default what its own head does.
        seed: Of the answers that are drawn from the model's predictions.
        progress: Wraps loops over the blocks.
        resources: Who shares the work.

    Raises:
        InputError: No packed format holds the layers of this model.
        UnsupportedModelError: There is no architecture record for the model.
        NumericalError: The model computes NaN or infinity on the examples.
    """
    require_packable(model)
    batches = padded_right(batches)
    resources, shrink = resources or Resources(), replace(shrink or ShrinkConfig(), whole_heads=True)

    def attempt(some: Batches) -> Compressor:
        return _learn_bytes(
            model, some, config, limits, shrink, objective=objective, seed=seed, progress=progress, resources=resources
        )

    return learn_guarded(attempt, model, batches, resources)


def _learn_bytes(
    model: PreTrainedModel,
    batches: Batches,
    config: QuantizeConfig,
    limits: Budget,
    shrink: ShrinkConfig,
    *,
    objective: Objective | None,
    seed: int,
    progress: Progress,
    resources: Resources,
) -> Compressor:
    shrinker = learn(model, batches, shrink, objective=objective, seed=seed, progress=progress, resources=resources)
    seconds, costs = dict(shrinker.seconds), ByteCosts(model, config)
    with timed(seconds, "selection"):
        options = ByteOptions(shrinker, Drafts(shrinker, costs, config), costs, limits)
        tempered = options.tempered(errors_left(shrinker, options, costs, config, progress))
        searches = [
            ByteSearch(
                some,
                shrinker.damage,
                seconds=shrink.search_seconds / 2,
                say=shrink.say,
                workers=resources.workers,
            )
            for some in (options, tempered)
        ]
    return Compressor(shrinker, searches, costs, config, limits, progress, seconds)


def require_bytes(model: PreTrainedModel, config: QuantizeConfig, limits: Budget, ratio: float, dense: int) -> None:
    """Check, from shapes alone, that a model can be made so small.

    Args:
        model: The dense model; it needs no weights.
        config: Groups, kind of grid and type of the scales.
        limits: What every block must keep.
        ratio: Fraction of the bytes that may stay.
        dense: Bytes of the dense checkpoint.

    Raises:
        InputError: No packed format holds the layers of this model.
        BudgetError: The smallest model is larger.
    """
    require_packable(model)
    costs = ByteCosts(model, config)
    least = costs.rest
    for index, size in enumerate(costs.sizes):
        neurons = -(-min(limits.min_neurons, size.neurons) // limits.round_to) * limits.round_to
        fewest = {ATTENTION: min(limits.min_heads, size.heads), FEED_FORWARD: min(neurons, size.neurons)}
        for sublayer, units in fewest.items():
            known = [costs.sublayer(index, sublayer, units, (one, other)) for one in BITS for other in BITS]
            least += min(cost for cost in known if cost is not None)
    for names in costs.outside:
        least += min(cost for bits in BITS if (cost := costs.matrix(names, bits)) is not None)
    if least > ratio * dense:
        raise BudgetError(
            f"--target_ratio {ratio:g}: the smallest model takes {least / dense:.3f} of the dense checkpoint's bytes; "
            "raise it, or lower --min_heads, --min_neurons or --round_to."
        )
