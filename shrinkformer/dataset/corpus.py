"""Language-modelling corpora as data: one frozen record each.

Which splits are used and how their texts are joined follows the code of Frantar et al. 2022, "GPTQ" (IST-DASLab/gptq,
``datautils.py``: ``get_wikitext2``, ``get_ptb_new``, ``get_c4_new``), so that figures compare.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from shrinkformer.errors import InputError


def _wikitext_row(line: str) -> str:
    """A line as the hub's wikitext rows have it: with its newline, or nothing at all where it is blank."""
    return f"{line}\n" if line.strip() else ""


@dataclass(frozen=True)
class Corpus:
    """Where the texts of a corpus are and how they become one stretch of tokens."""

    name: str
    hub: tuple[str, str | None]
    """Data set and configuration on the Hugging Face hub."""
    folder: str
    """Folder below ``--data_dir``; also the stem of the bundled samples."""
    column: str
    """Text column, by its name on the hub."""
    joiner: str
    """What stands between two texts when all of them are tokenised as one."""
    calibration_splits: tuple[str, ...]
    """In order of preference; the evaluation split is not among them."""
    evaluation_split: str
    hub_files: Mapping[str, str] = field(default_factory=dict)
    """Split -> the one file of it that is read, where loading the whole configuration is impossible or too much."""
    evaluation_texts: int | None = None
    """Only so many of the first texts are evaluated."""
    evaluation_windows: int | None = None
    """Only so many of the first windows are evaluated."""
    window_per_text: bool = False
    """Whether each calibration window comes from one text that is long enough, not from all texts joined."""
    row: Callable[[str], str] = str
    """Makes the hub's row of a line of a .txt file."""


_PTB = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/{}/0000.parquet"
_C4 = "hf://datasets/allenai/c4/en/c4-{}.json.gz"

_ALL = (
    Corpus(
        name="wikitext2",
        hub=("Salesforce/wikitext", "wikitext-2-raw-v1"),
        folder="wikitext2",
        column="text",
        joiner="\n\n",
        calibration_splits=("train", "validation"),
        evaluation_split="test",
        row=_wikitext_row,
    ),
    Corpus(
        name="ptb-new",
        hub=("ptb-text-only/ptb_text_only", "penn_treebank"),
        folder="ptb",
        column="sentence",
        joiner=" ",
        calibration_splits=("train", "validation"),
        evaluation_split="test",
        # the data set is a script, which datasets>=4 refuses to run; this is the hub's own conversion of it
        hub_files={split: _PTB.format(split) for split in ("train", "validation", "test")},
        row=str.strip,
    ),
    Corpus(
        name="c4-new",
        hub=("allenai/c4", "en"),
        folder="c4",
        column="text",
        joiner=" ",
        calibration_splits=("train",),
        evaluation_split="validation",
        hub_files={"train": _C4.format("train.00000-of-01024"), "validation": _C4.format("validation.00000-of-00008")},
        evaluation_texts=1100,
        evaluation_windows=256,
        window_per_text=True,
    ),
)

CORPORA: Mapping[str, Corpus] = MappingProxyType({corpus.name: corpus for corpus in _ALL})
"""Every corpus by its ``--task_name``."""


def get_corpus(name: str) -> Corpus:
    """Look a corpus up by its name, the value of ``--task_name`` or ``--task``.

    Raises:
        InputError: there is no such corpus; the message lists those that there are.
    """
    try:
        return CORPORA[name]
    except KeyError:
        raise InputError(f"--task {name!r} is not known; choose one of {', '.join(CORPORA)}") from None
