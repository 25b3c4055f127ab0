"""Command-line flags from option classes: every field is a flag."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from shrinkformer.commands.options import PruneOptions
from shrinkformer.errors import InputError

Options = TypeVar("Options", bound=PruneOptions)


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """What is wrong, as an :class:`InputError`."""
        raise InputError(message.removeprefix("argument ") + f" (see {self.prog} --help)")


def parse_options(
    kind: type[Options],
    arguments: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    only: Iterable[str] | None = None,
    **fixed: Any,
) -> Options:
    """Options from command-line arguments.

    Args:
        kind: Which options.
        arguments: Of the command line; the process's own by default.
        prog: Name of the command.
        description: What it does, for ``--help``.
        only: The fields that are flags of this command; all by default.
        **fixed: Values of fields that are no flags.

    Raises:
        InputError: An argument is not known or has a wrong value.
    """
    parser = OneLineParser(prog=prog, description=description, allow_abbrev=False)
    for entry in fields(kind):
        if only is None or entry.name in only:
            _add_flag(parser, entry)
    values = vars(parser.parse_args(arguments)) | fixed
    _require_compatible(kind, values, arguments)
    for name in ("mu", "lm_eval", "format"):
        if name in values:
            values[name] = tuple(dict.fromkeys(values[name]))
    return kind(**values)


def _require_compatible(kind: type[PruneOptions], values: dict[str, Any], arguments: Sequence[str] | None) -> None:
    """Check that of flags which exclude each other only some were given, be it with their default values."""
    given = {argument.partition("=")[0] for argument in (sys.argv[1:] if arguments is None else arguments)}
    for name, others in kind.excludes.items():
        for other, reason in others.items():
            if {f"--{name}", f"--{other}"} <= given:
                raise InputError(f"--{name} {values[name]} {reason}; leave --{other} out, or --{name}.")


def _add_flag(parser: argparse.ArgumentParser, entry: "Field[Any]") -> None:
    extra = dict(entry.metadata)
    help_text = extra.pop("help")
    assert entry.default is not MISSING
    if entry.type is bool:
        parser.add_argument(f"--{entry.name}", action="store_true", help=help_text)
        return
    shown = " ".join(map(str, entry.default)) if isinstance(entry.default, tuple) else entry.default
    if "default:" not in help_text and entry.default is not None:
        help_text += f" (default: {shown})"
    parser.add_argument(
        f"--{entry.name}", type=_VALUE_TYPES[str(entry.type)], default=entry.default, help=help_text, **extra
    )


_VALUE_TYPES: dict[str, Any] = {
    str(str): str,
    str(int): int,
    str(int | None): int,
    str(tuple[str, ...]): str,
    str(tuple[float, ...]): float,
    str(tuple[int, ...]): int,
    str(float): float,
    str(float | None): float,
    str(Path): Path,
    str(Path | None): Path,
}
