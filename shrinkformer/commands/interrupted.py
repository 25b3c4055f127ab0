"""What an interrupted run of a command left, and who may write now."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from shrinkformer.commands.options import PruneOptions
from shrinkformer.commands.session import Job, Session
from shrinkformer.errors import warn
from shrinkformer.evaluate.labels import output_names
from shrinkformer.pictures.runs import number, read_runs
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.checkpoint import may_be_replaced
from shrinkformer.prune.dependencies import EVALUATION_EXAMPLES
from shrinkformer.prune.ledger import Ledger, code_identity
from shrinkformer.prune.objective import objective_of
from shrinkformer.prune.resume import examples_digest, fingerprint, texts_digest
from shrinkformer.utils.locks import exclusive

_PLACES = ("model_name", "data_dir", "bundled_data", "calibration_file", "output_dir", "save_dir", "offload_dir")
_DOINGS = ("mu", "max_memory", "device", "dry_run", "resume", "push_to_hub", "private", "report_to")
_BUDGETS = ("round_to", "min_heads", "min_neurons", "uniform", "sequence_length")
_WITHOUT_EFFECT = frozenset(_PLACES + _DOINGS + _BUDGETS)
"""Flags that no result depends on, or that are known better: weights and examples by digests, budgets one by one."""


WEIGHTS = "weights of the model"


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
    before = ledger.earlier.get(WEIGHTS, found[WEIGHTS])
    if before != found[WEIGHTS] and job.workers.is_main:
        warn(
            f"{options.output_dir / job.folder}...: another model that is called {job.source.name}, too, was reported "
            "here; its checkpoints are replaced (another --output_dir keeps both)"
        )
    if ledger.news:
        job.say(ledger.news)
    session.resources = replace(session.resources, ledger=ledger, store=ledger.moments)


def _identity(session: Session) -> dict[str, str]:
    """All that the results of a command depend on."""
    job, options = session.job, session.options
    location = Path(job.source.location)
    files = sorted(location.glob("*.safetensors")) if location.is_dir() else []
    flags = {field.name: getattr(options, field.name) for field in fields(options)}
    return {
        WEIGHTS: fingerprint(session.model, files),
        "head of the model": _head(session),
        "calibration examples": examples_digest(job.batches),
        EVALUATION_EXAMPLES: job.evaluation_digest(),
        **{f"--{name}": str(value) for name, value in flags.items() if name not in _WITHOUT_EFFECT},
        "--whole_heads": str(options.keeps_whole_heads),
        "--device": job.device,
        **code_identity(),
    }


def _head(session: Session) -> str:
    """A digest of what is predicted, and of the names of the outputs, by which they are matched with labels."""
    objective = session.job.objective or objective_of(session.model)
    return texts_digest([*objective.facts(), *output_names(session.model.config)])


def is_finished(session: Session, budget: Budget) -> bool:
    """Whether an interrupted run saved and reported a budget, in the place that is asked for, and it is still there."""
    noted = session.ledger.finished(budget)
    if not isinstance(noted, dict) or noted.get("asked") != str(session.options.save_dir):
        return False
    folder = Path(str(noted.get("folder")))
    if not folder.is_dir() or not any(folder.iterdir()) or not may_be_replaced(folder):
        return False
    session.job.say(
        f"mu {budget.amount} is finished: {folder}, reported in {session.options.output_dir / session.job.stem}.txt"
    )
    return True


def reported(session: Session) -> dict[float, dict[str, Any]]:
    """The newest records of budgets that an interrupted run finished, by what was asked for."""
    records = (session.options.output_dir / session.job.stem).with_suffix(".jsonl")
    if not session.options.resume or not records.exists():
        return {}
    runs, _ = read_runs(records.read_text(encoding="utf-8").splitlines())
    of_this = [run for run in runs if run.word("run") == session.run_id]
    return {number(run.fields.get("mu")): run.fields for run in of_this}


def finish(session: Session, budget: Budget, folder: Path) -> None:
    """Note that a budget is saved and reported."""
    session.ledger.finish(budget, {"folder": str(folder), "asked": str(session.options.save_dir)})
