"""Exact match and F1 of SQuAD v1.1 and v2.0, in percent, as a Hugging Face `evaluate` module that needs no network.

Load it by path: ``hf_evaluate.load("shrinkformer/evaluate/metrics/squad.py", "squad_v2")``.

Written from the definitions of the official scorers, whose figures it reproduces: Rajpurkar et al., "SQuAD: 100,000+
Questions" (arXiv 1606.05250, section 6.1) with ``evaluate-v1.1.py``, and "Know What You Don't Know" (arXiv 1806.03822)
with ``evaluate-v2.0.py``, both at https://rajpurkar.github.io/SQuAD-explorer/. The two differ on empty texts only: v1.1
gives F1 0 to an empty answer, v2.0 gives 1 when prediction and truth are both empty; v2.0 ignores true answers that are
empty after normalisation.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

import evaluate as hf_evaluate

CONFIGURATIONS = ("default", "squad", "squad_v2")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower case, then no ASCII punctuation, then no English articles, then single blanks.

    >>> normalize_answer("The  U.S. Army,  an army")
    'us army army'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, truth: str) -> float:
    """1.0 if both texts are equal after normalisation, else 0.0."""
    return float(normalize_answer(prediction) == normalize_answer(truth))


def token_f1(prediction: str, truth: str, *, empty_may_match: bool) -> float:
    """Harmonic mean of token precision and recall of the normalised texts, tokens counted with repetition, 0..1.

    Args:
        prediction: the predicted text.
        truth: one reference text.
        empty_may_match: score two empty texts 1 (v2.0) rather than 0 (v1.1).
    """
    predicted, true = normalize_answer(prediction).split(), normalize_answer(truth).split()
    if not predicted or not true:
        return float(empty_may_match and predicted == true)
    shared = sum((Counter(predicted) & Counter(true)).values())
    return 2.0 * shared / (len(predicted) + len(true))


def question_scores(prediction: str, truths: Sequence[str], *, version_2: bool = False) -> tuple[float, float]:
    """Exact match and F1 of one question: the best over its reference answers.

    Args:
        prediction: the predicted text; empty for "no answer".
        truths: the reference texts; empty for an unanswerable question of SQuAD v2.
        version_2: the rules of v2.0 instead of v1.1.

    Returns:
        (exact match, F1), each in 0..1.

    Raises:
        ValueError: v1.1 and no reference answer.
    """
    if version_2:
        truths = [text for text in truths if normalize_answer(text)] or [""]
    if not truths:
        raise ValueError("squad: a question without reference answers; score such data with the squad_v2 rules")
    exact = max(exact_match(prediction, truth) for truth in truths)
    return exact, max(token_f1(prediction, truth, empty_may_match=version_2) for truth in truths)


class Squad(hf_evaluate.Metric):  # type: ignore[misc]
    """SQuAD exact match and F1; configurations ``squad`` (also the default) and ``squad_v2``."""

    def _info(self) -> hf_evaluate.MetricInfo:
        if self.config_name not in CONFIGURATIONS:
            raise ValueError(f"squad: no configuration {self.config_name!r}; choose one of {', '.join(CONFIGURATIONS)}")
        text, integer = datasets.Value("string"), datasets.Value("int32")
        predictions = {"id": text, "prediction_text": text}
        if self.config_name == "squad_v2":
            predictions["no_answer_probability"] = datasets.Value("float32")
        answers = {"text": datasets.List(text), "answer_start": datasets.List(integer)}
        return hf_evaluate.MetricInfo(
            description=__doc__,
            citation="Rajpurkar et al., arXiv 1606.05250 and arXiv 1806.03822",
            inputs_description="\npredictions: id, prediction_text[, no_answer_probability]; references: id, answers",
            features=datasets.Features(
                {"predictions": predictions, "references": {"id": text, "answers": answers}},
            ),
        )

    def _compute(
        self,
        predictions: Sequence[Mapping[str, Any]],
        references: Sequence[Mapping[str, Any]],
        no_answer_threshold: float = 1.0,
    ) -> dict[str, float]:
        """Mean scores in percent over the references; a question that was not predicted counts as wrong."""
        version_2 = self.config_name == "squad_v2"
        texts = {
            row["id"]: "" if row.get("no_answer_probability", 0.0) > no_answer_threshold else row["prediction_text"]
            for row in predictions
        }
        missing = [row["id"] for row in references if row["id"] not in texts]
        if missing or len(texts) != len(references):
            raise ValueError(f"squad: predictions and references hold different questions, such as {missing[:3]}")
        scores = [question_scores(texts[row["id"]], row["answers"]["text"], version_2=version_2) for row in references]
        exact, f1 = (100.0 * sum(column) / len(scores) for column in zip(*scores, strict=True))
        return {"exact_match": exact, "f1": f1}
