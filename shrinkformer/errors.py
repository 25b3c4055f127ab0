"""The errors this package raises on purpose, and its warnings.

Every message says what is wrong, where (flag, file or layer), the value, and what to do about it, in one line.
Commands turn :class:`InputError` into exit code 2 and every other :class:`ShrinkformerError` into exit code 1.
"""

import sys
import warnings
from types import FrameType


class ShrinkformerError(Exception):
    """Base class of everything that this package raises on purpose."""


class InputError(ShrinkformerError, ValueError):
    """Something the user passed is wrong: a flag, a file, a folder. Found before any model is loaded."""


class DataError(InputError):
    """A data set or a file with examples is missing or does not have the columns that a task needs."""


class MissingDataError(DataError):
    """A data set is neither in a folder that was named nor can it be had from the hub."""


class CheckpointError(ShrinkformerError):
    """A folder is not a checkpoint that can be read, or it does not fit the task."""


class HubError(ShrinkformerError):
    """The Hugging Face hub cannot be reached or refuses."""


class UnsupportedModelError(ShrinkformerError):
    """No architecture record fits the model."""


class BudgetError(ShrinkformerError):
    """No model of this architecture can meet the requested budget."""


class NumericalError(ShrinkformerError):
    """Weights, activations or a factorisation are not usable: NaN, infinity, an overflow, or no rank at all."""


class OutOfMemoryError(ShrinkformerError):
    """There is not enough memory even for one example at a time."""


class ShrinkformerWarning(UserWarning):
    """Something that the user should know about a result that is defined all the same; commands show it as one line."""


def warn(message: str) -> None:
    """Warn, with the line that called this package as its place: the one that can be changed.

    Warns:
        ShrinkformerWarning: Always.
    """
    frame: FrameType | None = sys._getframe(1)
    level = outside = 1
    while frame is not None:
        level += 1
        if str(frame.f_globals.get("__name__")).partition(".")[0] == __package__:
            outside = level + 1
        frame = frame.f_back
    warnings.warn(message, ShrinkformerWarning, stacklevel=outside)
