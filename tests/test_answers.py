"""The choice of SQuAD answers from start and end logits, against the rule written as loops."""

import time

import numpy as np
import pytest

from shrinkformer.dataset.encoding import Window
from shrinkformer.errors import DataError
from shrinkformer.evaluate.answers import extract_answers


def plain_answers(start, end, windows, contexts, *, threshold=None, n_best=20, longest=30):
    """The rule written as loops."""
    best, null = {}, {}
    for row, window in enumerate(windows):
        tokens = range(len(window.offsets))
        null.setdefault(window.example, []).append(start[row][0] + end[row][0])
        for first in sorted(tokens, key=lambda position: -start[row][position])[:n_best]:
            for last in sorted(tokens, key=lambda position: -end[row][position])[:n_best]:
                inside = window.offsets[first][0] >= 0 and window.offsets[last][0] >= 0
                if inside and first <= last < first + longest:
                    begin, stop = window.offsets[first][0], window.offsets[last][1]
                    candidate = (start[row][first] + end[row][last], contexts[window.example][begin:stop])
                    best.setdefault(window.example, []).append(candidate)
    texts = []
    for question in range(len(contexts)):
        score, text = max(best.get(question, [(-np.inf, "")]))
        none = threshold is not None and min(null.get(question, [0])) - score > threshold
        texts.append("" if none else text)
    return texts


def random_windows(questions, length, seed=0, windows_each=2):
    generator = np.random.default_rng(seed)
    windows = []
    for question in range(questions):
        for _ in range(windows_each):
            tokens = int(generator.integers(length // 2, length + 1))
            offsets = np.stack((np.arange(tokens) * 2, np.arange(tokens) * 2 + 1), axis=1).astype(np.int32)
            offsets[: tokens // 4] = -1
            offsets[-1] = -1
            windows.append(Window(question, offsets))
    start, end = generator.normal(size=(2, len(windows), length)).astype(np.float32)
    contexts = ["".join(generator.choice(list("abcdefgh"), size=2 * length)) for _ in range(questions)]
    return start, end, windows, contexts


class TestAnswers:
    @pytest.mark.parametrize("limits", [(20, 30), (3, 30), (20, 2), (1, 1)])
    @pytest.mark.parametrize("threshold", [None, 0.0, -2.0, 1.5])
    def test_against_plain_loops(self, limits, threshold):
        start, end, windows, contexts = random_windows(40, 50)
        n_best, longest = limits
        answers = extract_answers(
            start, end, windows, contexts, allow_no_answer=threshold is not None, no_answer_threshold=threshold or 0.0,
            n_best=n_best, max_answer_length=longest,
        )  # fmt: skip
        expected = plain_answers(start, end, windows, contexts, threshold=threshold, n_best=n_best, longest=longest)
        assert [answer.text for answer in answers] == expected
        assert len(set(expected)) >= 3

    def test_what_lies_behind_a_window_is_ignored(self):
        start, end, windows, contexts = random_windows(10, 30)
        clean = extract_answers(start, end, windows, contexts)
        for row, window in enumerate(windows):
            start[row, len(window.offsets) :] = end[row, len(window.offsets) :] = np.nan
        assert extract_answers(start, end, windows, contexts) == clean

    def test_a_question_without_a_span_is_not_answered(self):
        window = Window(0, np.full((3, 2), -1, dtype=np.int32))
        answers = extract_answers(np.zeros((1, 3), np.float32), np.zeros((1, 3), np.float32), [window], ["ab", "cd"])
        assert [answer.text for answer in answers] == ["", ""]

    def test_no_answer_is_judged_at_the_classification_token(self):
        window = Window(0, np.array([(0, 2), (3, 5), (-1, -1)], dtype=np.int32))  # classification token last
        logits = np.array([[1.0, 0.0, 3.0]], dtype=np.float32)
        options = {"allow_no_answer": True, "null_positions": np.array([2])}
        answer = extract_answers(logits, logits, [window], ["ab cd"], **options)[0]
        assert (answer.text, answer.score, answer.no_answer_margin) == ("", 2.0, 4.0)
        answer = extract_answers(logits, logits, [window], ["ab cd"], no_answer_threshold=4.5, **options)[0]
        assert answer.text == "ab"

    def test_shapes_must_fit(self):
        with pytest.raises(DataError, match="0 windows do not fit"):
            extract_answers(np.zeros((1, 3), np.float32), np.zeros((1, 3), np.float32), [], [])

    def test_a_tenth_of_squad_takes_seconds(self):
        start, end, windows, contexts = random_windows(1057, 384, windows_each=1)
        began = time.perf_counter()
        extract_answers(start, end, windows, contexts)
        assert time.perf_counter() - began < 6.0
