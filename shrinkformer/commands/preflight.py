"""Everything that a run can refuse, refused before a weight is read; a dry run passes exactly when these checks do."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from shrinkformer.architectures import layer_views
from shrinkformer.commands.locate import Source, require_weight_files
from shrinkformer.commands.options import PruneOptions
from shrinkformer.commands.session import Job
from shrinkformer.errors import BudgetError, InputError, UnsupportedModelError
from shrinkformer.prune.allocation import require_feasible
from shrinkformer.prune.budget import Budget, CostModel, Counts
from shrinkformer.prune.checkpoint import may_be_replaced
from shrinkformer.prune.counted import require_counted
from shrinkformer.prune.latency_table import require_shape
from shrinkformer.prune.objective import objective_of


@dataclass(frozen=True)
class Checks:
    """What a kind of run asks beside what all of them do.

    Attributes:
        shapes: ``(job, model without weights, budgets)``; raises :class:`InputError` for what cannot come out.
        targets: ``(job, model without weights, budget)``; every folder that may be written.
        sizes: ``(job, model without weights, what stays, its parameters)``; bytes of each file by what it is.
    """

    shapes: Callable[[Job, PreTrainedModel, Sequence[CostModel]], None]
    targets: Callable[[Job, PreTrainedModel, CostModel], Iterable[Path]]
    sizes: Callable[[Job, PreTrainedModel, Counts, int], Mapping[str, int]]


def preflight(
    job: Job, options: PruneOptions, model: PreTrainedModel, budgets: Sequence[Budget], checks: Checks
) -> None:
    """Check a run from shapes and names alone.

    Args:
        job: The model and the task.
        options: Of the command.
        model: Without weights.
        budgets: As they will be taken.
        checks: Of this kind of run.

    Raises:
        InputError: There are no weights, blocks compute more than is counted, times are asked for on longer inputs than
            the model takes, a folder holds something else, something cannot come out, or a budget is below what every
            block must keep.
    """
    require_weight_files(job.source)
    if options.calibrates:
        with as_input_error(job.source):
            require_counted(model)
            if job.objective is None:
                objective_of(model)  # refuses kinds of answers that nobody knows
    if options.budget == "latency":
        require_shape(model, options.latency_shape)
    costs = [CostModel.of(layer_views(model), budget) for budget in budgets]
    for each in costs:
        if options.budget == "macs":  # time is not known yet
            _require_affordable(each)
    checks.shapes(job, model, costs)
    for each in costs:
        for folder in checks.targets(job, model, each):
            if not may_be_replaced(folder):
                flag = f"--output_dir {options.output_dir}" if options.save_dir is None else f"--save_dir {folder}"
                raise InputError(
                    f"{flag}: {folder} exists and holds something else than our checkpoints; choose another folder."
                )


def _require_affordable(costs: CostModel) -> None:
    try:
        require_feasible(costs)
    except BudgetError as error:  # of a run it would be a failure, here it is a wrong number
        raise InputError(str(error)) from None


@contextmanager
def as_input_error(source: Source) -> Iterator[None]:
    """What cannot be done with a model, found before it is loaded, is said of the flag that names it."""
    try:
        yield
    except UnsupportedModelError as error:
        raise InputError(f"--model_name {source.name}: {error}") from None
