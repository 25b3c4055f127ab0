"""Write the tables of flags in commands.md from the option classes; a test holds both equal.

python docs/flags.py
"""

from collections.abc import Iterable
from pathlib import Path

from shrinkformer.commands.flags import DECODER, ENCODER, GROUPS, IN_WORDS, Flag, flags_of
from shrinkformer.commands.help import choices_in_words, defaults_of
from shrinkformer.commands.verbs import COMMANDS

PAGE = Path(__file__).with_name("commands.md")

_BEGIN, _END = "<!-- flags, written by docs/flags.py -->", "<!-- end of flags -->"

_KINDS = {ENCODER, DECODER}


def tables() -> str:
    """All flags as Markdown: those of pruning by group, what quantizing has beside them, the other commands."""
    prune, quantize = flags_of_command("prune"), flags_of_command("quantize")
    parts = ["### `shrinkformer prune`"]
    parts += [f"**{group}**\n\n{_table(_in(group, prune.values()))}" for group in GROUPS]
    more = [flag for name, flag in quantize.items() if name not in prune or _row(flag) != _row(prune[name])]
    parts.append(f"### `shrinkformer quantize`: those above, and\n\n{_table(more)}")
    evaluation = ", ".join(f"`--{name}`" for name in flags_of_command("evaluate"))
    parts.append(f"### `shrinkformer evaluate`\n\nOf those of `prune`: {evaluation}.")
    for name in ("inspect", "latency", "export", "push"):
        parts.append(f"### `shrinkformer {name}`\n\n{_table(flags_of_command(name).values())}")
    return "\n\n".join(parts)


def flags_of_command(name: str) -> dict[str, Flag]:
    """The flags of a command by name."""
    return flags_of(COMMANDS[name].classes, COMMANDS[name].only)


def page(text: str) -> str:
    """The page with the tables of now."""
    before, rest = text.split(_BEGIN)
    _, after = rest.split(_END)
    return f"{before}{_BEGIN}\n\n{tables()}\n\n{_END}{after}"


def _in(group: str, flags: Iterable[Flag]) -> list[Flag]:
    return [flag for flag in flags if flag.about("group") == group]


def _row(flag: Flag) -> str:
    place = [flag.about("metavar")] if flag.about("positional") else []
    names = place if flag.about("positional") is True else [*place, *flag.names]
    more = flag.about("more")
    missing = _KINDS - flag.entries.keys() if flag.entries.keys() <= _KINDS else set()
    only = f"{IN_WORDS[next(iter(flag.entries))]}: " if missing else ""
    text = only + flag.about("help") + (f"; {more}" if more else "") + choices_in_words(flag)
    return f"| {', '.join(f'`{name}`' for name in names)} | {defaults_of(flag)} | {text} |"


def _table(flags: Iterable[Flag]) -> str:
    return "\n".join(["| flag | default | |", "|---|---|---|", *map(_row, flags)])


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
