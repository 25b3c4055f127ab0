"""What a model predicts: read from its head once, then the same wherever two models are compared.

The head is the model's own. A classifier of one label out of several predicts a distribution, one of independent labels
a distribution for each of them, a regression numbers, a tagger or language model a distribution for every token, a
question answerer where answers begin and end, and a sentence encoder an embedding, pooled as its files say.
"""

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from shrinkformer.errors import UnsupportedModelError, warn
from shrinkformer.prune.pooling import MEAN, SentenceHead, head_in_memory, read_head
from shrinkformer.prune.samples import spread
from shrinkformer.prune.sentence_encoder import SIDE_PATTERNS
from shrinkformer.prune.statistics import Batches
from shrinkformer.utils.hub import some_files
from shrinkformer.utils.inputs import outputs_of, token_mask
from shrinkformer.utils.parallel import ALONE, Workers

_LOGITS = frozenset(("logits", "start_logits", "end_logits", "prediction_logits", "seq_relationship_logits"))

_SCALED_ON = 4096
"""Tokens on which the spread of numbers is measured."""


@dataclass(frozen=True)
class Predictions:
    """What a model predicts.

    Attributes:
        parts: ``(rows, classes)`` float32: one tensor, or two for the start and end of answers.
        distribution: Whether they are log-probabilities; otherwise numbers, or embeddings.
    """

    parts: tuple[Tensor, ...]
    distribution: bool


class Logits(Enum):
    """What the logits of an example are, where it has no more than one row of them."""

    ONE_CLASS = "one class"
    """A softmax: one of the classes, or of the choices, is right."""
    LABELS = "independent labels"
    """A sigmoid for each: any number of labels is right."""
    NUMBERS = "numbers"
    """They are the answer themselves."""
    TOKENS = "yes or no for each token"
    """A sigmoid for each token, as in ELECTRA's discriminator."""


UNUSUAL = (Logits.LABELS, Logits.TOKENS)
"""What is worth saying of a head."""


@dataclass(frozen=True)
class Objective:
    """What a model predicts, and how far two predictions are apart.

    Attributes:
        logits: How those of an example are read; those of tokens are distributions over the classes.
        sentence: What stands behind a model without a head.
        scale: Numbers are divided by these, one for each output; empty for numbers as they are.
    """

    logits: Logits = Logits.NUMBERS
    sentence: SentenceHead = MEAN
    scale: tuple[float, ...] = ()

    def predictions(self, output: Any, mask: Tensor) -> Predictions:
        """What a model predicts, in a form that :class:`~shrinkformer.prune.divergence.Target` compares.

        Args:
            output: Of a transformers model.
            mask: Where the tokens are, ``(examples, length)`` bool.

        Raises:
            UnsupportedModelError: There is nothing in the output that this package knows.
        """
        others = [name for name in output if name.endswith("logits") and name not in _LOGITS]
        if others:
            raise UnsupportedModelError(
                f"{type(output).__name__} has {', '.join(others)}, which nothing here looks at; remove that head."
            )
        if "start_logits" in output:
            parts = (output.start_logits, output.end_logits)
            logs = tuple(torch.log_softmax(part.float().masked_fill(~mask, -1e4), -1) for part in parts)
            return Predictions(logs, distribution=True)
        if "prediction_logits" in output:  # pretraining: tokens, and whether one text follows the other
            both = (_of_tokens(output.prediction_logits, mask), output.seq_relationship_logits)
            return Predictions(tuple(torch.log_softmax(part.float(), -1) for part in both), distribution=True)
        if "logits" in output:
            return self._of_logits(output.logits, mask)
        if "last_hidden_state" in output:
            return self._of_numbers(self.sentence.embed(output.last_hidden_state, mask))
        raise UnsupportedModelError(
            f"the model gives {type(output).__name__} with {', '.join(output)}; known are logits, start_logits and "
            "end_logits, and last_hidden_state."
        )

    def _of_logits(self, logits: Tensor, mask: Tensor) -> Predictions:
        if logits.ndim == 3:
            logits = _of_tokens(logits, mask)
            kind = Logits.ONE_CLASS if logits.shape[-1] > 1 else Logits.NUMBERS
        else:
            kind = self.logits
        if kind is Logits.ONE_CLASS:
            return Predictions((torch.log_softmax(logits.float(), -1),), distribution=True)
        if kind is Logits.NUMBERS:
            return self._of_numbers(logits.float())
        each = logits[mask] if kind is Logits.TOKENS else logits.flatten()
        # A yes or no is a class of two, and independent ones are rows of their own.
        return Predictions((torch.stack((logsigmoid(each.float()), logsigmoid(-each.float())), -1),), True)

    def _of_numbers(self, numbers: Tensor) -> Predictions:
        scaled = numbers / numbers.new_tensor(self.scale) if self.scale else numbers
        return Predictions((scaled,), distribution=False)

    def facts(self) -> list[str]:
        """All that tells this objective from others."""
        weights = [tensor for module in self.sentence.behind for tensor in module.state_dict().values()]
        return [self.logits.value, str(self.sentence), *(str(tensor.tolist()) for tensor in weights)]

    def scaled(self, model: PreTrainedModel, batches: Batches, workers: Workers = ALONE) -> "Objective":
        """The same, with numbers in units of their spread, so that no output counts more for being larger.

        Args:
            model: The dense model, in memory, in evaluation mode.
            batches: Examples of all workers, of which some are used.
            workers: All of them get the same.
        """
        plain = self.sentence.of_unit_length if is_headless(model) else self.logits is not Logits.NUMBERS
        if plain or self.scale:
            return self
        found = list[Tensor]()
        with torch.no_grad():
            for batch in spread(batches, _SCALED_ON):
                found += self.predictions(outputs_of(model, batch), token_mask(batch).to(model.device)).parts
        numbers = torch.cat(found).double()
        variances = numbers.var(0, correction=0)
        if is_headless(model):  # one scale for all of an embedding, so that directions stay
            variances = variances.sum(0, keepdim=True)
        return replace(self, scale=workers.broadcast(tuple(_power_of_two(float(each)) for each in variances.sqrt())))


UNKNOWN = Objective()
"""Of a head that nothing is known about: all of a row of logits counts, whatever answer is made of it."""


def objective_of(model: nn.Module) -> Objective:
    """What a model predicts, from its configuration, the class of its head, and the files beside it.

    Args:
        model: A model of transformers, of this package or derived from one, or a ``SentenceTransformer``.

    Raises:
        CheckpointError: It is a sentence encoder with a module that this package does not know.
        UnsupportedModelError: Its ``problem_type`` is none of transformers.

    Warns:
        ShrinkformerWarning: It has no head, and no file says what its embeddings are.
    """
    if isinstance(model, nn.Sequential) and hasattr(model, "similarity_fn_name"):
        return Objective(sentence=head_in_memory(model))
    if is_headless(model):
        return Objective(sentence=sentence_head_of(str(getattr(model, "name_or_path", ""))))
    return Objective(_logits_of(model))


def is_headless(model: nn.Module) -> bool:
    """Whether a model gives states of tokens and nothing made of them."""
    return isinstance(model, PreTrainedModel) and model.base_model is model


def predicts_words(model: PreTrainedModel) -> bool:
    """Whether every token gets a distribution over the whole vocabulary: of language models, masked ones among them."""
    return model.can_generate() or model.get_output_embeddings() is not None


def sentence_head_of(location: str) -> SentenceHead:
    """What the files of a checkpoint say about its embeddings.

    Args:
        location: A folder, or a name on the hub.

    Raises:
        CheckpointError: They name a module that this package does not know.

    Warns:
        ShrinkformerWarning: They say nothing.
    """
    folder = some_files(location, SIDE_PATTERNS) if location else None
    found = None if folder is None else read_head(folder)
    if found is None:
        warn(
            f"{location or 'the model'} has no head and no modules.json: it is judged by the mean of its tokens, "
            "of length one, as most sentence encoders are used"
        )
    return found or MEAN


def _logits_of(model: nn.Module) -> Logits:
    """By the class of the head; of sequence classifiers by the rules of transformers."""
    names = [kind.__name__ for kind in type(model).__mro__]
    if any(name.endswith("ForPreTraining") for name in names):
        return Logits.TOKENS  # BERT's has other outputs
    if any(name.endswith(("ForMultipleChoice", "ForNextSentencePrediction")) for name in names):
        return Logits.ONE_CLASS
    config = getattr(model, "config", None)
    problem, labels = getattr(config, "problem_type", None), getattr(config, "num_labels", None)
    usual = Logits.NUMBERS if labels == 1 else Logits.ONE_CLASS
    if problem is None:
        return usual
    known = {
        "regression": Logits.NUMBERS,
        "single_label_classification": usual,
        "multi_label_classification": Logits.LABELS,
    }
    if problem not in known:
        raise UnsupportedModelError(
            f"problem_type in config.json is {problem!r}; transformers knows {', '.join(known)}, or null: correct it."
        )
    return known[problem]


def _of_tokens(logits: Tensor, mask: Tensor) -> Tensor:
    """Rows of tokens; much faster than a mask where a vocabulary is long."""
    return logits.flatten(0, 1).index_select(0, mask.flatten().nonzero().squeeze(1))


def _power_of_two(spread: float) -> float:
    """The nearest one, so that dividing by it rounds nothing."""
    return 2.0 ** round(math.log2(spread)) if 0 < spread < float("inf") else 1.0
