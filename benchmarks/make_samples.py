"""Cut the samples that come with the package from the whole data sets: `python -m benchmarks.make_samples`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet

from shrinkformer.dataset.calibration import sample_indices
from shrinkformer.dataset.loading import SAMPLES, load_split
from shrinkformer.dataset.tasks import get_task
from shrinkformer.errors import InputError

PAIRS = {"train": 600, "validation": 1500}


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
        table = pyarrow.table({name: kept[name][:] for name in kept.column_names})
        path = output_dir / f"{task.folder.replace('/', '_')}_{split}.parquet"
        pyarrow.parquet.write_table(table, path, compression="zstd", compression_level=19)
        written.append(path)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and cut."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with glue/stsb/{train,validation}.parquet")
    parser.add_argument("--output_dir", type=Path, default=SAMPLES)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        written = cut(options.data_dir, options.output_dir, options.seed)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(f"{path}: {path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
