"""What commands know: a job that was read, and the dense model with what was learnt about it."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shrinkformer.architectures import layer_views
from shrinkformer.commands.card_metadata import inherited, side_folder
from shrinkformer.commands.cards import Card
from shrinkformer.commands.console import say
from shrinkformer.commands.locate import Source
from shrinkformer.commands.options import PruneOptions
from shrinkformer.commands.report import Measured, Run
from shrinkformer.dataset.tasks import TASKS, get_task
from shrinkformer.efficiency.macs import model_macs
from shrinkformer.efficiency.rounding import Rounding
from shrinkformer.efficiency.size import checkpoint_bytes, count_parameters, folder_bytes, peak_memory_bytes
from shrinkformer.errors import InputError
from shrinkformer.evaluate.labels import warn_below_chance
from shrinkformer.evaluate.paired import Scores
from shrinkformer.export.runtime import OnnxModel
from shrinkformer.prune.budget import Budget, layer_sizes
from shrinkformer.prune.checkpoint import stock_class
from shrinkformer.prune.columns import known_errors
from shrinkformer.prune.dependencies import DENSE, RUN
from shrinkformer.prune.ledger import Ledger
from shrinkformer.prune.objective import UNUSUAL, Objective, objective_of
from shrinkformer.prune.plan import Plan
from shrinkformer.prune.pruner import Calibrated
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.statistics import Batches
from shrinkformer.prune.stream import count_tokens
from shrinkformer.utils.parallel import Workers

Evaluate = Callable[[PreTrainedModel, Resources], Scores]


@dataclass(frozen=True)
class Job:
    """One model and one task, read and checked: all that differs between encoders and decoders.

    Attributes:
        task_name: What the model is calibrated for, in reports.
        stem: Where reports go, below the output folder, without suffix.
        folder: Where checkpoints go, below the output folder, without the budget.
        source: The model.
        chosen: The class that loads it.
        tokenizer: Saved beside the pruned model.
        batches: Calibration examples as model inputs; those of all workers. Empty where nothing is learnt from any.
        example: A batch to check saved models with.
        sequence_length: Length at which MACs are counted.
        evaluate: Figures of a model, with their standard errors and what each example contributes.
        compare: The same of a model beside the dense one, which comes first, where nothing but that says what is right.
        shapes: Inputs whose latency is measured, (examples, tokens).
        device: Where models run.
        dtype: Of weights in memory.
        workers: The processes that share the work.
        whole: Why the model has to be in memory as a whole; "" where it may pass block by block.
        sentence_encoder: Whether it is one, which sentence-transformers should open.
        objective: What the model predicts, where files beside it say so; otherwise what its own head does.
        public: Whether metrics are those of whole evaluation splits of public data sets.
        evaluation_digest: Of the evaluation examples; two runs with the same one may share figures of the dense model.
        facts: What reports say beside figures, by name, such as how sentences are pooled.
    """

    task_name: str
    stem: Path
    folder: Path
    source: Source
    chosen: Any
    tokenizer: Any
    batches: Batches
    example: Mapping[str, Tensor]
    sequence_length: float
    evaluate: Evaluate
    shapes: Sequence[tuple[int, int]]
    device: str
    dtype: torch.dtype
    workers: Workers
    whole: str = ""
    sentence_encoder: bool = False
    objective: Objective | None = None
    compare: Callable[[PreTrainedModel, PreTrainedModel], Scores] | None = None
    public: bool = False
    evaluation_digest: Callable[[], str] = lambda: ""
    facts: Mapping[str, str] = field(default_factory=dict)

    def say(self, message: str) -> None:
        """Tell the user, once."""
        if self.workers.is_main:
            say(message)


@dataclass
class Session:
    """The dense model of a job, and what is known about it so far."""

    job: Job
    options: PruneOptions
    model: PreTrainedModel
    resources: Resources
    seconds: dict[str, float]  # of the steps that all budgets share
    dense: Measured = field(default_factory=lambda: Measured({}, 0.0, 0, 0))
    rounding: Rounding | None = None  # where --round_to is found by measuring
    calibrated: Calibrated | None = None
    dense_onnx: OnnxModel | None = None
    cards: dict[Path, Card] = field(default_factory=dict)  # of folders without figures yet

    @property
    def lazily(self) -> bool:
        """Whether the model passes block by block."""
        return self.resources.offload is not None

    @cached_property
    def side_folder(self) -> Path | None:
        """Folder with the dense model's card and all that stands beside its weights, where it can be had."""
        return side_folder(self.job.source)

    def card(self, folder: Path, title: str, plan: Plan | None, **found: Any) -> str:
        """The model card of a folder for now; it gets figures once there are some.

        Args:
            folder: Of a checkpoint.
            title: First line of the card.
            plan: What was kept, if the model was pruned.
            **found: Fields of :class:`~shrinkformer.commands.cards.Card`: what a step did.
        """
        job = self.job
        self.cards[folder] = Card(
            f"{job.source.name} for {job.task_name} {title}",
            job.source.name,
            folder,
            stock_class(type(self.model)).__name__,
            sentence_encoder=job.sentence_encoder,
            inherited=inherited(job.source, self.side_folder),
            public=job.public,
            plan=plan,
            errors=() if plan is None else known_errors(plan, layer_sizes(layer_views(self.model)), self.tokens),
            tokens=self.tokens,
            **found,
        )
        return self.cards[folder].text()

    @property
    def tokens(self) -> int:
        """Of the calibration examples."""
        return count_tokens(self.job.batches)

    @property
    def ledger(self) -> Ledger:
        """What was finished, here and by an interrupted run."""
        return self.resources.ledger

    def run(self, budget: Budget, seconds: dict[str, float], **found: Any) -> Run:
        """The report on one budget: what was asked for, beside what a step found."""
        job, options = self.job, self.options
        return Run(
            task_name=job.task_name,
            model_name=job.source.name,
            method=options.method,
            mu=found.pop("mu", budget.mu),
            seed=options.seed,
            sample_batch_size=options.sample_batch_size if job.batches else 0,
            calibration_tokens=self.tokens,
            device=job.device,
            seconds=seconds | {"total": sum(seconds.values())},
            peak_memory_bytes=peak_memory_bytes(job.device),
            rounding=self.rounding,
            dense_layers=layer_sizes(layer_views(self.model)),
            run_id=self.run_id,
            given=job.source.given,
            calibration_inputs=sum(len(batch["attention_mask"]) for batch in job.batches),
            facts={**self._usual_facts(budget, found.get("plan")), **job.facts},
            **found,
        )

    @cached_property
    def run_id(self) -> str:
        """Of the command; one that is taken up keeps it."""
        return str(self.ledger.values.value(RUN.names, lambda: secrets.token_hex(8)))

    def _usual_facts(self, budget: Budget, plan: Plan | None) -> dict[str, str]:
        """What every run knows of itself."""
        job, options = self.job, self.options
        memory, file = (str(dtype).removeprefix("torch.") for dtype in (job.dtype, job.source.dtype))
        facts = {
            "weights": f"{memory} in memory, {file} in the file" if memory != file else memory,
            "MACs": f"of an input of {job.sequence_length:.2f} tokens",
        }
        if job.objective is not None:
            facts["embeddings"] = str(job.objective.sentence)
        elif not self.model.can_generate() and (logits := objective_of(self.model).logits) in UNUSUAL:
            facts["predictions"] = logits.value
        if budget.mu < 1 and options.shrinks and options.keeps_whole_heads:
            facts["heads"] = "whole ones only"
        if budget.uniform:
            facts["blocks"] = "all alike"
        if plan is not None and plan.search.get("cut_short"):
            facts["search"] = f"cut short after {options.search_seconds:g} s"
        return facts


def target(options: PruneOptions, budget: Budget, name: str) -> Path:
    """Where the checkpoint for a budget goes: ``name`` below the output folder, unless the user gave a place."""
    if options.save_dir is None:
        return options.output_dir / name
    return options.save_dir if len(options.mu) == 1 else options.save_dir / f"mu{budget.amount}"


def measure_dense(session: Session) -> Measured:
    """Evaluate the dense model, unless an interrupted run has done so, and take its sizes.

    Raises:
        InputError: What an interrupted run left are no figures.

    Warns:
        ShrinkformerWarning: It is worse than guessing.
    """
    evaluate, model, resources = session.job.evaluate, session.model, session.resources
    found = session.ledger.values.value(DENSE.names, lambda: evaluate(model, resources).to_json())
    try:
        scores = Scores.from_json(found)
    except ValueError as error:
        raise InputError(f"--resume: {session.ledger.folder}: {error}; leave --resume out to start anew.") from None
    if session.job.task_name in TASKS:
        warn_below_chance(get_task(session.job.task_name), scores.metrics, model.config)
    return _sizes(session, model, scores, Path(session.job.source.location))


def measure(session: Session, model: PreTrainedModel, resources: Resources, folder: Path) -> Measured:
    """Evaluate a model and take its sizes; ``folder`` holds its weights unless they came from the hub."""
    job = session.job
    scores = job.evaluate(model, resources) if job.compare is None else job.compare(session.model, model)
    return _sizes(session, model, scores, folder)


def _sizes(session: Session, model: PreTrainedModel, scores: Scores, folder: Path) -> Measured:
    views = layer_views(model)
    return Measured(
        metrics=scores.metrics,
        macs=model_macs(layer_sizes(views), views[0].hidden_size, session.job.sequence_length),
        parameters=count_parameters(model),
        bytes=folder_bytes(folder) if folder.is_dir() else checkpoint_bytes(model),
        deviations=scores.deviations,
    )
