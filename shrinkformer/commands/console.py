"""Exit codes and progress of every command."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from tqdm import tqdm

from shrinkformer.errors import InputError, ShrinkformerError, ShrinkformerWarning
from shrinkformer.trust.foreign import printable, reason_of
from shrinkformer.utils.progress import each

if TYPE_CHECKING:
    from shrinkformer.architectures import LayerView

_WRONG_INPUT = 2

_UNREAD = 141
"""What a shell tells of a program that ended because nobody reads its output: 128 and SIGPIPE."""

DEBUG = "SHRINKFORMER_DEBUG"
"""Environment variable: show the traceback of an error that nobody foresaw."""

UNFORESEEN = "unforeseen"

Main = Callable[[Sequence[str] | None], None]


def run_command(main: Main, arguments: Sequence[str] | None, prog: str) -> int:
    """Run a command; errors become one line on standard error.

    Returns:
        0, or 2 when something the user passed is wrong, 1 when something failed later, 130 when it was interrupted,
        141 when nobody reads what it prints.
    """
    try:
        with warnings_in_one_line(prog):
            main(arguments)
    except ShrinkformerError as error:
        return _fail(prog, error, _WRONG_INPUT if isinstance(error, InputError) else 1)
    except BrokenPipeError:  # whoever read our lines has gone, as `head` does: end without a word, as other programs do
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _UNREAD
    except (OSError, SafetensorError) as error:  # a full disk, a folder that vanished
        return _fail(prog, error, 1)
    except KeyboardInterrupt:
        return _fail(
            prog, "interrupted; what was written so far stays; prune and quantize take it up with --resume.", 130
        )
    except Exception as error:
        return _fail(prog, _unforeseen(error), 1)
    return 0


def _unforeseen(error: Exception) -> str:
    """What is said about an error without a message of ours; its traceback only to those who ask for it."""
    from shrinkformer.utils.memory import REMEDIES, is_out_of_memory

    if is_out_of_memory(error):
        return f"out of memory ({reason_of(error)}); {REMEDIES}."
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"{UNFORESEEN} {type(error).__name__} ({reason_of(error)}) at {Path(last.filename).name}:{last.lineno}; set "
        f"{DEBUG}=1 for the traceback and report it, please."
    )


def _fail(prog: str, error: object, code: int) -> int:
    message = printable(str(error))
    if code != _WRONG_INPUT or os.environ.get("RANK", "0") == "0":  # all processes of torchrun got the same input
        print(f"{prog}: error: {message}", file=sys.stderr)
    return code


@contextmanager
def warnings_in_one_line(prog: str) -> Iterator[None]:
    """Show our own warnings on standard error, each of them once, however many budgets it is true for."""
    shown = set[str]()
    with warnings.catch_warnings():
        warnings.simplefilter("always", ShrinkformerWarning)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, ShrinkformerWarning):
                others(message, category, *where, **more)
                return
            line = " ".join(str(message).split())
            if line not in shown and os.environ.get("RANK", "0") == "0":
                tqdm.write(f"{prog}: warning: {line}", file=sys.stderr)
            shown.add(line)

        warnings.showwarning = show
        yield


def quiet_libraries() -> None:
    """Leave standard error to our own progress bars and messages."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if "datasets" in sys.modules:
        import datasets

        datasets.utils.logging.set_verbosity_error()
        datasets.disable_progress_bars()
    else:  # it takes a second to import, and reads these when somebody does
        os.environ.setdefault("DATASETS_VERBOSITY", "error")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="huggingface_hub")


def block_progress(description: str) -> "Callable[[Iterable[LayerView]], Iterable[LayerView]]":
    """Shows how many blocks are done: a bar with the time left on a terminal, else lines."""

    def wrap(views: "Iterable[LayerView]") -> "Iterable[LayerView]":
        return each(list(views), description, "block")

    return wrap


def say(message: str) -> None:
    """One line about what happens now."""
    print(message, flush=True)
