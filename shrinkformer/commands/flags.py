"""Command-line flags from option classes: every field of a frozen dataclass is a flag.

This module, and every module with option classes, imports nothing heavy: ``--help`` and wrong flags end at once.

To add a flag, add a field with :func:`option` to the class of the models it holds for. Parser, help,
``docs/commands.md`` and the error for other models follow from it.
"""

import argparse
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from shrinkformer.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

GROUPS = ("model", "data", "budget", "method", "output")
"""Headings of ``--help``, in this order."""

ENCODER, DECODER = "encoder", "decoder"

IN_WORDS = {ENCODER: "encoders", DECODER: "language models"}
"""The kinds of models that have flags of their own."""


def option(
    default: Any,
    help_text: str,
    *,
    group: str = "model",
    more: str = "",
    advanced: bool = False,
    choices: Sequence[Any] = (),
    **argument: Any,
) -> Any:
    """A dataclass field that is also a command-line flag of the same name.

    Args:
        default: Its value where the flag is not given; for a switch False.
        help_text: What it is, in one line of ``--help``.
        group: Heading under which it stands, one of :data:`GROUPS`.
        more: What else is to be said of it, in ``--help-all`` and the documents.
        advanced: Whether ``--help`` only names it.
        choices: All values that it takes, checked by :func:`check_values`.
        **argument: ``nargs`` as of argparse; ``positional``: True where it has no flag, "too" where it has one as
            well, with ``metavar``; ``aliases``: other names of the flag; ``type``: a function that reads a value;
            ``distinct``: whether a value that is given twice counts once; ``check``: a function that raises
            :class:`InputError` for a wrong value.
    """
    assert group in GROUPS, group
    about = {"help": help_text, "more": more, "group": group, "advanced": advanced, "choices": tuple(choices)}
    return field(default=default, metadata={**about, **argument})


def changed(base: "type[DataclassInstance]", name: str, default: Any, **changes: Any) -> Any:
    """The flag of a base class with another default, and perhaps other ``choices`` or words."""
    (entry,) = (entry for entry in fields(base) if entry.name == name)
    return field(default=default, metadata={**entry.metadata, **changes})


def check_values(options: "DataclassInstance") -> None:
    """Check the values of flags, each alone, by their ``choices`` and ``check``.

    Raises:
        InputError: One of them is wrong.
    """
    for entry in fields(options):
        _check(entry, getattr(options, entry.name), entry.name)


def _check(entry: "Field[Any]", value: Any, name: str) -> None:
    choices, check = entry.metadata["choices"], entry.metadata.get("check")
    for one in value if isinstance(value, tuple) else (value,):
        if check is not None:
            check(one)
        if choices and one is not None and one != entry.default and one not in choices:
            which = "choose among" if isinstance(value, tuple) else "choose one of"
            raise InputError(f"--{name} {one!r}: {which} {', '.join(map(str, choices))}.")


@dataclass(frozen=True)
class Flag:
    """A flag of a command.

    Attributes:
        name: Of the field.
        entries: The field in the option class of every kind of model that the flag holds for.
        written: The name that messages use.
    """

    name: str
    entries: "Mapping[str, Field[Any]]"
    written: str

    @property
    def entry(self) -> "Field[Any]":
        """The field, for what is the same for all kinds."""
        return next(iter(self.entries.values()))

    @property
    def names(self) -> list[str]:
        """As it is written, with the other names that it has."""
        return [f"--{name}" for name in (self.name, *self.about("aliases", ()))]

    def about(self, key: str, default: Any = None) -> Any:
        """Something that :func:`option` was told."""
        return self.entry.metadata.get(key, default)

    @property
    def is_switch(self) -> bool:
        """Whether it takes no value."""
        return self.entry.type is bool

    def read(self, kind: str, given: Any) -> Any:
        """The value that a text, or several of them, means for a kind of model.

        Raises:
            InputError: It means none.
        """
        entry = self.entries[kind]
        if self.is_switch:
            return given
        read = entry.metadata.get("type") or _READERS[str(entry.type)]
        if not isinstance(given, list):
            value = _read(self.written, read, given)
        else:
            value = tuple(_read(self.written, read, text, several=True) for text in given)
            value = tuple(dict.fromkeys(value)) if entry.metadata.get("distinct") else value
        _check(entry, value, self.written)
        return value


def flags_of(classes: "Mapping[str, type[DataclassInstance]]", only: Iterable[str] | None = None) -> dict[str, Flag]:
    """The flags of a command by name.

    Args:
        classes: Its option classes by kind of model.
        only: The fields that are flags of this command; all by default.
    """
    chosen = None if only is None else set(only)
    found: dict[str, dict[str, Field[Any]]] = {}
    for kind, options in classes.items():
        for entry in fields(options):
            if entry.metadata and (chosen is None or entry.name in chosen):
                found.setdefault(entry.name, {})[kind] = entry
    return {name: Flag(name, entries, name) for name, entries in found.items()}


def as_written(flags: Mapping[str, Flag], arguments: Sequence[str]) -> dict[str, Flag]:
    """The same flags, called in messages by those of their names that a command line uses."""
    given = {word.partition("=")[0] for word in arguments}

    def name_of(flag: Flag) -> str:
        return next((name for name in flag.names if name in given), flag.names[0]).removeprefix("--")

    return {name: replace(flag, written=name_of(flag)) for name, flag in flags.items()}


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """What is wrong, as an :class:`InputError`."""
        raise InputError(message.removeprefix("argument ") + f" (see {self.prog} --help)")


def parse_flags(flags: Mapping[str, Flag], arguments: Sequence[str], prog: str) -> dict[str, Any]:
    """The flags that a command line gives, as texts.

    Raises:
        InputError: One is not known, or has no value.
    """
    parser = OneLineParser(prog=prog, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for flag in flags.values():
        _add_flag(parser, flag)
    found, unknown = parser.parse_known_intermixed_args(list(arguments))
    if unknown:
        raise InputError(_unknown(unknown, flags, prog))
    given = vars(found)
    for flag in flags.values():
        place = given.pop(_place(flag.name), None)
        if place is not None and flag.name in given:
            what = flag.about("metavar").lower()
            raise InputError(f"{place} and --{flag.name} {given[flag.name]} both name the {what}; leave one out.")
        if place is not None:
            given[flag.name] = place
    return given


def _add_flag(parser: argparse.ArgumentParser, flag: Flag) -> None:
    extra = {key: flag.about(key) for key in ("nargs", "metavar") if flag.about(key)}
    if flag.is_switch:
        parser.add_argument(*flag.names, dest=flag.name, action="store_true")
    elif flag.about("positional") is True:
        parser.add_argument(flag.name, **extra)
    else:
        parser.add_argument(*flag.names, dest=flag.name, nargs=flag.about("nargs"))
        if flag.about("positional"):
            parser.add_argument(_place(flag.name), nargs="?")


def _place(name: str) -> str:
    return f"{name} without its flag"


def _unknown(unknown: Sequence[str], flags: Mapping[str, Flag], prog: str) -> str:
    """What is said about arguments that mean nothing, with the flag that was meant."""
    first = next((word for word in unknown if word.startswith("-")), unknown[0])
    known = [name for flag in flags.values() if flag.about("positional") is not True for name in flag.names]
    name = first.partition("=")[0]
    close = difflib.get_close_matches(name.replace("-", "_").replace("__", "--", 1), known, n=1, cutoff=0.7)
    if not first.startswith("-"):
        return f"{first!r}: it belongs to no flag; see {prog} --help."
    meant = f"did you mean {close[0]}?" if close else f"{prog} --help-all lists those that there are."
    return f"{name}: there is no such flag; {meant}"


def build_options(
    classes: "Mapping[str, type[DataclassInstance]]",
    flags: Mapping[str, Flag],
    given: Mapping[str, Any],
    kind_of: Callable[[Mapping[str, Any]], str],
    **fixed: Any,
) -> Any:
    """An option class from the flags of a command line; its other fields have their defaults.

    Args:
        classes: Option classes by kind of model.
        flags: Of the command.
        given: From :func:`parse_flags`.
        kind_of: Finds the kind of model that flags mean; called once all that can be checked without it is.
        **fixed: Values of fields that are no flags of this command.

    Raises:
        InputError: A value cannot be read, a flag does not hold for the kind of model, or does not go with another one.
    """
    for name, value in given.items():
        _read_for_any(flags[name], value)
    kind = next(iter(classes)) if len(classes) == 1 else kind_of(given)
    for name in given:
        if kind not in flags[name].entries:
            (other,) = flags[name].entries
            raise InputError(
                f"--{name}: it is for {IN_WORDS[other]}, and the model is one of the {IN_WORDS[kind]}; leave it out."
            )
    values = {name: flags[name].read(kind, value) for name, value in given.items()}
    _require_compatible(classes[kind], values)
    return classes[kind](**values, **fixed)


def _read_for_any(flag: Flag, value: Any) -> None:
    """Check that a value means something for some kind of model, before the kind is known."""
    said = []
    for kind in flag.entries:
        try:
            flag.read(kind, value)
        except InputError as error:
            said.append(str(error))
    if len(said) < len(flag.entries):
        return
    choices = {kind: ", ".join(map(str, entry.metadata["choices"])) for kind, entry in flag.entries.items()}
    if len(set(choices.values())) == 1:
        raise InputError(said[0])
    lists = "; ".join(f"for {IN_WORDS[kind]} {text}" for kind, text in choices.items())
    raise InputError(f"--{flag.written} {value!r}: choose one; {lists}.")


def _require_compatible(options: type, values: Mapping[str, Any]) -> None:
    """Check that of flags which exclude each other only some were given, be it with their default values."""
    for name, others in getattr(options, "excludes", {}).items():
        for other, reason in others.items():
            if {name, other} <= values.keys():
                raise InputError(f"--{name} {values[name]} {reason}; leave --{other} out, or --{name}.")


def _read(name: str, read: Callable[[str], Any], text: str, *, several: bool = False) -> Any:
    try:
        return read(text)
    except ValueError as error:
        wanted = {int: "a whole number", float: "a number"}.get(read, str(error))  # type: ignore[call-overload]
        hint = "; a model that has no flag goes before the flags" if several else ""
        raise InputError(f"--{name} {text!r}: give {wanted}{hint}.") from None


_READERS: dict[str, Callable[[str], Any]] = {
    str(str): str,
    str(str | None): str,
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
