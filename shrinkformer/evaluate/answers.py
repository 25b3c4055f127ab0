"""From start and end logits to the text of an answer, for contexts that were cut into overlapping windows.

The rule of Devlin et al., "BERT" (arXiv 1810.04805, sections 4.2 and 4.3): the answer is the span of context tokens
with the highest sum of start and end logit, among spans of at most ``max_answer_length`` tokens whose ends are both
among the ``n_best`` highest logits of their window. For SQuAD v2 the score of "no answer" is the sum of both logits of
the classification token, its minimum over the windows of a question; it wins when it exceeds the best span by more
than a threshold.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shrinkformer.dataset.encoding import Window
from shrinkformer.errors import DataError

_IMPOSSIBLE = -np.inf
_CHUNK = 2048
"""Windows searched at once: 2048 x 384 float32 scores are 3 MB."""


@dataclass(frozen=True)
class Answer:
    """The predicted answer of one question."""

    text: str
    """Part of the context, or empty for "no answer"."""
    score: float
    """Start plus end logit of the best span; -inf if there was none."""
    no_answer_margin: float
    """Score of "no answer" minus ``score``; positive where "no answer" is the more likely."""


@dataclass(frozen=True)
class _Spans:
    """Best span of each window: first and last token (inclusive) and score, arrays of shape (windows,)."""

    first: NDArray[np.int64]
    last: NDArray[np.int64]
    score: NDArray[np.float32]


def extract_answers(
    start_logits: NDArray[np.float32],
    end_logits: NDArray[np.float32],
    windows: Sequence[Window],
    contexts: Sequence[str],
    *,
    allow_no_answer: bool = False,
    no_answer_threshold: float = 0.0,
    null_positions: NDArray[np.int64] | None = None,
    n_best: int = 20,
    max_answer_length: int = 30,
) -> list[Answer]:
    """Choose the best answer of every question.

    Args:
        start_logits: (windows, positions), token 0 of each window first; what lies behind a window's last token is
            ignored.
        end_logits: as ``start_logits``.
        windows: where the tokens of each row of the logits stand in which context.
        contexts: context of each question; ``Window.example`` is an index into it.
        allow_no_answer: SQuAD v2: the empty text may win.
        no_answer_threshold: how much the score of "no answer" must exceed the best span's.
        null_positions: (windows,) position of the classification token; 0 everywhere if not given.
        n_best: how many starts and ends of a window may take part.
        max_answer_length: in tokens.

    Returns:
        One answer per context; a question without any possible span gets the empty text.

    Raises:
        DataError: logits and windows do not fit each other.
    """
    if start_logits.shape != end_logits.shape or len(start_logits) != len(windows):
        raise DataError(
            f"{len(windows)} windows do not fit start and end logits of shapes {start_logits.shape}, {end_logits.shape}"
        )
    spans = _best_spans(start_logits, end_logits, windows, n_best, max_answer_length)
    null = _null_scores(start_logits, end_logits, null_positions)
    best: dict[int, int] = {}
    null_score: dict[int, float] = {}
    for row, window in enumerate(windows):
        question = window.example
        null_score[question] = min(float(null[row]), null_score.get(question, np.inf))
        if question not in best or spans.score[row] > spans.score[best[question]]:
            best[question] = row
    answers = []
    for question, context in enumerate(contexts):
        if question not in best or spans.score[best[question]] == _IMPOSSIBLE:
            answers.append(Answer("", _IMPOSSIBLE, np.inf))
            continue
        row = best[question]
        score = float(spans.score[row])
        margin = null_score[question] - score
        offsets = windows[row].offsets
        text = context[int(offsets[spans.first[row]][0]) : int(offsets[spans.last[row]][1])]
        answers.append(Answer("" if allow_no_answer and margin > no_answer_threshold else text, score, margin))
    return answers


def _null_scores(
    start_logits: NDArray[np.float32], end_logits: NDArray[np.float32], positions: NDArray[np.int64] | None
) -> NDArray[np.float32]:
    """Start plus end logit of the classification token of each window: (windows,)."""
    rows = np.arange(len(start_logits))
    columns = np.zeros(len(rows), dtype=np.int64) if positions is None else positions
    total: NDArray[np.float32] = start_logits[rows, columns] + end_logits[rows, columns]
    return total


def _best_spans(
    start_logits: NDArray[np.float32],
    end_logits: NDArray[np.float32],
    windows: Sequence[Window],
    n_best: int,
    max_answer_length: int,
) -> _Spans:
    """Best span of every window, a chunk of windows at a time."""
    chunks = []
    for begin in range(0, len(windows), _CHUNK):
        rows = slice(begin, begin + _CHUNK)
        inside, present = _token_masks(windows[rows], start_logits.shape[1])
        start = _keep_highest(np.where(present, start_logits[rows], _IMPOSSIBLE), n_best)
        end = _keep_highest(np.where(present, end_logits[rows], _IMPOSSIBLE), n_best)
        start[~inside] = _IMPOSSIBLE
        end[~inside] = _IMPOSSIBLE
        chunks.append(_search(start, end, max_answer_length))
    if not chunks:
        empty = np.zeros(0, dtype=np.int64)
        return _Spans(empty, empty, np.zeros(0, dtype=np.float32))
    return _Spans(*(np.concatenate(parts) for parts in zip(*chunks, strict=True)))


def _token_masks(windows: Sequence[Window], positions: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Two (windows, positions) masks: tokens of the context, and tokens at all (the rest is padding)."""
    inside = np.zeros((len(windows), positions), dtype=np.bool_)
    present = np.zeros_like(inside)
    for row, window in enumerate(windows):
        tokens = len(window.offsets)
        inside[row, :tokens] = np.asarray(window.offsets)[:, 0] >= 0
        present[row, :tokens] = True
    return inside, present


def _keep_highest(logits: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Set all but the ``count`` highest logits of each row (more where several tie) to -inf."""
    if count >= logits.shape[1]:
        return logits
    least = np.partition(logits, -count, axis=1)[:, -count, None]
    return np.where(logits >= least, logits, np.float32(_IMPOSSIBLE))


def _search(
    start: NDArray[np.float32], end: NDArray[np.float32], max_answer_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """First token, last token and score of each row's best span; one vectorised step per span length."""
    rows, positions = np.arange(len(start)), start.shape[1]
    first, length = np.zeros(len(start), dtype=np.int64), np.zeros(len(start), dtype=np.int64)
    score = np.full(len(start), _IMPOSSIBLE, dtype=np.float32)
    for extra in range(min(max_answer_length, positions)):
        total = start[:, : positions - extra] + end[:, extra:]
        where = total.argmax(axis=1)
        better = total[rows, where] > score
        first[better], length[better], score[better] = where[better], extra, total[rows, where][better]
    return first, first + length, score
