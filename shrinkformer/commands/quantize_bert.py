"""``quantize_bert.py``: quantize an encoder, alone or after pruning it, evaluate and save it."""

from collections.abc import Sequence

from shrinkformer.commands.console import run_command
from shrinkformer.commands.flags import parse_options
from shrinkformer.commands.prune_bert import run_encoder
from shrinkformer.commands.quantize_options import EncoderQuantizeOptions
from shrinkformer.commands.quantizing import run_quantizing
from shrinkformer.commands.target_ratio import run_target_ratio

PROG = "quantize_bert.py"


def quantize_command(arguments: Sequence[str] | None) -> None:
    """Everything that ``quantize_bert.py`` does."""
    options = parse_options(
        EncoderQuantizeOptions,
        arguments,
        prog=PROG,
        description="Quantize an encoder, alone or after pruning it, evaluate and save it.",
    )
    run_encoder(options, run_quantizing if options.target_ratio is None else run_target_ratio)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``quantize_bert.py``."""
    return run_command(quantize_command, arguments, PROG)
