"""``opt_eval.py``: perplexity of a language model, dense or pruned, on every corpus."""

from collections.abc import Sequence
from dataclasses import fields

from shrinkformer.commands.console import run_command
from shrinkformer.commands.flags import parse_options
from shrinkformer.commands.options import DecoderOptions, EvaluationOptions
from shrinkformer.commands.prune_opt import run_decoder

PROG = "opt_eval.py"

_SHARED = (
    "data_dir",
    "bundled_data",
    "batch_size",
    "output_dir",
    "device",
    "max_memory",
    "offload_dir",
    "dry_run",
    "report_to",
)


def evaluate_command(arguments: Sequence[str] | None) -> None:
    """Everything that ``opt_eval.py`` does: what ``prune_opt.py --mu 1`` does."""
    options = parse_options(
        DecoderOptions,
        arguments,
        prog=PROG,
        description="Perplexity of a language model, dense or pruned, on every corpus.",
        only=[entry.name for entry in fields(EvaluationOptions)] + list(_SHARED),
        mu=(1.0,),
    )
    run_decoder(options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``opt_eval.py``."""
    return run_command(evaluate_command, arguments, PROG)
