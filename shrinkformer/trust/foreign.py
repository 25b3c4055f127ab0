"""Errors of other libraries, and texts out of files of others, as one line of ours."""

from collections.abc import Iterator
from contextlib import contextmanager

from shrinkformer.errors import ShrinkformerError

_LONGEST = 200

_PANIC = "PanicException"
"""Libraries written in Rust raise this; it is no ``Exception``, and its class has no module to import it from."""


@contextmanager
def foreign_errors(kind: type[ShrinkformerError], where: str, remedy: str) -> Iterator[None]:
    """Turn whatever a library raises about a file into one error of ours; ours pass as they are.

    Args:
        kind: The error.
        where: What cannot be read, with the file.
        remedy: What the user can do.

    Raises:
        ShrinkformerError: Of that kind; the library's own error is its cause.
    """
    try:
        yield
    except ShrinkformerError:
        raise
    except Exception as error:  # a file of somebody else: every type of error is possible
        raise kind(f"{where} ({reason_of(error)}); {remedy}") from error
    except BaseException as error:
        if type(error).__name__ != _PANIC:
            raise
        raise kind(f"{where} ({reason_of(error)}); {remedy}") from error


def reason_of(error: BaseException) -> str:
    """The first line of what an error says, and its type where it says next to nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if isinstance(error, KeyError | IndexError | TypeError | AttributeError | MemoryError) or len(said) < 5:
        said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return shortened(said)


def shortened(text: str) -> str:
    """A text of others that fits into a message."""
    plain = printable(text)
    return plain if len(plain) <= _LONGEST else f"{plain[: _LONGEST - 3]}..."


def printable(text: str) -> str:
    r"""A text without control characters, which could rule a terminal, and without halves of characters.

    >>> printable("two\nlines \x1b[2J, \ud800")
    'two lines \\x1b[2J, \\ud800'
    """
    words = " ".join(text.split())
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in words)
