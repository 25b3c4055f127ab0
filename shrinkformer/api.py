"""The library in a few calls, for models and data that are already in memory.

>>> from shrinkformer.api import PruneConfig, evaluate, prune_
>>> plan = prune_(model, loader, PruneConfig(mu=0.5))   # doctest: +SKIP
>>> evaluate(model, tokenizer, "qqp")                   # doctest: +SKIP
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from shrinkformer.architectures.limits import max_positions
from shrinkformer.architectures.wrapped import unwrap
from shrinkformer.commands.prune_opt import LONGEST
from shrinkformer.dataset.corpora import evaluation_windows
from shrinkformer.dataset.corpus import CORPORA
from shrinkformer.dataset.encoding import encode
from shrinkformer.dataset.loading import evaluation_splits, load_split
from shrinkformer.dataset.tasks import TASKS, get_task
from shrinkformer.errors import InputError
from shrinkformer.evaluate.evaluation import evaluate_model
from shrinkformer.evaluate.labels import warn_below_chance
from shrinkformer.evaluate.perplexity import evaluate_perplexity
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.checkpoint import describe_sizes
from shrinkformer.prune.names import DEFAULT_METHOD, require_method
from shrinkformer.prune.objective import objective_of
from shrinkformer.prune.plan import Plan
from shrinkformer.prune.pooling import MEAN
from shrinkformer.prune.pruner import calibrate
from shrinkformer.prune.received import receive, wrapped_objective
from shrinkformer.prune.shrink_config import ShrinkConfig
from shrinkformer.prune.stream import mean_length
from shrinkformer.prune.surgery import take_blocks
from shrinkformer.quantize.checkpoint import load
from shrinkformer.quantize.quantizer import quantize_


@dataclass(frozen=True)
class PruneConfig:
    """How a model is pruned.

    Attributes:
        mu: Fraction of the MACs that stays, in (0, 1].
        method: Name of a pruning method.
        examples: Taken from the calibration data at most.
        seed: Of what is drawn at random.
        sequence_length: Length in tokens at which MACs are counted; the mean of the examples by default.
        round_to: Neurons of a block are a multiple of this.
        min_heads: Heads that every block keeps at least.
        min_neurons: Neurons that every block keeps at least.
        shrink: Choices of the method ``shrink``.

    Raises:
        InputError: A value is out of its range.
    """

    mu: float = 0.5
    method: str = DEFAULT_METHOD
    examples: int = 512
    seed: int = 0
    sequence_length: float | None = None
    round_to: int = 1
    min_heads: int = 1
    min_neurons: int = 1
    shrink: ShrinkConfig = field(default_factory=ShrinkConfig)

    def __post_init__(self) -> None:
        require_method(self.method)
        if self.examples < 1:
            raise InputError(f"examples is {self.examples}; pruning needs at least 1, and is good with a few hundred")
        self.budget(self.sequence_length or 1.0)

    def budget(self, sequence_length: float) -> Budget:
        """What the pruned model may cost."""
        return Budget(self.mu, sequence_length, self.round_to, self.min_heads, self.min_neurons)


def prune_(model: Any, calibration: Any, config: PruneConfig | None = None, *, tokenizer: Any = None) -> Plan:
    """Prune a model in place: whoever holds it, holds the smaller one afterwards.

    Args:
        model: Any model with an architecture record, wherever it came from and whatever holds it: a
            ``SentenceTransformer``, ``CrossEncoder``, pipeline or ``DistributedDataParallel``, too. Its modules are
            replaced, so references to its layers or parameters, such as those of an optimizer, are out of date
            afterwards. Its training mode stays.
        calibration: Examples in any form that :func:`~shrinkformer.dataset.batches.as_batches` reads: a DataLoader, a
            data set, lists of token ids, texts. Labels and other columns are not looked at.
        config: What is done.
        tokenizer: For examples that are texts; by default the one that a wrapper brings.

    Returns:
        What was kept. ``shrinkformer.save(model, folder, plan=plan)`` writes the model.

    Raises:
        InputError: Model or examples cannot be used; it says what to pass.
        UnsupportedModelError: There is no architecture record for the model.
        BudgetError: The budget is below what every block must keep.
        NumericalError: The model computes NaN or infinity on the examples.

    Examples:
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader(dataset, batch_size=32, collate_fn=DataCollatorWithPadding(tok))   # doctest: +SKIP
        >>> prune_(model, loader, PruneConfig(mu=0.5)).ratio                                       # doctest: +SKIP
        0.4997
    """
    config = config or PruneConfig()
    given = receive(model, calibration, tokenizer=tokenizer, most=config.examples)
    inner, length = given.model, config.sequence_length or mean_length(given.batches)
    training = inner.training
    calibrated = calibrate(
        inner, given.batches, method=config.method, seed=config.seed, config=config.shrink, objective=given.objective
    )
    pruned = calibrated.prune(config.budget(length))
    take_blocks(inner, pruned.model)
    describe_sizes(inner, pruned.plan)
    inner.train(training)
    return pruned.plan


def evaluate(
    model: Any,
    tokenizer: Any,
    task: str,
    *,
    data_dir: str | Path | None = None,
    bundled_data: bool = False,
    batch_size: int = 32,
) -> dict[str, float]:
    """Measure a model on a task or, of a language model, its perplexity on a corpus.

    Args:
        model: With the head of the task, or a wrapper around one. Where it is, it is evaluated.
        tokenizer: Of the model.
        task: A task of GLUE, ``squad``, ``squad_v2`` or ``similarity``; or a corpus: ``wikitext2``, ``ptb-new``,
            ``c4-new``.
        data_dir: Folder with data sets in the hub's column names; otherwise the hub is asked.
        bundled_data: Use the small samples in the package where ``data_dir`` has nothing.
        batch_size: Examples per forward pass; changes speed and memory, results by no more than rounding.

    Returns:
        Metrics by the task's own names, and ``<name>_stderr`` for their standard errors.

    Raises:
        InputError: There is no such task.
        DataError: The data is missing.
        CheckpointError: The model's head does not fit the task.
    """
    inside, folder = unwrap(model), None if data_dir is None else Path(data_dir)
    model = inside.model
    device, longest = next(model.parameters()).device, max_positions(model.config)
    if task in CORPORA:
        length = min(LONGEST, longest, int(tokenizer.model_max_length))
        windows = evaluation_windows(CORPORA[task], tokenizer, length=length, data_dir=folder, bundled=bundled_data)
        found = evaluate_perplexity(model, windows, batch_size=batch_size, device=device)
        return {"perplexity": found.value, "perplexity_stderr": found.stderr}
    if task not in TASKS:
        raise InputError(f"task {task!r} is not known; choose one of {', '.join([*TASKS, *CORPORA])}")
    chosen = get_task(task)
    objective = (wrapped_objective(inside) or objective_of(model)) if chosen.kind == "similarity" else None
    head = MEAN if objective is None else objective.sentence
    splits = {
        split: encode(
            load_split(chosen, split, data_dir=folder, bundled=bundled_data),
            chosen,
            tokenizer,
            max_length=min(longest, head.longest or longest),
            prepare=head.prepare,
        )
        for split in evaluation_splits(chosen, folder, bundled_data)
    }
    metrics = evaluate_model(
        model, tokenizer, chosen, splits, batch_size=batch_size, device=device, objective=objective
    ).metrics
    warn_below_chance(chosen, metrics, model.config)
    return metrics


class PruneCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not checked
    """Prunes the model when a :class:`transformers.Trainer` has trained it.

    Args:
        config: How.
        calibration: Examples in any form, as for :func:`prune_`; by default those of the training data.

    Attributes:
        plan: What was kept, once training is over. Pass it to ``shrinkformer.save``, whose folder loads anywhere.
    """

    def __init__(self, config: PruneConfig | None = None, calibration: Any = None):
        self._config, self._calibration = config or PruneConfig(), calibration
        self.plan: Plan | None = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer after the best checkpoint was loaded, where that was asked for."""
        examples = kwargs["train_dataloader"] if self._calibration is None else self._calibration
        self.plan = prune_(kwargs["model"], examples, self._config, tokenizer=kwargs.get("processing_class"))


__all__ = ["PruneCallback", "PruneConfig", "evaluate", "load", "prune_", "quantize_"]
