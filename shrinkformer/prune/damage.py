"""What changed blocks do to a model's predictions, measured from the first changed block on."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shrinkformer.architectures import layer_views
from shrinkformer.prune.divergence import Targets
from shrinkformer.prune.objective import Objective, Predictions, predicts_words
from shrinkformer.prune.samples import spread
from shrinkformer.prune.statistics import Batches
from shrinkformer.prune.stream import BlockStream
from shrinkformer.utils.parallel import ALONE, Workers
from shrinkformer.utils.precision import half_precision

TOKENS = 16_384
"""Tokens on which plans are compared: a search on fewer examples finds what suits those and no others."""

FEW_TOKENS = 2_048
"""Tokens that are enough for the curves of single parts."""

KEPT_NUMBERS = 1.5e8
"""Probabilities of the dense model that are kept; large vocabularies get fewer tokens."""


class Damage:
    """The examples at the entrance of every block of one version of a model.

    Args:
        model: The dense model, in memory, in evaluation mode.
        batches: Examples of all workers, of which some are used.
        objective: What it predicts.
        workers: Share the examples; all of them get the same figures.
        tokens: In about so many tokens, less of models that predict words.

    Examples pass in bfloat16 where that is fast, both models alike.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Batches,
        objective: Objective,
        workers: Workers = ALONE,
        tokens: int = TOKENS,
    ) -> None:
        self._model, self._device, self._objective = model, model.device, objective
        if predicts_words(model):  # every token is a prediction, and a long one
            tokens = min(tokens // 2, int(KEPT_NUMBERS / model.config.vocab_size))
        self._share = workers.share(spread(batches, max(1, tokens)))
        self.start()
        blocks = [view.block for view in layer_views(model)]
        self.enter(blocks)
        with torch.no_grad():
            self._targets = Targets(self._predictions(blocks, len(blocks) - 1), self._device, workers)

    @torch.no_grad()
    def start(self) -> None:
        """Let the examples enter the model anew, after a change before its blocks; blocks have to be entered next."""
        with half_precision(self._device, self._model.dtype):
            self._stream = BlockStream(self._model, self._share)
            self._entrances = [[self._stream.hidden(index) for index in range(len(self._stream))]]

    @torch.no_grad()
    def enter(self, blocks: Sequence[nn.Module]) -> None:
        """Put the examples at the entrances of other blocks."""
        del self._entrances[1:]
        with half_precision(self._device, self._model.dtype):
            for block in blocks[:-1]:
                before = self._entrances[-1]
                self._entrances.append([self._behind([block], before, index) for index in range(len(self._stream))])

    @torch.no_grad()
    def of(self, blocks: Sequence[nn.Module], start: int = 0) -> float:
        """Mean divergence per prediction of the model with these blocks; those before ``start`` were entered."""
        return self._targets.mean_divergence(self._predictions(blocks, start))

    def _behind(self, blocks: Sequence[nn.Module], entrance: Sequence[Tensor], index: int) -> Tensor:
        """Send a micro-batch from the entrance of the first of some blocks to the exit of the last."""
        self._stream.replace(index, entrance[index])
        for block in blocks:
            self._stream.replace(index, self._stream.call(block, index))
        return self._stream.hidden(index)

    def _predictions(self, blocks: Sequence[nn.Module], start: int) -> Iterator[Predictions]:
        with half_precision(self._device, self._model.dtype):
            for index in range(len(self._stream)):
                self._behind(blocks[start:], self._entrances[start], index)
            for index, output in enumerate(self._stream.outputs()):
                yield self._objective.predictions(output, self._stream.mask(index))
