"""How much of the rounding errors of drafts is left once a model is quantized with all care."""

import copy
import math
import warnings
from dataclasses import replace

from transformers import PreTrainedModel

from shrinkformer.errors import ShrinkformerWarning
from shrinkformer.prune.shrink import Shrinker
from shrinkformer.prune.statistics import Progress
from shrinkformer.prune.surgery import with_blocks
from shrinkformer.quantize.byte_costs import ByteCosts
from shrinkformer.quantize.byte_options import ByteOptions, Part, State, bits_by_name
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.drafts import untouched
from shrinkformer.quantize.quantizer import quantize_

_MEASURED = (2, 3)
"""Bits whose errors matter; with more of them little is lost either way."""


def errors_left(
    shrinker: Shrinker, options: ByteOptions, costs: ByteCosts, config: QuantizeConfig, progress: Progress = iter
) -> dict[int, float]:
    """Size of the errors that careful quantizing leaves, beside those of drafts, by bits.

    All blocks of the dense model are brought to so many bits in both ways. Damage grows with the square of errors, so
    the root of the ratio of what both do to predictions for examples set aside is taken for the ratio of the errors.

    Args:
        shrinker: The dense model, and the examples.
        options: With drafts that are not tempered.
        costs: Of the same model.
        config: Groups, kind of grid, quantizer and type of the scales.
        progress: Wraps loops over the blocks.
    """
    found = {}
    for bits in _MEASURED:
        state = _all_in(shrinker, costs, bits)
        drafted = with_blocks(shrinker.model, options.build(state), shrinker.model.config)
        of_drafts = shrinker.judge.of(drafted)
        of_careful = shrinker.judge.of(_quantized(shrinker, costs, config, state, progress))
        # Tiny damage may come out as anything, and nothing is to look better than it would with all errors gone.
        found[bits] = math.sqrt(min(1.0, max(of_careful, 0.0) / of_drafts)) if of_drafts > 0 else 1.0
        shrinker.config.say(f"{bits} bits: divergence {of_careful:.5f} with care, {of_drafts:.5f} of drafts")
    return found


def _all_in(shrinker: Shrinker, costs: ByteCosts, bits: int) -> State:
    """Every sublayer that groups divide in so many bits, none smaller."""
    state = {}
    for level in shrinker.levels:
        for sublayer, choice in untouched(level.view).items():
            fits = costs.sublayer(level.view.index, sublayer, choice.units, (bits, bits)) is not None
            state[Part(level.view.index, sublayer)] = replace(choice, bits=(bits, bits)) if fits else choice
    return state


def _quantized(
    shrinker: Shrinker, costs: ByteCosts, config: QuantizeConfig, state: State, progress: Progress
) -> PreTrainedModel:
    model, bits_of = copy.deepcopy(shrinker.model), bits_by_name(costs, state)
    if not bits_of:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShrinkformerWarning)  # they are said of the model that is kept
        quantize_(
            model,
            shrinker.batches,
            replace(config, bits_of=bits_of, also=()),
            progress=progress,
            resources=replace(shrinker.resources, store=None),
            objective=shrinker.objective,
        )
    return model
