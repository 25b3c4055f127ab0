"""Cut the samples that come with the package from the whole data sets: `python -m benchmarks.make_samples`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from shrinkformer.dataset.calibration import sample_indices
from shrinkformer.dataset.corpora import load_texts
from shrinkformer.dataset.corpus import CORPORA, Corpus
from shrinkformer.dataset.loading import SAMPLES, load_split
from shrinkformer.dataset.tasks import get_task
from shrinkformer.errors import InputError

PAIRS = {"train": 600, "validation": 1500}
EXCERPTS = {
    "wikitext2": {"validation": 600_000, "test": 400_000},
    "ptb-new": {"train": 600_000, "test": 400_000},
    "c4-new": {"train": 600_000, "validation": 400_000},
}
"""Bytes of UTF-8 by corpus and split; wikitext2 is calibrated on its validation split, its train split is not there."""


def cut(data_dir: Path, output_dir: Path, seed: int = 0) -> list[Path]:
    """Write the STS-B sample, one parquet file per split.

    Args:
        data_dir: folder with glue/stsb/{train,validation}.parquet.
        output_dir: where the files go.
        seed: of the draw; the rows keep the order that they have in the data set.

    Returns:
        The files.

    Raises:
        DataError: the data set is not there.
        InputError: a split has fewer pairs than wanted.
    """
    task, written = get_task("stsb"), []
    output_dir.mkdir(parents=True, exist_ok=True)
    for split, pairs in PAIRS.items():
        examples = load_split(task, split, data_dir=data_dir)
        rows = sorted(sample_indices(len(examples), pairs, seed).tolist())
        kept = examples.select_columns([*task.columns, task.label_column]).select(rows)
        path = output_dir / f"{task.folder.replace('/', '_')}_{split}.parquet"
        _write({name: kept[name][:] for name in kept.column_names}, path)
        written.append(path)
    return written


def cut_corpora(data_dir: Path, output_dir: Path) -> list[Path]:
    """Write the excerpts of the language-modelling corpora, one parquet file per split.

    Args:
        data_dir: folder with wikitext2/{validation,test}, ptb/{train,test} and c4/{train,validation}.
        output_dir: where the files go.

    Returns:
        The files.

    Raises:
        DataError: a corpus is not there.
    """
    written = []
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, splits in EXCERPTS.items():
        corpus = CORPORA[name]
        for split, size in splits.items():
            texts = excerpt(corpus, split, load_texts(corpus, split, data_dir=data_dir), size)
            path = output_dir / f"{corpus.folder}_{split}.parquet"
            _write({corpus.column: texts}, path)
            written.append(path)
    return written


def excerpt(corpus: Corpus, split: str, texts: Sequence[str], size: int) -> list[str]:
    """As many texts as fit into ``size`` bytes of UTF-8, in their order.

    The first ones, so that they stay one stretch of text. Of texts that give a calibration window each, the longest
    ones: a window is drawn only from a text that is longer than itself.
    """
    order = list(range(len(texts)))
    if corpus.window_per_text and split in corpus.calibration_splits:
        order.sort(key=lambda row: -len(texts[row]))
    kept, used = [], 0
    for row in order:
        used += len(texts[row].encode())
        if used > size:
            break
        kept.append(row)
    return [texts[row] for row in sorted(kept)]


def _write(columns: dict[str, list[Any]], path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="zstd", compression_level=19)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and cut."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with glue/stsb, wikitext2, ptb and c4")
    parser.add_argument("--output_dir", type=Path, default=SAMPLES)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        written = cut(options.data_dir, options.output_dir, options.seed)
        written += cut_corpora(options.data_dir, options.output_dir)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(f"{path}: {path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
