"""Paired standard errors of changes, against a plain bootstrap that draws the same examples for both models."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from shrinkformer.evaluate.metrics import glue
from shrinkformer.evaluate.paired import Scores, change, names_of
from shrinkformer.evaluate.perplexity import accumulate
from shrinkformer.evaluate.standard_errors import DEVIATIONS, mean_deviations
from shrinkformer.utils.parallel import Workers

COUNT = 300


def two_models(name: str, seed: int = 0) -> tuple[Any, Any, Any]:
    """References, predictions of a model, and those of one that differs on some examples."""
    generator = np.random.default_rng(seed)
    if name in ("pearson", "spearmanr"):
        references = np.round(generator.random(COUNT) * 5, 1)
        first = references + generator.normal(size=COUNT)
        return references, first, first + generator.normal(size=COUNT) * 0.4
    references = generator.integers(2, size=COUNT)
    first = np.where(generator.random(COUNT) < 0.2, 1 - references, references)
    return references, first, np.where(generator.random(COUNT) < 0.05, 1 - first, first)


def scores(name: str, predictions: Any, references: Any) -> Scores:
    return Scores.of(
        {name: glue.FUNCTIONS[name](predictions, references)}, {name: DEVIATIONS[name](predictions, references)}
    )


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews_correlation", "pearson", "spearmanr"])
@pytest.mark.parametrize("seed", [0, 1])
def test_against_a_plain_paired_bootstrap(name: str, seed: int) -> None:
    references, first, second = two_models(name, seed)
    found = change(scores(name, first, references), scores(name, second, references))
    generator = np.random.default_rng(17)
    differences = []
    for _ in range(1_000):
        rows = generator.integers(COUNT, size=COUNT)
        both = [glue.FUNCTIONS[name](some[rows], references[rows]) for some in (first, second)]
        differences.append(both[1] - both[0])
    assert found[f"{name}_stderr"] == pytest.approx(np.std(differences), rel=0.15)
    assert found[name] == glue.FUNCTIONS[name](second, references) - glue.FUNCTIONS[name](first, references)


@pytest.mark.parametrize("name", sorted(DEVIATIONS))
def test_equal_predictions_have_no_error_of_the_change(name: str) -> None:
    references, first, _ = two_models(name)
    same = scores(name, first, references)
    assert change(same, same) == {name: 0.0, f"{name}_stderr": 0.0}
    assert same.metrics[f"{name}_stderr"] > 0


def test_accuracy_is_the_exact_formula_of_paired_hits() -> None:
    references, first, second = two_models("accuracy")
    differences = (second == references).astype(float) - (first == references)
    found = change(scores("accuracy", first, references), scores("accuracy", second, references))
    assert found["accuracy_stderr"] == pytest.approx(np.std(differences) / np.sqrt(COUNT), rel=1e-12)


def test_scores_of_questions() -> None:
    first, second = np.random.default_rng(0).random((2, 50)) * 100
    both = [Scores.of({"f1": some.mean()}, {"f1": mean_deviations(some)}) for some in (first, second)]
    assert change(*both)["f1_stderr"] == pytest.approx(stats.sem(second - first), rel=1e-12)


class TestPerplexity:
    def logits(self, seed: int) -> torch.Tensor:
        return torch.randn(40, 12, 7, generator=torch.Generator().manual_seed(seed))

    def test_against_a_plain_paired_bootstrap(self) -> None:
        ids = torch.randint(7, (40, 12), generator=torch.Generator().manual_seed(5))
        base = self.logits(0)
        models = [base, base + 0.3 * self.logits(1)]
        both = [accumulate([(ids, logits)]) for logits in models]
        found = change(*(Scores({"perplexity": one.value}, {"perplexity": one.deviations}) for one in both))
        generator = torch.Generator().manual_seed(9)
        differences = []
        for _ in range(400):
            rows = torch.randint(40, (40,), generator=generator)
            values = [accumulate([(ids[rows], logits[rows])]).value for logits in models]
            differences.append(values[1] - values[0])
        assert found["perplexity_stderr"] == pytest.approx(np.std(differences), rel=0.15)
        assert [np.linalg.norm(one.deviations) for one in both] == pytest.approx([one.stderr for one in both])

    def test_windows_of_several_processes_keep_their_order(self) -> None:
        ids = torch.randint(7, (5, 12), generator=torch.Generator().manual_seed(5))
        logits = self.logits(0)[:5]
        whole = accumulate([(ids, logits)]).deviations

        class Two(Workers):
            """The first of two processes; the other one's part of every sum is put in by hand."""

            def sum_(self, *tensors: torch.Tensor) -> None:
                other = accumulate([(ids[1::2], logits[1::2])])
                if tensors[0].numel() == 4:
                    tensors[0].add_(torch.tensor([other.nll * other.tokens, other.tokens, other.windows, 0.0]))

            def gather(self, items: Any) -> list[Any]:
                return list(items)

        mine = accumulate([(ids[::2], logits[::2])], Two(0, 2)).deviations
        assert mine == pytest.approx(whole[::2], rel=1e-6)

    def test_one_window_has_none(self) -> None:
        ids = torch.randint(7, (1, 12))
        assert accumulate([(ids, self.logits(0)[:1])]).deviations.tolist() == [0.0]


class TestScores:
    def test_json_keeps_every_bit(self) -> None:
        references, first, _ = two_models("f1")
        found = scores("f1", first, references)
        again = Scores.from_json(json.loads(json.dumps(found.to_json())))
        assert again == found
        assert (again.deviations["f1"] == found.deviations["f1"]).all()

    @pytest.mark.parametrize("found", ["x", {}, [1], {"metrics": {}}, {"metrics": {"a": None}, "deviations": {}}])
    def test_json_of_something_else(self, found: Any) -> None:
        with pytest.raises(ValueError, match="evaluation"):
            Scores.from_json(found)

    def test_what_cannot_be_paired_has_no_error(self) -> None:
        few, many = (Scores({"a": 1.0, "b": 2.0}, {"a": np.ones(count)}) for count in (2, 3))
        assert change(few, many) == {"a": 0.0, "b": 0.0}
        assert change(few, Scores({"new": 1.0})) == {}

    def test_endings(self) -> None:
        found = Scores.of({"accuracy": 0.5}, {"accuracy": np.ones(4)}).renamed("_mm")
        assert found.metrics == {"accuracy_mm": 0.5, "accuracy_mm_stderr": 2.0}
        assert list(found.deviations) == names_of(found.metrics) == ["accuracy_mm"]
