"""What stands on an encoder or decoder: the heads of transformers, known by how the names of their classes end.

The Auto classes that open them are in :mod:`shrinkformer.prune.pruned_modeling`, which goes along with checkpoints.
"""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Head:
    """A kind of head.

    Attributes:
        suffix: End of the class's name.
        task: What it does, as the hub's pipeline tags call it.
    """

    suffix: str
    task: str


BARE = Head("Model", "feature-extraction")
"""No head at all: a plain encoder or decoder."""

HEADS = (
    Head("ForSequenceClassification", "text-classification"),
    Head("ForQuestionAnswering", "question-answering"),
    Head("ForTokenClassification", "token-classification"),
    Head("ForMultipleChoice", "multiple-choice"),
    Head("ForMaskedLM", "fill-mask"),
    Head("ForCausalLM", "text-generation"),
    Head("LMHeadModel", "text-generation"),
)


def head_of(architecture: str) -> Head | None:
    """The head of a class by its name; None for one that is not known, such as ``BertForPreTraining``.

    >>> head_of("BertForMaskedLM").task, head_of("BertModel").task, head_of("BertForPreTraining")
    ('fill-mask', 'feature-extraction', None)
    """
    for head in HEADS:
        if architecture.endswith(head.suffix):
            return head
    return BARE if architecture.endswith(BARE.suffix) and not architecture.endswith("DoubleHeadsModel") else None


def chooses(model: nn.Module) -> bool:
    """Whether a model answers by choosing: its inputs are ``(examples, choices, length)``."""
    return any(kind.__name__.endswith("ForMultipleChoice") for kind in type(model).__mro__)
