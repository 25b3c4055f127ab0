"""Everything that a run can refuse, refused before a weight is read; a dry run passes exactly when these checks do."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from shrinkformer.architectures import layer_views
from shrinkformer.commands.locate import require_weight_files
from shrinkformer.commands.options import PruneOptions
from shrinkformer.commands.session import Job
from shrinkformer.errors import InputError
from shrinkformer.prune.allocation import require_feasible
from shrinkformer.prune.budget import Budget, CostModel, Counts
from shrinkformer.prune.checkpoint import may_be_replaced


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
        InputError: There are no weights, a folder holds something else, or something cannot come out.
        BudgetError: A budget is below what every block must keep.
    """
    require_weight_files(job.source)
    costs = [CostModel.of(layer_views(model), budget) for budget in budgets]
    for each in costs:
        if options.budget == "macs":  # time is not known yet
            require_feasible(each)
    checks.shapes(job, model, costs)
    for each in costs:
        for folder in checks.targets(job, model, each):
            if not may_be_replaced(folder):
                flag = f"--output_dir {options.output_dir}" if options.save_dir is None else f"--save_dir {folder}"
                raise InputError(
                    f"{flag}: {folder} exists and holds something else than our checkpoints; choose another folder."
                )
