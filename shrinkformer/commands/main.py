"""``shrinkformer``: all commands under one name, and the names that scripts had before."""

import difflib
import sys
from collections.abc import Sequence
from functools import partial

from shrinkformer import __version__
from shrinkformer.commands.verbs import COMMANDS, run_script, run_verb

_WRONG_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``shrinkformer`` and of ``python -m shrinkformer``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name, rest = (given[0], given[1:]) if given else ("--help", [])
    if name in {"-h", "--help", "--help-all"}:
        print(usage(), flush=True)
        return 0
    if name == "--version":
        print(f"shrinkformer {__version__}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(COMMANDS)}."
        print(f"shrinkformer: error: {name!r} is no command; {meant}", file=sys.stderr)
        return _WRONG_INPUT
    return run_verb(name, rest)


def usage() -> str:
    """What ``--help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: shrinkformer COMMAND [flags]", "", *lines, "", "shrinkformer COMMAND --help lists the flags of one."]
    )


prune_bert, prune_opt = partial(run_script, "prune_bert.py"), partial(run_script, "prune_opt.py")
quantize_bert, quantize_opt = partial(run_script, "quantize_bert.py"), partial(run_script, "quantize_opt.py")
opt_eval = partial(run_script, "opt_eval.py")
