"""GLUE, SQuAD and similarity metrics against scikit-learn, scipy and hand-made cases; their standard errors."""

import doctest
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from shrinkformer.evaluate import standard_errors
from shrinkformer.evaluate.metrics import glue, squad
from shrinkformer.evaluate.scores import load_metric

ROOT = Path(__file__).resolve().parents[1]


def labels(n=200, seed=0, flip=0.2):
    generator = np.random.default_rng(seed)
    references = generator.integers(2, size=n)
    predictions = np.where(generator.random(n) < flip, 1 - references, references)
    return predictions, references


def values(n=150, seed=0):
    generator = np.random.default_rng(seed)
    references = np.round(generator.random(n) * 5, 1)  # ties, as in STS-B
    return np.exp(references) + generator.normal(size=n) * 10, references


def standard_error(name, predictions, references):
    return standard_errors.length(standard_errors.DEVIATIONS[name](predictions, references))


class TestGlue:
    @pytest.mark.parametrize("task", ["mrpc", "qqp"])
    def test_accuracy_and_f1_are_scikit_learns(self, task):
        predictions, references = labels()
        result = load_metric("glue", task).compute(predictions=predictions.tolist(), references=references.tolist())
        assert result == {
            "accuracy": pytest.approx(sklearn_metrics.accuracy_score(references, predictions)),
            "f1": pytest.approx(sklearn_metrics.f1_score(references, predictions)),
        }

    def test_cola_is_scikit_learns_matthews(self):
        predictions, references = labels()
        result = load_metric("glue", "cola").compute(predictions=predictions.tolist(), references=references.tolist())
        expected = sklearn_metrics.matthews_corrcoef(references, predictions)
        assert result == {"matthews_correlation": pytest.approx(expected)}

    @pytest.mark.parametrize(("module", "task"), [("glue", "stsb"), ("similarity", None)])
    def test_correlations_are_scipys_in_double_precision(self, module, task):
        predictions, references = values()
        result = load_metric(module, task).compute(predictions=predictions.tolist(), references=references.tolist())
        assert result == {
            "pearson": pytest.approx(stats.pearsonr(predictions, references).statistic, rel=1e-12),
            "spearmanr": pytest.approx(stats.spearmanr(predictions, references).statistic, rel=1e-12),
        }

    @pytest.mark.parametrize("task", ["mnli", "qnli", "sst2", "rte"])
    def test_accuracy_only(self, task):
        result = load_metric("glue", task).compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0])
        assert result == {"accuracy": 0.75}

    def test_unknown_task_is_named(self):
        with pytest.raises(ValueError, match="'mnlii'; choose one of cola"):
            load_metric("glue", "mnlii")

    @pytest.mark.parametrize("name", list(glue.FUNCTIONS))
    def test_a_constant_prediction_is_a_number_without_warnings(self, name):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            constant, references = np.zeros(6), np.array([0, 1, 0, 1, 1, 1])
            expected = 2 / 6 if name == "accuracy" else 0.0
            assert glue.FUNCTIONS[name](constant, references) == pytest.approx(expected)
            assert np.isfinite(standard_error(name, constant, references))


class TestSquad:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("The Cat", "cat"),
            ("an apple, a pear and the plum.", "apple pear and plum"),
            ("U.S.A.", "usa"),
            ("  two \t blanks\n", "two blanks"),
            ("theatre another", "theatre another"),
            ("the", ""),
            ("", ""),
            ("10-year", "10year"),
            ("Ärzte “quoted”", "ärzte “quoted”"),  # only ASCII punctuation is taken out, as officially
        ],
    )
    def test_normalisation(self, text, expected):
        assert squad.normalize_answer(text) == expected

    @pytest.mark.parametrize(
        ("prediction", "truths", "exact", "f1"),
        [
            ("the Denver Broncos", ["Denver Broncos"], 1, 1),
            ("Denver Broncos!", ["Broncos", "denver broncos"], 1, 1),
            ("Broncos", ["Denver Broncos", "the team"], 0, 2 / 3),
            ("Denver", ["Carolina Panthers"], 0, 0),
            ("in the city of Paris", ["Paris"], 0, 2 / 5),
            ("to be or not to be", ["to be"], 0, 2 * 2 / 8),
            ("to", ["to to to"], 0, 2 * 1 / 4),
        ],
    )
    @pytest.mark.parametrize("version_2", [False, True])
    def test_scores(self, prediction, truths, exact, f1, version_2):
        assert squad.question_scores(prediction, truths, version_2=version_2) == (exact, pytest.approx(f1))

    def test_empty_answers_differ_between_the_versions(self):
        assert squad.question_scores("", ["cat"]) == (0, 0)
        assert squad.question_scores("the", ["a"]) == (1, 0)  # v1.1: both empty after normalisation, no shared token
        assert squad.question_scores("the", ["a"], version_2=True) == (1, 1)  # v2.0: empty truths mean "no answer"
        assert squad.question_scores("", ["a", "cat"], version_2=True) == (0, 0)  # v2.0: the empty truth is dropped
        with pytest.raises(ValueError, match="without reference answers"):
            squad.question_scores("cat", [])

    def test_no_answer_of_version_2(self):
        assert squad.question_scores("", [], version_2=True) == (1, 1)
        assert squad.question_scores("cat", [], version_2=True) == (0, 0)
        assert squad.question_scores("", ["cat"], version_2=True) == (0, 0)

    def test_module_in_percent(self):
        truths = {"a": ["Denver Broncos", "Broncos"], "b": ["Paris"], "c": ["one two three"], "d": ["x"]}
        references = [
            {"id": name, "answers": {"text": text, "answer_start": [0] * len(text)}} for name, text in truths.items()
        ]
        texts = {"d": "y", "c": "one two", "a": "the broncos", "b": "paris"}  # in another order
        predictions = [{"id": name, "prediction_text": text} for name, text in texts.items()]
        result = load_metric("squad", "squad").compute(predictions=predictions, references=references)
        assert result == {"exact_match": 50.0, "f1": pytest.approx(100 * (1 + 1 + 0.8 + 0) / 4)}

    def test_module_with_no_answers(self):
        references = [{"id": "a", "answers": {"text": [], "answer_start": []}},
                      {"id": "b", "answers": {"text": ["cat"], "answer_start": [3]}}]  # fmt: skip
        predictions = [{"id": "a", "prediction_text": "dog", "no_answer_probability": 0.9},
                       {"id": "b", "prediction_text": "cat", "no_answer_probability": 0.4}]  # fmt: skip
        compute = load_metric("squad", "squad_v2").compute
        assert compute(predictions=predictions, references=references) == {"exact_match": 50.0, "f1": 50.0}
        result = compute(predictions=predictions, references=references, no_answer_threshold=0.5)
        assert result == {"exact_match": 100.0, "f1": 100.0}

    def test_other_questions_are_refused(self):
        with pytest.raises(ValueError, match=r"different questions, such as \['b'\]"):
            load_metric("squad").compute(
                predictions=[{"id": "a", "prediction_text": "x"}],
                references=[{"id": "b", "answers": {"text": ["x"], "answer_start": [0]}}],
            )


class TestStandardErrors:
    def test_accuracy_is_binomial(self):
        predictions, references = labels(400, flip=0.1)
        fraction = np.mean(predictions == references)
        expected = np.sqrt(fraction * (1 - fraction) / 400)
        assert standard_error("accuracy", predictions, references) == pytest.approx(expected)

    def test_mean_is_the_sample_standard_error(self):
        scores = np.array([0.0, 100.0, 50.0, 100.0])
        assert standard_errors.length(standard_errors.mean_deviations(scores)) == pytest.approx(stats.sem(scores))

    @pytest.mark.parametrize("name", ["f1", "matthews_correlation", "pearson", "spearmanr"])
    def test_against_a_plain_bootstrap(self, name):
        predictions, references = (values if name in ("pearson", "spearmanr") else labels)(400, seed=3)
        generator = np.random.default_rng(5)
        rows = generator.integers(400, size=(600, 400))
        replicates = [glue.FUNCTIONS[name](predictions[row], references[row]) for row in rows]
        result = standard_error(name, predictions, references)
        assert result == pytest.approx(np.std(replicates), rel=0.12)

    def test_same_figure_each_time_and_no_global_state(self):
        predictions, references = values()
        before = np.random.get_state()[1].copy()
        first = standard_error("spearmanr", predictions, references)
        assert first == standard_error("spearmanr", predictions, references)
        np.testing.assert_array_equal(before, np.random.get_state()[1])


@pytest.mark.parametrize("module", [squad, standard_errors])
def test_examples_in_the_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


def test_two_processes_load_offline_at_once_into_an_empty_cache(tmp_path):
    program = """
import json, socket
def refuse(*arguments): raise AssertionError("network used")
socket.socket.connect = socket.getaddrinfo = refuse
from shrinkformer.evaluate.scores import load_metric
results = []
for name, task in (("glue", "mrpc"), ("similarity", None)) * 5:
    metric = load_metric(name, task)
    results.append(metric.compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0]))
print(json.dumps(results))
"""
    environment = os.environ | {
        "HF_HOME": str(tmp_path), "HF_EVALUATE_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", program]
    processes = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    results = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert results[0] == results[1]
    assert results[0][0] == {"accuracy": 0.75, "f1": pytest.approx(2 / 3)}
    assert len(results[0]) == 10
