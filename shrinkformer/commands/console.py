"""Exit codes and progress of every command."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence

from tqdm import tqdm

from shrinkformer.architectures import LayerView
from shrinkformer.errors import InputError, ShrinkformerError

_WRONG_INPUT = 2

Main = Callable[[Sequence[str] | None], None]


def run_command(main: Main, arguments: Sequence[str] | None, prog: str) -> int:
    """Run a command; errors become one line on standard error.

    Returns:
        0, or 2 when something the user passed is wrong, or 1 when something failed later.
    """
    quiet_libraries()
    try:
        main(arguments)
    except InputError as error:
        return _fail(prog, error, _WRONG_INPUT)
    except ShrinkformerError as error:
        return _fail(prog, error, 1)
    except OSError as error:  # a full disk, a folder that vanished
        return _fail(prog, error, 1)
    except KeyboardInterrupt:
        return _fail(prog, "interrupted; what was written so far stays.", 130)
    return 0


def _fail(prog: str, error: object, code: int) -> int:
    message = " ".join(str(error).split())
    if code != _WRONG_INPUT or os.environ.get("RANK", "0") == "0":  # all processes of torchrun got the same input
        print(f"{prog}: error: {message}", file=sys.stderr)
    return code


def quiet_libraries() -> None:
    """Leave standard error to our own progress bars and messages."""
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="huggingface_hub")


def block_progress(description: str) -> Callable[[Iterable[LayerView]], Iterable[LayerView]]:
    """A progress bar over blocks with the time left, shown on a terminal only."""

    def wrap(views: Iterable[LayerView]) -> Iterable[LayerView]:
        bar: Iterable[LayerView] = tqdm(list(views), desc=description, unit="block", disable=None)
        return bar

    return wrap


def say(message: str) -> None:
    """One line about what happens now."""
    print(message, flush=True)
