"""``quantize_opt.py``: quantize a language model, alone or after pruning it, evaluate and save it."""

from collections.abc import Sequence

from shrinkformer.commands.console import run_command
from shrinkformer.commands.flags import parse_options
from shrinkformer.commands.prune_opt import run_decoder
from shrinkformer.commands.quantize_options import DecoderQuantizeOptions
from shrinkformer.commands.quantizing import run_quantizing
from shrinkformer.commands.target_ratio import run_target_ratio

PROG = "quantize_opt.py"


def quantize_command(arguments: Sequence[str] | None) -> None:
    """Everything that ``quantize_opt.py`` does."""
    options = parse_options(
        DecoderQuantizeOptions,
        arguments,
        prog=PROG,
        description="Quantize a language model, alone or after pruning it, evaluate and save it.",
    )
    run_decoder(options, run_quantizing if options.target_ratio is None else run_target_ratio)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``quantize_opt.py``."""
    return run_command(quantize_command, arguments, PROG)
