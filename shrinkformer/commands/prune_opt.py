"""``prune_opt.py``: what is read for a language model, and how it is judged."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shrinkformer.architectures.limits import max_positions
from shrinkformer.commands.locate import Source, find_decoder, model_class
from shrinkformer.commands.main import prune_opt as main
from shrinkformer.commands.options import BUNDLED_DECODER, DecoderOptions, torch_dtype
from shrinkformer.commands.samples import read_or_sample
from shrinkformer.commands.session import Evaluate, Job
from shrinkformer.commands.tokenizers import load_tokenizer, require_fitting_tokens
from shrinkformer.dataset.corpora import calibration_windows, evaluation_windows, read_own_text, windows_of
from shrinkformer.dataset.corpus import CORPORA, get_corpus
from shrinkformer.errors import InputError
from shrinkformer.evaluate.harness import harness_is_installed, run_harness
from shrinkformer.evaluate.paired import STDERR, Scores
from shrinkformer.evaluate.perplexity import Perplexity, evaluate_perplexity
from shrinkformer.evaluate.streaming import stream_perplexity
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.resume import texts_digest
from shrinkformer.utils.installation import how_to_install
from shrinkformer.utils.parallel import Workers

__all__ = ["LONGEST", "main", "read_job"]

LONGEST = 4096
"""Longest default window: models that take a hundred thousand tokens are measured on shorter ones by everybody."""


def read_job(options: DecoderOptions, device: str, workers: Workers) -> Job:
    """Find the model, read the texts and cut them into windows.

    Raises:
        InputError: The model is missing or no language model, or an option does not fit it.
    """
    source = find_decoder(options.model_name, options.task_name)
    tokenizer = load_tokenizer(source)
    length = window_length(options, source, tokenizer)
    (evaluation, calibration), bundled = read_or_sample(
        options,
        lambda asked: (
            read_evaluation(asked, tokenizer, length, asked.bundled_data),
            read_calibration(asked, tokenizer, length, asked.bundled_data),
        ),
        demo=options.model_name == BUNDLED_DECODER,
    )
    windows = [calibration, *evaluation.values()]
    require_fitting_tokens(source, [[{"input_ids": ids.flatten().tolist()}] for ids in windows])
    if options.lm_eval and not harness_is_installed():
        raise InputError(f"--lm_eval: the harness is not installed; {how_to_install('lm-eval')}.")
    own = options.calibration_file
    task_name = options.task_name if own is None else own.name
    main = (
        options.evaluation_file.name if own is not None and options.evaluation_file is not None else options.task_name
    )
    dtype = torch_dtype(options.dtype)
    if dtype is None:
        dtype = source.dtype if torch.device(device).type == "cuda" else torch.float32
    return Job(
        task_name=task_name,
        stem=Path("opt") / source.name,
        folder=Path("opt") / f"{source.name}-{task_name}",
        source=source,
        chosen=model_class(source, None),
        tokenizer=tokenizer,
        batches=window_batches(calibration, options.batch_size) if options.reads_examples else [],
        example=window_batches(next(some for some in windows if len(some)), options.batch_size)[0],
        sequence_length=length,
        evaluate=make_evaluate(options, evaluation, main, tokenizer, device=device, workers=workers),
        shapes=[(1, min(128, length)), (8, min(128, length))],
        device=device,
        dtype=dtype,
        workers=workers,
        whole="--lm_eval runs on the whole model" if options.lm_eval else "",
        public=not bundled and options.evaluation_windows is None,
        facts={"evaluated on": _windows_in_words(evaluation, length)},
        evaluation_digest=lambda: texts_digest(f"{name} {rows.tolist()}" for name, rows in evaluation.items()),
    )


def window_length(options: DecoderOptions, source: Source, tokenizer: Any) -> int:
    """Tokens per window: as asked, or as many as the model takes.

    Raises:
        InputError: More than the model takes.
    """
    longest = int(min(max_positions(source.config), tokenizer.model_max_length))
    if options.sequence_length is None:
        return min(longest, LONGEST)
    if options.sequence_length > longest:
        raise InputError(f"--sequence_length {options.sequence_length}: {source.name} takes at most {longest} tokens.")
    return options.sequence_length


def read_evaluation(options: DecoderOptions, tokenizer: Any, length: int, bundled: bool) -> dict[str, Tensor]:
    """Evaluation windows by corpus: all corpora, so that a held-out one always stands beside the calibration corpus."""
    windows = {
        name: evaluation_windows(corpus, tokenizer, length=length, data_dir=options.data_dir, bundled=bundled)
        for name, corpus in CORPORA.items()
    }
    if options.evaluation_file is not None:
        where = f"--evaluation_file {options.evaluation_file}"
        text = read_own_text(options.evaluation_file)
        windows[options.evaluation_file.name] = windows_of(text, tokenizer, length, where=where)
    return {name: rows[: options.evaluation_windows] for name, rows in windows.items()}


def read_calibration(options: DecoderOptions, tokenizer: Any, length: int, bundled: bool) -> Tensor:
    """Calibration windows, ``(windows, length)``; none where nothing is learnt from them and no file was given."""
    own = options.calibration_file
    if own is None and not options.reads_examples:
        return torch.zeros(0, length, dtype=torch.int64)
    return calibration_windows(
        get_corpus(options.task_name) if own is None else read_own_text(own),
        tokenizer,
        length=length,
        size=options.sample_batch_size,
        seed=options.seed,
        data_dir=options.data_dir,
        bundled=bundled,
        where=f"--calibration_file {own}",
    )


def window_batches(windows: Tensor, batch_size: int) -> list[dict[str, Tensor]]:
    """Model inputs of full windows."""
    parts = [ids for ids in torch.split(windows, batch_size) if len(ids)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in parts]


def make_evaluate(
    options: DecoderOptions,
    evaluation: Mapping[str, Tensor],
    main: str,
    tokenizer: Any,
    *,
    device: str,
    workers: Workers,
) -> Evaluate:
    """The function that measures perplexity on every corpus, and what ``--lm_eval`` asks for."""

    def one(model: PreTrainedModel, windows: Tensor, resources: Resources) -> Perplexity:
        if resources.offload is not None:
            return stream_perplexity(model, windows, resources, batch_size=options.batch_size)
        return evaluate_perplexity(
            model,
            windows,
            batch_size=options.batch_size,
            device=device,
            workers=workers,
            progress=workers.is_main,
        )

    def evaluate(model: PreTrainedModel, resources: Resources) -> Scores:
        found = {name: one(model, windows, resources) for name, windows in evaluation.items()}
        scores = _scores("perplexity", found[main])
        for name, perplexity in found.items():
            scores |= _scores(f"perplexity_{name}", perplexity)
        if options.lm_eval and workers.is_main:
            scores |= Scores(run_harness(model, tokenizer, options.lm_eval, batch_size=options.batch_size))
        return scores

    return evaluate


def _windows_in_words(evaluation: Mapping[str, Tensor], length: int) -> str:
    counts = ", ".join(f"{len(rows):,} of {name}" for name, rows in evaluation.items())
    return f"windows of {length:,} tokens, {counts}"


def _scores(name: str, found: Perplexity) -> Scores:
    return Scores({name: found.value, f"{name}{STDERR}": found.stderr}, {name: found.deviations})
