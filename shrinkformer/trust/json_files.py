"""JSON files of others: of a sane size and depth, and text at all, before anything is built from them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shrinkformer.errors import CheckpointError
from shrinkformer.trust.foreign import reason_of

LONGEST = 16 * 2**20
"""Bytes of a configuration; those of the largest models have some ten thousand."""

DEEPEST = 32
"""Objects and lists within each other; real ones have 3 to 6, and copying deeper ones would exhaust Python's stack."""


def read_json(file: Path, *, longest: int = LONGEST, deepest: int | None = DEEPEST) -> Any:
    """What a JSON file of a checkpoint holds.

    Args:
        file: The file.
        longest: Bytes that it may have.
        deepest: Levels of nesting that it may have; None for any that Python reads.

    Raises:
        CheckpointError: It is missing, too large or too deep, or no JSON.
    """
    return parse_json(_read(file, longest), str(file), deepest=deepest)


def read_object(file: Path, *, longest: int = LONGEST, deepest: int | None = DEEPEST) -> dict[str, Any]:
    """The same of a file that must hold an object.

    Raises:
        CheckpointError: As for :func:`read_json`, or it holds something else.
    """
    content = read_json(file, longest=longest, deepest=deepest)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds {_kind(content)}, not an object {{...}}; download the file again.")
    return content


def parse_json(text: bytes, where: str, *, deepest: int | None = DEEPEST, unique: bool = False) -> Any:
    """JSON from bytes of a file.

    Args:
        text: In UTF-8.
        where: The file, for messages.
        deepest: Levels of nesting that it may have; None for any that Python reads.
        unique: Whether an object may name a key only once.

    Raises:
        CheckpointError: It is no JSON, or too deep.
    """
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_once if unique else None)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} is not UTF-8 text (byte {error.start}); download the file again.") from None
    except RecursionError:
        raise CheckpointError(f"{where} is nested too deeply to be read; do not use this file.") from None
    except (ValueError, MemoryError) as error:
        raise CheckpointError(
            f"{where} cannot be read as JSON ({reason_of(error)}); download the file again."
        ) from None
    if deepest is not None and _is_deeper(content, deepest):
        raise CheckpointError(f"{where} is nested more than {deepest} levels deep; do not use this file.")
    return content


def _read(file: Path, longest: int) -> bytes:
    try:
        size = file.stat().st_size
        if not file.is_file():
            raise CheckpointError(f"{file} is no ordinary file; put the file itself there.")
        if size > longest:
            raise CheckpointError(f"{file} has {size:,} bytes, more than the {longest:,} that are read; it is damaged.")
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); download it again.") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key is there twice")
    return content


def _is_deeper(content: Any, most: int) -> bool:
    """Whether there are more levels than that, without recursion."""
    level: list[Any] = [content]
    for _ in range(most):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return False
    return True


def _inside(content: Any) -> Iterable[Any]:
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return (value for value in values if isinstance(value, dict | list))


def _kind(content: Any) -> str:
    names = {list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(content), "a number")
