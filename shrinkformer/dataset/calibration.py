"""Drawing the examples that pruning and quantization look at: same seed, same sample, whatever the batch size."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shrinkformer.dataset.encoding import Encoded, encode, encode_texts, length_limit
from shrinkformer.dataset.tasks import Task
from shrinkformer.errors import DataError, InputError

if TYPE_CHECKING:
    import datasets


def sample_indices(population: int, size: int, seed: int) -> npt.NDArray[np.int64]:
    """Draw indices without replacement.

    The sample is the head of a seeded permutation, so a larger sample of the same seed contains the smaller one.

    Args:
        population: how many examples there are.
        size: how many to draw.
        seed: of a generator of its own; no global state is read or changed.

    Returns:
        Shape (size,), distinct, in drawing order.

    Raises:
        InputError: ``size`` is not positive or exceeds ``population``, or ``seed`` is negative.

    Examples:
        >>> small, large = sample_indices(1000, 3, seed=0), sample_indices(1000, 5, seed=0)
        >>> bool((small == large[:3]).all()), len(set(large.tolist()))
        (True, 5)
    """
    if seed < 0:
        raise InputError(f"--seed {seed} must not be negative")
    if size < 1:
        raise InputError(f"--sample_batch_size {size} must be at least 1")
    if size > population:
        raise InputError(
            f"--sample_batch_size {size} exceeds the {population} calibration examples there are; "
            f"pass {population} or less, or give more examples"
        )
    return np.random.default_rng(seed).permutation(population)[:size].astype(np.int64)


def sample_calibration(
    examples: "datasets.Dataset",
    task: Task,
    tokenizer: Any,
    *,
    size: int,
    seed: int,
    max_length: int | None = None,
    prepare: Callable[[str], str] = str,
) -> Encoded:
    """Draw calibration examples and tokenise them.

    Args:
        examples: what to draw from; labels are kept where they are there, and not needed.
        task: the task. An example is a row: a question with all its windows, a pair of sentences that are read one by
            one (similarity), or a single sentence where the rows have no second one.
        tokenizer: a transformers tokenizer.
        size: examples to draw (``--sample_batch_size``).
        seed: of the draw.
        max_length: a limit below the task's own, in tokens.
        prepare: what a sentence encoder does to each text first (similarity only).

    Returns:
        The encoded sample; ``examples`` in it holds the drawn rows only, in drawing order.

    Raises:
        InputError: ``size`` exceeds the examples.
        DataError: the examples lack a text column.
    """
    indices = sample_indices(len(examples), size, seed)
    drawn = examples.select(indices)
    if task.kind != "similarity":
        return encode(drawn, task, tokenizer, max_length=max_length)
    columns = [name for name in task.columns if name in drawn.column_names]
    if not columns:
        raise DataError(f"the examples have none of the columns {', '.join(task.columns)}; task {task.name} needs one")
    sentences = [prepare(text) for row in zip(*(drawn[name] for name in columns), strict=True) for text in row]
    limit = length_limit(task, tokenizer, max_length)
    return Encoded(encode_texts(sentences, tokenizer, limit), None, None, drawn)
