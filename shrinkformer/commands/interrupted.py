"""What an interrupted run of a command left, and who may write now."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path

from shrinkformer.commands.options import PruneOptions
from shrinkformer.commands.session import Job, Session
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.checkpoint import may_be_replaced
from shrinkformer.prune.ledger import Ledger, code_identity
from shrinkformer.prune.resume import examples_digest, fingerprint
from shrinkformer.utils.locks import exclusive

_PLACES = ("model_name", "data_dir", "bundled_data", "calibration_file", "output_dir", "save_dir", "offload_dir")
_DOINGS = ("mu", "max_memory", "device", "dry_run", "resume", "push_to_hub", "private", "report_to")
_WITHOUT_EFFECT = frozenset(_PLACES + _DOINGS)
"""Flags that no result depends on, or that are known better: weights and examples by digests, budgets one by one."""


@contextmanager
def alone(job: Job, options: PruneOptions) -> Iterator[None]:
    """Let no other run write the same reports, or the same data of interrupted runs.

    Raises:
        InputError: Another one does.
    """
    if not job.workers.is_main:
        yield
        return
    ledger, data = _folders(job, options)
    report = options.output_dir / job.stem
    locks = dict.fromkeys((report, ledger), f"--output_dir {options.output_dir}")
    if data is not None:
        locks[data] = f"--offload_dir {options.offload_dir}"
    with ExitStack() as stack:
        for path, flag in locks.items():
            stack.enter_context(exclusive(path.with_name(f".{path.name}.lock"), flag))
        yield


def _folders(job: Job, options: PruneOptions) -> tuple[Path, Path | None]:
    """Where what is finished is kept: beside the checkpoints; weights and moments in the folder for large data."""
    target = options.output_dir / job.folder
    name = f"{target.name}.resume"
    return target.with_name(name), None if options.offload_dir is None else options.offload_dir / name


def open_ledger(session: Session) -> None:
    """Take up what an interrupted run left if that is asked for, and keep what is found from now on.

    Raises:
        InputError: It was another run.
    """
    job, options = session.job, session.options
    folder, data = _folders(job, options)
    left = folder / "blocks" if data is None else data
    if not options.resume and left.exists():
        job.say(f"starting anew; --resume would take up what an interrupted run left in {left}")
    found = _identity(session)
    ledger = None
    if job.workers.is_main:
        ledger = Ledger(folder, found, data=data, resume=options.resume)
    job.workers.barrier()
    if ledger is None:  # reads what is there before the main one goes on
        ledger = Ledger(folder, found, data=data, resume=True, writes=False)
    job.workers.barrier()
    session.resources = replace(session.resources, ledger=ledger, store=ledger.moments)


def _identity(session: Session) -> dict[str, str]:
    """All that the results of a command depend on."""
    job, options = session.job, session.options
    location = Path(job.source.location)
    files = sorted(location.glob("*.safetensors")) if location.is_dir() else []
    flags = {field.name: getattr(options, field.name) for field in fields(options)}
    return {
        "weights of the model": fingerprint(session.model, files),
        "calibration examples": examples_digest(job.batches),
        **{f"--{name}": str(value) for name, value in flags.items() if name not in _WITHOUT_EFFECT},
        "--device": job.device,
        **code_identity(),
    }


def is_finished(session: Session, budget: Budget) -> bool:
    """Whether an interrupted run saved and reported a budget, in the place that is asked for, and it is still there."""
    noted = session.ledger.finished(budget)
    if not noted or noted["asked"] != str(session.options.save_dir):
        return False
    folder = Path(noted["folder"])
    if not folder.is_dir() or not any(folder.iterdir()) or not may_be_replaced(folder):
        return False
    session.job.say(
        f"mu {budget.mu:g} is finished: {folder}, reported in {session.options.output_dir / session.job.stem}.txt"
    )
    return True


def finish(session: Session, budget: Budget, folder: Path) -> None:
    """Note that a budget is saved and reported."""
    session.ledger.finish(budget, {"folder": str(folder), "asked": str(session.options.save_dir)})
