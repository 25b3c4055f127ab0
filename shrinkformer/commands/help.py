"""What ``--help`` and ``--help-all`` print: flags by group, one line for each, those for experts only by name."""

import shutil
import textwrap
from collections.abc import Iterable, Mapping

from shrinkformer.commands.flags import GROUPS, IN_WORDS, Flag

_COLUMN = 26
"""Width of the names of flags."""

_WIDEST = 120


def help_text(prog: str, description: str, flags: Mapping[str, Flag], *, everything: bool = False) -> str:
    """The help of a command.

    Args:
        prog: Its name.
        description: What it does.
        flags: Its flags.
        everything: List flags for experts, too, with all that is to be said of each.
    """
    width = max(60, min(shutil.get_terminal_size().columns, _WIDEST))
    places = [flag for flag in flags.values() if flag.about("positional")]
    usage = " ".join(["usage:", prog, *map(_place, places), "[flags]"])
    lines = [usage, *textwrap.wrap(description, width)]
    for group in GROUPS:
        members = [flag for flag in flags.values() if flag.about("group") == group]
        shown = [flag for flag in members if everything or not flag.about("advanced")]
        lines += ["", group] if everything and shown else [group] * bool(shown)
        for flag in shown:
            lines += _entry(flag, len(kinds_of(flags)), width, everything=everything)
    rest = [f"--{flag.name}" for flag in flags.values() if flag.about("advanced")]
    if rest and not everything:
        lines += [
            "advanced, explained by --help-all",
            *textwrap.wrap(" ".join(rest), width - 2, initial_indent="  ", subsequent_indent="  "),
        ]
    return "\n".join(lines)


def kinds_of(flags: Mapping[str, Flag]) -> set[str]:
    """The kinds of models that some flags hold for."""
    return {kind for flag in flags.values() for kind in flag.entries}


def _place(flag: Flag) -> str:
    name = flag.about("metavar") or flag.name.upper()
    name = f"{name} ..." if flag.about("nargs") else name
    return name if flag.about("positional") is True else f"[{name}]"


def _entry(flag: Flag, kinds: int, width: int, *, everything: bool) -> list[str]:
    """The lines of one flag."""
    if flag.about("positional") is True:
        name = _place(flag)
    else:
        name = ", ".join([*([_place(flag).strip("[]")] if flag.about("positional") else []), *flag.names])
    text = meaning(flag, kinds) if everything else short_meaning(flag, kinds)
    indent = " " * (_COLUMN + 2)
    body = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    if len(name) + 2 >= _COLUMN + 1:
        return [f"  {name}", *body]
    return [f"  {name}".ljust(len(indent)) + body[0].lstrip(), *body[1:]]


def short_meaning(flag: Flag, kinds: int) -> str:
    """One line about a flag, with its default."""
    return f"{_whose(flag, kinds)}{flag.about('help')}{_default_in_words(flag)}"


def meaning(flag: Flag, kinds: int) -> str:
    """All that is to be said of a flag: for which models it holds, what it is, its choices, its default."""
    more = flag.about("more")
    text = flag.about("help") + (f"; {more}" if more else "")
    return f"{_whose(flag, kinds)}{text}{choices_in_words(flag)}{_default_in_words(flag)}"


def _whose(flag: Flag, kinds: int) -> str:
    return f"{IN_WORDS[next(iter(flag.entries))]}: " if len(flag.entries) < kinds else ""


def choices_in_words(flag: Flag) -> str:
    """The values that a flag takes, by kind of model where they differ."""
    by_kind = {kind: ", ".join(map(str, entry.metadata["choices"])) for kind, entry in flag.entries.items()}
    different = dict.fromkeys(by_kind.values())
    if len(different) == 1:
        (one,) = different
        return f": {one}" if one else ""
    return ": " + "; ".join(f"{text} ({IN_WORDS[kind]})" for kind, text in by_kind.items())


def _default_in_words(flag: Flag) -> str:
    text = defaults_of(flag)
    return f" (default: {text})" if text and "(default" not in flag.about("help") else ""


def defaults_of(flag: Flag) -> str:
    """The values that a flag has where it is not given, by kind of model where they differ; "" for nothing."""
    by_kind = {kind: _shown(entry.default) for kind, entry in flag.entries.items()}
    different = dict.fromkeys(by_kind.values())
    if len(different) == 1:
        return next(iter(different))
    (first, text), *others = by_kind.items()
    return "; ".join([text or f"none for {IN_WORDS[first]}", *(f"{IN_WORDS[kind]}: {other}" for kind, other in others)])


def _shown(default: object) -> str:
    if default is None or default is False or default in ("", ()):
        return ""
    items: Iterable[object] = default if isinstance(default, tuple) else (default,)
    return " ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in items)
