"""What is read where no task is named: the checkpoint with its own head, and texts that nobody has labelled."""

from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from shrinkformer.architectures.heads import BARE
from shrinkformer.architectures.limits import max_positions
from shrinkformer.commands.console import say
from shrinkformer.commands.locate import class_of, embeddings_of, empty_model, find_own
from shrinkformer.commands.options import EncoderOptions
from shrinkformer.commands.preflight import as_input_error
from shrinkformer.commands.session import Job
from shrinkformer.commands.tokenizers import load_tokenizer
from shrinkformer.dataset.batches import as_batches
from shrinkformer.dataset.own_texts import masked, read_own_texts
from shrinkformer.evaluate.agreement import compare
from shrinkformer.evaluate.paired import Scores
from shrinkformer.prune.objective import Objective, objective_of
from shrinkformer.prune.resume import examples_digest
from shrinkformer.prune.sentence_encoder import MODULES
from shrinkformer.prune.statistics import Batches
from shrinkformer.prune.stream import mean_length
from shrinkformer.utils.parallel import Workers


def read_own_job(options: EncoderOptions, device: str, workers: Workers) -> Job:
    """Find the model, read and encode texts.

    Raises:
        InputError: The model or the file is missing, or neither fits the other.
    """
    source, head = find_own(options.model_name)
    tokenizer = load_tokenizer(source)
    texts = read_own_texts(options.calibration_file, head, size=options.sample_batch_size, seed=options.seed)
    shapes = empty_model(source, class_of(source))
    read = partial(as_batches, model=shapes, tokenizer=tokenizer, rows=options.batch_size)
    batches, judged = read(texts.calibration), read(texts.judged)
    mask_id = None
    if head.task == "fill-mask":
        batches, judged = (masked(some, tokenizer, seed=options.seed) for some in (batches, judged))
        mask_id = tokenizer.mask_token_id
    if workers.is_main:
        say(f"no --task_name: {source.name} keeps its head ({head.task}) and is judged by its own answers")
        say(f"  {texts.where}")
    with as_input_error(source):
        objective = embeddings_of(source) if head is BARE else objective_of(shapes)
    length = min(128, max_positions(source.config), tokenizer.model_max_length)
    against = _Judge(judged, objective, mask_id, workers, device)
    return Job(
        task_name=head.task,
        stem=Path(source.name) / head.task,
        folder=Path(source.name) / head.task,
        source=source,
        chosen=class_of(source),
        tokenizer=tokenizer,
        batches=batches,
        example=judged[0],
        sequence_length=options.sequence_length or mean_length(judged),
        evaluate=lambda model, resources: against(model, model),
        compare=against,
        shapes=[(1, length), (8, length)],
        device=device,
        dtype=torch.float32,
        workers=workers,
        whole="an encoder is evaluated as a whole",
        sentence_encoder=head is BARE and (Path(source.location) / MODULES).is_file(),
        objective=objective if head is BARE else None,
        facts={
            "evaluated on": f"{sum(len(next(iter(batch.values()))) for batch in judged):,} texts that were set aside"
        },
        evaluation_digest=lambda: examples_digest(judged),
    )


class _Judge:
    """Compares models with the dense one on examples that were set aside."""

    def __init__(
        self, judged: Batches, objective: Objective, mask_id: int | None, workers: Workers, device: str
    ) -> None:
        self._judged, self._objective, self._mask_id = judged, objective, mask_id
        self._workers, self._device = workers, device

    def __call__(self, dense: PreTrainedModel, model: PreTrainedModel) -> Scores:
        for one in (dense, model):
            one.to(self._device)
        self._objective = self._objective.scaled(dense, self._judged, self._workers)
        return compare(dense, model, self._judged, self._objective, mask_id=self._mask_id, workers=self._workers)
