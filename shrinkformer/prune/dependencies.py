"""What everything that a run keeps on disk depends on: what stays good for a run with other flags, and what does not.

A fact is something that results depend on, by the name that a user knows: a flag, or a digest of what was read. A
changed fact makes useless exactly what names it below. On facts that nothing here names, such as the weights of the
model, the calibration examples and the code, everything depends: where one of them changed, nothing may be taken up.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

EVALUATION_EXAMPLES = "evaluation examples"

_LEARNING = frozenset({"--batch_size", "--method", "--whole_heads"})  # batches change rounding, at least
_CHOOSING = _LEARNING | {"--search_seconds", "--budget", "--latency_shape"}
_QUANTIZING = _CHOOSING | {"--bits", "--group_size", "--quantizer", "--asymmetric", "--layers", "--also"}
_EVALUATION_FLAGS = {"--evaluation_file", "--evaluation_windows", "--lm_eval"}
_EVALUATING = frozenset({"--batch_size", EVALUATION_EXAMPLES} | _EVALUATION_FLAGS)
_REPORTING = _QUANTIZING | _EVALUATING | {"--target_ratio", "--format", "--export"}


@dataclass(frozen=True)
class Stored:
    """A kind of thing that is kept.

    Attributes:
        words: What it is.
        facts: What it depends on, beside what everything depends on. A budget is a part of the names of things.
        names: How its names in the journal begin; "" for files.
    """

    words: str
    facts: frozenset[str]
    names: str = ""


MOMENTS = Stored("second moments", _LEARNING)
CURVES = Stored("curves", _LEARNING, "curve of block ")
DAMAGE = Stored("measured damages", _LEARNING, "search, ")
ASIDE = Stored("divergences on examples set aside", _CHOOSING, "set aside, ")
BLOCKS = Stored("refitted blocks", _CHOOSING)
QUANTIZED = Stored("quantized blocks", _QUANTIZING)
DENSE = Stored("metrics of the dense model", _EVALUATING, "metrics of the dense model")
FINISHED = Stored("finished budgets", _REPORTING, "finished, ")
RUN = Stored("the name of the run", _REPORTING, "run")  # reports tell runs apart by it

ALL_STORED = (MOMENTS, CURVES, DAMAGE, ASIDE, BLOCKS, QUANTIZED, DENSE, FINISHED, RUN)

_KNOWN = frozenset[str]().union(*(stored.facts for stored in ALL_STORED))


def fatal(changed: Iterable[str]) -> list[str]:
    """Of changed facts those that everything depends on."""
    return [name for name in changed if name not in _KNOWN]


def useless(changed: Collection[str]) -> list[Stored]:
    """What cannot be taken up where facts changed."""
    return [stored for stored in ALL_STORED if stored.facts & set(changed)]
