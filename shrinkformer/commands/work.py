"""What ``shrinkformer prune``, ``quantize`` and ``evaluate`` do, by the kind of model that options are for."""

from collections.abc import Callable
from typing import Any

from shrinkformer.commands import prune_bert, prune_opt
from shrinkformer.commands.options import EncoderOptions, PruneOptions, resolve_device
from shrinkformer.commands.quantize_options import QuantizeOptions
from shrinkformer.commands.session import Job
from shrinkformer.prune.result import timed
from shrinkformer.utils.parallel import local_device, workers_of


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
    """Read the model and its examples, then run."""
    read: Callable[..., Job] = prune_bert.read_job if isinstance(options, EncoderOptions) else prune_opt.read_job
    device = resolve_device(options.device)
    with workers_of(device) as workers:
        seconds: dict[str, float] = {}
        with timed(seconds, "loading"):
            job = read(options, local_device(device), workers)
        run(job, options, seconds)
