"""``prune_bert.py``: what is read for an encoder, and how it is judged."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from shrinkformer.architectures.limits import max_positions
from shrinkformer.commands.locate import Source, embeddings_of, find_model, model_class, require_label_names
from shrinkformer.commands.main import prune_bert as main
from shrinkformer.commands.options import BUNDLED_MODEL, EncoderOptions
from shrinkformer.commands.own_head import read_own_job
from shrinkformer.commands.samples import read_or_sample
from shrinkformer.commands.session import Job
from shrinkformer.commands.tokenizers import load_tokenizer, require_fitting_tokens
from shrinkformer.dataset.calibration import sample_calibration
from shrinkformer.dataset.encoding import Encoded, encode, padded_batches
from shrinkformer.dataset.loading import evaluation_splits, load_examples, load_split
from shrinkformer.dataset.tasks import Task, get_task
from shrinkformer.evaluate.evaluation import evaluate_model
from shrinkformer.evaluate.paired import Scores
from shrinkformer.prune.pooling import MEAN, SentenceHead
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.resume import texts_digest
from shrinkformer.utils.parallel import Workers

if TYPE_CHECKING:
    import datasets

__all__ = ["main", "read_data", "read_job"]


def read_job(options: EncoderOptions, device: str, workers: Workers) -> Job:
    """Find the model, read and encode the data.

    Raises:
        InputError: A model or data set is missing or does not fit the task.
    """
    if not options.judged_by:
        return read_own_job(options, device, workers)
    task = get_task(options.judged_by)
    source = find_model(options.model_name, task)
    objective = embeddings_of(source) if task.kind == "similarity" else None
    tokenizer = load_tokenizer(source)
    head = MEAN if objective is None else objective.sentence
    (calibration, evaluation), bundled = read_or_sample(
        options,
        lambda asked: read_data(asked, task, source, tokenizer, head=head),
        demo=options.model_name == BUNDLED_MODEL and task.kind == "similarity",
    )
    require_label_names(source, task, [split.examples for split in evaluation.values()])
    require_fitting_tokens(source, [calibration.features, *(split.features for split in evaluation.values())])
    learnt = calibration.features if options.reads_examples else []
    batches = [batch for _, batch in padded_batches(learnt, tokenizer, options.batch_size)]
    some = calibration.features or next(iter(evaluation.values())).features
    lengths = [length for split in evaluation.values() for length in split.lengths]
    length = min(128, max_positions(source.config), tokenizer.model_max_length)

    def evaluate(model: PreTrainedModel, resources: Resources) -> Scores:
        return evaluate_model(
            model,
            tokenizer,
            task,
            evaluation,
            batch_size=options.batch_size,
            device=device,
            progress=workers.is_main,
            workers=workers,
            objective=objective,
        ).scores

    return Job(
        task_name=task.name,
        stem=Path(source.name) / task.name,
        folder=Path(source.name) / task.name,
        source=source,
        chosen=model_class(source, task),
        tokenizer=tokenizer,
        batches=batches,
        example=next(iter(padded_batches(some[: options.batch_size], tokenizer, options.batch_size)))[1],
        sequence_length=options.sequence_length or sum(lengths) / len(lengths),
        evaluate=evaluate,
        shapes=[(1, length), (8, length)],
        device=device,
        dtype=torch.float32,
        workers=workers,
        whole="an encoder is evaluated as a whole",
        sentence_encoder=task.kind == "similarity",
        objective=objective,
        public=not bundled,
        facts={
            "evaluated on": ", ".join(f"{len(one.features):,} inputs of {name}" for name, one in evaluation.items())
        },
        evaluation_digest=lambda: texts_digest(_words_of(evaluation)),
    )


def read_data(
    options: EncoderOptions,
    task: Task,
    source: Source,
    tokenizer: Any,
    *,
    evaluation_examples: int | None = None,
    head: SentenceHead = MEAN,
) -> tuple[Encoded, Mapping[str, Encoded]]:
    """The calibration examples, and the evaluation examples by split.

    Args:
        options: Of the command.
        task: The task.
        source: The model.
        tokenizer: Of the model.
        evaluation_examples: So many of each split, taken from everywhere; all by default.
        head: How a sentence encoder reads texts.
    """

    def read(split: str) -> "datasets.Dataset":
        return load_split(task, split, data_dir=options.data_dir, bundled=options.bundled_data)

    def read_some(split: str) -> "datasets.Dataset":
        rows = read(split)
        if evaluation_examples is None or evaluation_examples >= len(rows):
            return rows
        return rows.select([number * len(rows) // evaluation_examples for number in range(evaluation_examples)])

    own = options.calibration_file
    longest = max_positions(source.config)
    longest = min(longest, head.longest or longest)
    calibration = Encoded([], None, None, None)
    if options.reads_examples or own is not None:
        pool = read("train") if own is None else load_examples(own, task)
        calibration = sample_calibration(
            pool,
            task,
            tokenizer,
            size=options.sample_batch_size,
            seed=options.seed,
            max_length=longest,
            prepare=head.prepare,
        )
    evaluation = {
        split: encode(read_some(split), task, tokenizer, max_length=longest, prepare=head.prepare)
        for split in evaluation_splits(task, options.data_dir, options.bundled_data)
    }
    return calibration, evaluation


def _words_of(evaluation: Mapping[str, Encoded]) -> Iterator[str]:
    """All that figures depend on beside the model."""
    for split, encoded in evaluation.items():
        yield split
        yield from map(repr, encoded.features)
        yield repr(encoded.labels)
        yield from map(repr, encoded.examples or ())
