"""The windows of tokens that decoders are calibrated and judged on.

They are those of GPTQ, see :mod:`shrinkformer.dataset.corpus`. Only the draw of the calibration windows is our own: a
numpy generator instead of Python's global one.
"""

import filecmp
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shrinkformer.dataset.corpus import Corpus, get_corpus  # noqa: F401 - scripts of others look for it here
from shrinkformer.dataset.files import read_file, read_texts
from shrinkformer.dataset.loading import SAMPLES
from shrinkformer.errors import DataError, InputError, MissingDataError

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".txt", ".parquet", ".json", ".jsonl")
"""File types of a corpus, in the order in which they are looked for."""
_OWN_JOINER = "\n\n"  # between the rows of the user's own file
_ANY_SUFFIX = ".{txt,parquet,json,jsonl}"  # the same, for messages


def load_texts(corpus: Corpus, split: str, *, data_dir: Path | None, bundled: bool = False) -> list[str]:
    r"""Load the texts of a split.

    Looked for in ``data_dir/<corpus.folder>/<split>.{txt,parquet,json,jsonl}``, then among the bundled samples if
    ``bundled``, then on the hub. A .txt file holds one text per line, and its lines become what the hub's rows are:
    PTB's are stripped; wikitext's keep the blank at their start and their ``\n``, and a blank line is the empty text;
    C4's are taken as they are.

    Raises:
        DataError: nothing found, an empty or unreadable file, or no text column.
    """
    path = _find(corpus, split, data_dir, bundled)
    if path is None:
        return _from_hub(corpus, split, data_dir, bundled)
    if path.suffix == ".txt":
        (text,) = read_texts(path)
        return [corpus.row(line) for line in text.removesuffix("\n").split("\n")]
    return _column(read_file(path, text_columns=[corpus.column]), corpus, str(path))


def calibration_split(corpus: Corpus, data_dir: Path | None, bundled: bool = False) -> str:
    """Name the split that calibration windows are drawn from: the first one that has a local file, else the first.

    Raises:
        DataError: ``data_dir`` is not a folder.
    """
    for split in corpus.calibration_splits:
        if _find(corpus, split, data_dir, bundled) is not None:
            return split
    return corpus.calibration_splits[0]


def calibration_windows(
    source: Corpus | str,
    tokenizer: Any,
    *,
    length: int,
    size: int,
    seed: int,
    data_dir: Path | None = None,
    bundled: bool = False,
    where: str = "the calibration text",
) -> Tensor:
    """Draw windows of tokens at random; windows may overlap, as GPTQ's do.

    Args:
        source: a corpus, or a text of the user's own, which needs no ``data_dir`` and no ``bundled``.
        tokenizer: a transformers tokenizer; the special tokens that it adds stay.
        length: tokens per window.
        size: how many windows (``--sample_batch_size``).
        seed: of a generator of its own; no global state is read or changed.
        data_dir: where :func:`load_texts` looks first.
        bundled: whether it may use the bundled samples.
        where: what messages call a text of the user's own.

    Returns:
        (size, length), int64. With ``window_per_text`` (C4) each is from another text of more than ``length`` tokens
        while there are enough.

    Raises:
        InputError: ``length``, ``size`` or ``seed`` is out of range.
        DataError: no data, or no more than ``length`` tokens.
    """
    _require_length(length)
    if size < 1:
        raise InputError(f"--sample_batch_size {size} must be at least 1")
    if seed < 0:
        raise InputError(f"--seed {seed} must not be negative")
    rng = np.random.default_rng(seed)
    if isinstance(source, str):
        pool = [_tokenise(tokenizer, source)]
    else:
        split = calibration_split(source, data_dir, bundled)
        texts, where = load_texts(source, split, data_dir=data_dir, bundled=bundled), f"{source.name} {split}"
        if source.window_per_text:  # lazily: a shard of C4 has 356,317 texts
            candidates = (_tokenise(tokenizer, texts[row]) for row in rng.permutation(len(texts)))
            pool = list(islice((ids for ids in candidates if len(ids) > length), size))
        else:
            pool = [_tokenise(tokenizer, source.joiner.join(texts))]
    if not pool or len(pool[0]) <= length:
        raise DataError(f"{where} has no text of more than {length} tokens; use shorter windows or longer texts")
    drawn = [pool[index % len(pool)] for index in range(size)]
    return torch.stack([ids[start : start + length] for ids in drawn for start in [rng.integers(len(ids) - length)]])


def evaluation_windows(
    corpus: Corpus, tokenizer: Any, *, length: int, data_dir: Path | None = None, bundled: bool = False
) -> Tensor:
    """Cut the evaluation split, tokenised as one text, into windows as :func:`windows_of` does.

    Raises:
        InputError: ``length`` is below 2.
        DataError: no data, or less than one window.
    """
    texts = load_texts(corpus, corpus.evaluation_split, data_dir=data_dir, bundled=bundled)[: corpus.evaluation_texts]
    where = f"{corpus.name} {corpus.evaluation_split}"
    return windows_of(corpus.joiner.join(texts), tokenizer, length, where=where)[: corpus.evaluation_windows]


def windows_of(text: str, tokenizer: Any, length: int, *, where: str = "the evaluation text") -> Tensor:
    """Cut a text into neighbouring windows, (windows, length) int64; the rest that fills no window is left out.

    Raises:
        InputError: ``length`` is below 2.
        DataError: the text has less than one window.
    """
    _require_length(length)
    ids = _tokenise(tokenizer, text)
    windows = len(ids) // length
    if windows == 0:
        raise DataError(f"{where} has {len(ids)} tokens, less than one window of {length}; use shorter windows")
    return ids[: windows * length].view(windows, length)


def read_own_text(path: Path) -> str:
    """Read a text of the user's own from a file of any type (``--calibration_file``, ``--evaluation_file``).

    Rows are joined by blank lines, as those of wikitext are.

    Raises:
        DataError: the file is missing, empty or not UTF-8, or has no column of texts.
    """
    return _OWN_JOINER.join(read_texts(path))


def require_different_files(calibration: Path, evaluation: Path) -> None:
    """Check that a model is not judged on the text that it was calibrated on, be it under another name.

    Raises:
        InputError: the two files are the same file or have the same bytes.
    """
    if filecmp.cmp(calibration, evaluation, shallow=False):
        raise InputError(
            f"--calibration_file {calibration} and --evaluation_file {evaluation} hold the same text; "
            "a model must be judged on another one than it was calibrated on"
        )


def _require_length(length: int) -> None:
    if length < 2:
        raise InputError(f"windows of {length} tokens hold nothing to predict; use at least 2")


def _tokenise(tokenizer: Any, text: str) -> Tensor:
    """Token ids of a text of any length, shape (tokens,); not verbose: the text is longer than the model's limit."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _find(corpus: Corpus, split: str, data_dir: Path | None, bundled: bool) -> Path | None:
    """The local file of a split, None when only the hub is left."""
    if data_dir is not None and not data_dir.is_dir():
        raise DataError(f"--data_dir {data_dir} is not a folder; it should hold {corpus.folder}/{split}{_ANY_SUFFIX}")
    paths = [] if data_dir is None else [data_dir / corpus.folder / f"{split}{suffix}" for suffix in SUFFIXES]
    paths += [SAMPLES / f"{corpus.folder}_{split}.parquet"] if bundled else []
    return next((path for path in paths if path.is_file()), None)


def _from_hub(corpus: Corpus, split: str, data_dir: Path | None, bundled: bool) -> list[str]:
    import datasets  # takes a second: here, for those who need it

    file = corpus.hub_files.get(split)
    hub = f"the hub's {' '.join(filter(None, corpus.hub))} {split}"
    try:
        if file is None:
            examples = datasets.load_dataset(*corpus.hub, split=split)
        else:  # by its format: the whole data set's sizes, which its card states, would not fit one file
            builder = "parquet" if file.endswith(".parquet") else "json"
            examples = datasets.load_dataset(builder, data_files={split: file}, split=split)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        given = "--data_dir is not given" if data_dir is None else f"--data_dir {data_dir} has no such file"
        samples = "" if bundled else ", or --bundled_data for an excerpt"
        raise MissingDataError(
            f"{given} and {hub} could not be loaded ({reason}); give a --data_dir that holds "
            f"{corpus.folder}/{split}{_ANY_SUFFIX}{samples}"
        ) from error
    return _column(examples, corpus, hub)


def _column(examples: "datasets.Dataset", corpus: Corpus, where: str) -> list[str]:
    if corpus.column not in examples.column_names:
        raise DataError(f"{where} has no column {corpus.column} (found: {', '.join(examples.column_names)}); rename it")
    texts: list[str] = examples[corpus.column][:]
    if not all(isinstance(text, str) for text in texts) or not any(texts):
        raise DataError(f"{where}: column {corpus.column} holds no texts, or something else than texts")
    return texts
