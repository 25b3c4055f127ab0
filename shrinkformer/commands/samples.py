"""One rule for where commands find data: ``--data_dir``, the hub, and the samples in the package.

Demo models, and ``--bundled_data``, take the samples at once. Others take them only where no folder was named and the
hub cannot be reached, which is said: figures on an excerpt are not those of the whole data set.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from shrinkformer.commands.options import PruneOptions
from shrinkformer.errors import MissingDataError, warn

Options = TypeVar("Options", bound=PruneOptions)
Data = TypeVar("Data")


def read_or_sample(options: Options, read: Callable[[Options], Data], *, demo: bool) -> tuple[Data, bool]:
    """What a command reads, and whether samples may be part of it.

    Args:
        options: Of the command.
        read: Reads with such options; ``bundled_data`` says whether samples may be used.
        demo: Whether the model is one that the package brings for the samples.

    Raises:
        MissingDataError: The data is nowhere.

    Warns:
        ShrinkformerWarning: The hub cannot be reached, and samples are used in its place.
    """
    if options.bundled_data or (demo and options.data_dir is None):
        return read(replace(options, bundled_data=True)), True
    try:
        return read(options), False
    except MissingDataError as error:
        if options.data_dir is not None:
            raise
        found = read(replace(options, bundled_data=True))
        said = str(error)
    warn(f"{said}. Until then the samples in the package are used: figures are those of an excerpt")
    return found, True
