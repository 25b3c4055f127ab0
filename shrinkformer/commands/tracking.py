"""Reports to experiment trackers: figures of a run as scalars, for ``--report_to``.

With the writers that transformers' integrations use; none is imported unless it is asked for.
"""

import datetime
import importlib.util
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shrinkformer.errors import InputError, ShrinkformerError
from shrinkformer.utils.installation import how_to_install

if TYPE_CHECKING:
    from shrinkformer.commands.report import (  # takes the seconds that torch takes, and --help lists TRACKERS
        Measured,
        Run,
    )

Writer = Callable[["Run", Path], None]


def scalars(run: "Run") -> dict[str, float]:
    """Every figure of a run: ``dense/accuracy``, ``pruned/macs``, ``ratio/bytes``, ``seconds/total``, ..."""
    found = {
        f"{model}/{name}": value for model, figures in run.models.items() for name, value in _figures(figures).items()
    }
    record = run.to_dict()
    found |= {f"ratio/{name}": value for name, value in record.get("ratio", {}).items() if value is not None}
    return found | {f"seconds/{name}": value for name, value in record["seconds"].items()}


def _figures(figures: "Measured") -> dict[str, float]:
    sizes = {"macs": figures.macs, "parameters": figures.parameters, "bytes": figures.bytes}
    return {**figures.metrics, **sizes, **{f"latency_ms_{shape}": ms for shape, ms in figures.latency_ms.items()}}


def settings(run: "Run") -> dict[str, str | int | float]:
    """What a run was asked for."""
    found: dict[str, str | int | float] = {
        "model_name": run.model_name,
        "task_name": run.task_name,
        "method": run.method,
        "mu": run.mu,
        "seed": run.seed,
        "sample_batch_size": run.sample_batch_size,
    }
    if run.quantization is not None:
        config = run.quantization.config
        found |= {"amount": config.amount, "group_size": config.group_size, "quantizer": config.quantizer}
    return found


def _write_tensorboard(run: "Run", folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(log_dir=str(folder))
    try:
        for name, value in scalars(run).items():
            writer.add_scalar(name, value, 0)
        for name, setting in settings(run).items():
            writer.add_text(name, str(setting), 0)
    finally:
        writer.close()


def _write_wandb(run: "Run", folder: Path) -> None:
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    project = os.environ.get("WANDB_PROJECT", "shrinkformer")
    opened = wandb.init(project=project, name=folder.name, dir=str(folder), config=settings(run))
    try:
        opened.log(scalars(run))
    finally:
        opened.finish()


_WRITERS: Mapping[str, Writer] = {"tensorboard": _write_tensorboard, "wandb": _write_wandb}

TRACKERS = tuple(_WRITERS)


def require_trackers(names: Collection[str]) -> None:
    """Check that trackers are known and installed.

    Raises:
        InputError: One is not.
    """
    for name in names:
        if name not in _WRITERS:
            raise InputError(f"--report_to {name!r}: choose among {', '.join(TRACKERS)}.")
        if importlib.util.find_spec(name) is None:
            raise InputError(f"--report_to {name}: it is not installed; {how_to_install(name)}.")


def track(run: "Run", names: Collection[str], folder: Path) -> None:
    """Send the figures of a run to trackers.

    Args:
        run: With all figures.
        names: Of the trackers.
        folder: For what they write; its name and the time are the name of the run.

    Raises:
        ShrinkformerError: A tracker fails.
    """
    folder = folder.with_name(f"{folder.name}-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}")
    for name in names:
        try:
            _WRITERS[name](run, folder)
        except Exception as error:  # whatever a tracker raises, the run is on disk already
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ShrinkformerError(f"--report_to {name}: {said}") from error
