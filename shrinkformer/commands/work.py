"""What ``shrinkformer prune``, ``quantize`` and ``evaluate`` do, by the kind of model that options are for."""

from collections.abc import Callable
from typing import Any

from shrinkformer.commands.options import EncoderOptions, PruneOptions
from shrinkformer.commands.quantize_options import QuantizeOptions
from shrinkformer.commands.session import Job


def prune(options: PruneOptions) -> None:
    """Read, prune, save and measure; at ``--mu 1`` a model is measured and nothing else."""
    from shrinkformer.commands.pruning import run_pruning

    _run_on(options, run_pruning)


def quantize(options: QuantizeOptions) -> None:
    """Read, prune if asked to, quantize, save and measure."""
    if options.target_ratio is None:
        from shrinkformer.commands.quantizing import run_quantizing as run
    else:
        from shrinkformer.commands.target_ratio import run_target_ratio as run

    _run_on(options, run)


def _run_on(options: Any, run: Callable[[Job, Any, dict[str, float]], None]) -> None:
    if isinstance(options, EncoderOptions):
        from shrinkformer.commands.prune_bert import run_encoder

        run_encoder(options, run)
    else:
        from shrinkformer.commands.prune_opt import run_decoder

        run_decoder(options, run)
