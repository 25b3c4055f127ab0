"""What models predict: of every head, against what torch, scipy and sentence-transformers make of the same logits."""

import warnings
from typing import Any

import pytest
import torch
from scipy import stats
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers.modeling_outputs import SequenceClassifierOutput

from shrinkformer.errors import InputError, UnsupportedModelError
from shrinkformer.prune.divergence import Judge, Target, predictions
from shrinkformer.prune.fisher import log_likelihood, output_metrics, pass_gradients
from shrinkformer.prune.objective import Logits, objective_of
from shrinkformer.prune.pruner import prune_model
from shrinkformer.prune.shrink_config import ShrinkConfig
from shrinkformer.utils.inputs import outputs_of, padded_right
from tests.conftest import ENCODERS, FAMILIES, build_model, make_batches

BATCHES = make_batches([3 + index % 18 for index in range(48)], batch_size=16)
MULTI, REGRESSION = "multi_label_classification", "regression"


def classified(logits: torch.Tensor) -> Any:
    return SequenceClassifierOutput(logits=logits)


def normal(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padded_left(batch: dict[str, Any]) -> dict[str, Any]:
    lengths = batch["attention_mask"].sum(1).tolist()
    return {
        name: torch.stack([row.roll(row.shape[-1] - length) for row, length in zip(value, lengths, strict=True)])
        for name, value in batch.items()
    }


def apart(model: Any, first: torch.Tensor, second: torch.Tensor) -> float:
    objective, mask = objective_of(model), torch.ones(len(first), 3, dtype=torch.bool)
    dense, other = (objective.predictions(classified(logits), mask) for logits in (first, second))
    return float(Target(dense).divergence(other))


class TestHeads:
    @pytest.mark.parametrize(
        ("head", "sizes", "expected"),
        [
            ("ForSequenceClassification", {"num_labels": 3}, Logits.ONE_CLASS),
            ("ForSequenceClassification", {"num_labels": 1}, Logits.NUMBERS),
            ("ForSequenceClassification", {"num_labels": 3, "problem_type": MULTI}, Logits.LABELS),
            ("ForSequenceClassification", {"num_labels": 1, "problem_type": MULTI}, Logits.LABELS),
            ("ForSequenceClassification", {"num_labels": 3, "problem_type": REGRESSION}, Logits.NUMBERS),
            ("ForSequenceClassification", {"problem_type": "single_label_classification"}, Logits.ONE_CLASS),
            ("ForMultipleChoice", {"num_labels": 1}, Logits.ONE_CLASS),  # over the choices, whatever their number
            ("ForNextSentencePrediction", {}, Logits.ONE_CLASS),
        ],
    )
    def test_rules_of_transformers(self, head: str, sizes: dict[str, Any], expected: Logits) -> None:
        assert objective_of(build_model("bert", head, **sizes)).logits is expected

    @pytest.mark.parametrize("problem", ["multi-label", "multi_label", "classification"])
    def test_others_are_refused(self, problem: str) -> None:
        model = build_model(num_labels=3)
        vars(model.config)["problem_type"] = problem  # transformers checks it where it is set, in some versions
        with pytest.raises(UnsupportedModelError, match=f"problem_type .*'{problem}'.* regression, single_label_class"):
            objective_of(model)

    def test_independent_labels_are_binary_cross_entropies(self) -> None:
        model = build_model(num_labels=4, problem_type=MULTI)
        first, second = normal(5, 4), normal(5, 4, seed=1)
        wanted = [
            float(binary_cross_entropy_with_logits(logits, first.sigmoid(), reduction="sum"))
            for logits in (second, first)
        ]
        assert apart(model, first, second) == pytest.approx(wanted[0] - wanted[1], rel=1e-5)
        assert apart(model, first, first) == pytest.approx(0, abs=1e-6)
        shifted = torch.tensor([[2.0, -3, -3, -3], [-3, -3, -3, -3]])
        assert apart(model, shifted, shifted + 4) > 7  # 7 of 8 answers are others; to a softmax nothing has changed
        assert apart(build_model(num_labels=4), shifted, shifted + 4) == pytest.approx(0, abs=1e-6)

    def test_one_class_is_a_cross_entropy(self) -> None:
        first, second = normal(5, 4), normal(5, 4, seed=1)
        wanted = sum(
            sign * float(cross_entropy(logits, first.softmax(1), reduction="sum"))
            for sign, logits in ((1, second), (-1, first))
        )
        assert apart(build_model(num_labels=4), first, second) == pytest.approx(wanted, rel=1e-5)
        for row, other in zip(first, second, strict=True):
            found = apart(build_model(num_labels=4), row[None], other[None])
            assert found == pytest.approx(stats.entropy(row.softmax(0), other.softmax(0)), rel=1e-4)

    def test_what_is_drawn_of_independent_labels(self) -> None:
        """The second moment of gradients of the log-likelihood is the Fisher information p (1 - p) of each label."""
        model = build_model(num_labels=3, problem_type=MULTI)
        objective, batch = objective_of(model), {"attention_mask": torch.ones(20_000, 2, dtype=torch.int64)}
        logits = torch.tensor([[1.0, -2.0, 0.3]]).repeat(20_000, 1).requires_grad_(True)
        generator = torch.Generator().manual_seed(0)
        (found,) = torch.autograd.grad(log_likelihood(classified(logits), batch, generator, objective), logits)
        second, p = found.T @ found / len(found), logits[0].detach().sigmoid()
        torch.testing.assert_close(second, torch.diag(p * (1 - p)), rtol=0, atol=0.02)

    def test_tokens_and_padding(self) -> None:
        for head, classes in (("ForTokenClassification", 2), ("ForMaskedLM", 46), ("LMHeadModel", 46)):
            model, batch = build_model("bert", head, is_decoder=head == "LMHeadModel"), BATCHES[0]
            mask = batch["attention_mask"].bool()
            with torch.no_grad():
                (found,) = objective_of(model).predictions(output := model(**batch), mask).parts
            torch.testing.assert_close(found, output.logits[mask].log_softmax(-1))
            assert found.shape == (int(mask.sum()), classes)

    def test_two_heads_for_pretraining(self) -> None:
        model, other = (build_model("bert", "ForPreTraining", seed=seed) for seed in range(2))
        mask = BATCHES[0]["attention_mask"].bool()
        with torch.no_grad():
            outputs = [one(**BATCHES[0]) for one in (model, other)]
        dense, found = (objective_of(model).predictions(output, mask) for output in outputs)
        tokens, following = (
            [getattr(output, name).log_softmax(-1) for output in outputs]
            for name in ("prediction_logits", "seq_relationship_logits")
        )
        wanted = (tokens[0].exp() * (tokens[0] - tokens[1])).sum(-1)[mask].sum()
        wanted += (following[0].exp() * (following[0] - following[1])).sum()
        assert float(Target(dense).divergence(found)) == pytest.approx(float(wanted), rel=1e-4)

    def test_electra_says_yes_or_no_of_each_token(self) -> None:
        model = build_model("electra", "ForPreTraining")
        mask = BATCHES[0]["attention_mask"].bool()
        with torch.no_grad():
            logits = model(**BATCHES[0]).logits
        dense, other = (objective_of(model).predictions(classified(each), mask) for each in (logits, logits + 1))
        wanted = [
            binary_cross_entropy_with_logits(each[mask], logits[mask].sigmoid(), reduction="sum")
            for each in (logits + 1, logits)
        ]
        assert float(Target(dense).divergence(other)) == pytest.approx(float(wanted[0] - wanted[1]), rel=1e-4)

    def test_choices(self) -> None:
        model = build_model("bert", "ForMultipleChoice")
        batch = {name: value.reshape(4, 4, -1) for name, value in BATCHES[0].items()}
        with torch.no_grad():
            output = model(**batch)
            (found,) = objective_of(model).predictions(output, batch["attention_mask"].bool()).parts
        torch.testing.assert_close(found, output.logits.log_softmax(-1))
        assert found.shape == (4, 4)

    def test_nothing_that_is_known(self) -> None:
        model = build_model("bert")
        with pytest.raises(UnsupportedModelError, match="with attentions; known are logits"):
            objective_of(model).predictions(type(model(**BATCHES[0]))(attentions=(torch.ones(1),)), torch.ones(1, 1))

    def test_logits_that_nobody_looks_at_are_named(self) -> None:
        model = build_model("gpt2", "DoubleHeadsModel")
        with pytest.raises(UnsupportedModelError, match="GPT2DoubleHeadsModelOutput has mc_logits"):
            prune_model(model, BATCHES, mu=0.5, method="kwon")

    def test_of_an_unknown_head_all_logits_count(self) -> None:
        mask = torch.ones(1, 3, dtype=torch.bool)
        dense, other = (predictions(classified(torch.full((1, 2), value)), mask) for value in (0.0, 4.0))
        assert float(Target(dense).divergence(other)) == pytest.approx(16)


class TestRegression:
    def test_numbers_count_by_their_spread(self) -> None:
        model = build_model(num_labels=2, problem_type=REGRESSION)
        with torch.no_grad():
            model.classifier.weight[1] *= 1000
            model.classifier.bias[1] *= 1000
            numbers = torch.cat([model(**batch).logits for batch in BATCHES])
        objective = objective_of(model).scaled(model, BATCHES)
        for scale, spread in zip(objective.scale, numbers.std(0, correction=0).tolist(), strict=True):
            assert scale / 1.5 < spread < scale * 1.5
        mask = torch.ones(len(numbers), 3, dtype=torch.bool)
        dense = Target(objective.predictions(classified(numbers), mask))
        moved = numbers.std(0, correction=0)
        costs = [
            float(dense.divergence(objective.predictions(classified(numbers + moved * unit), mask))) / len(numbers)
            for unit in torch.eye(2)
        ]
        assert all(0.25 < cost < 1 for cost in costs)  # about a half each

    def test_a_scale_rounds_nothing(self) -> None:
        """One output has no other to be compared with: the plan is what it was without a scale."""
        model = build_model(num_labels=1, initializer_range=0.3)
        assert objective_of(model).scaled(model, BATCHES).scale[0] != 1
        config = ShrinkConfig(search_seconds=0.0)
        found = prune_model(model, BATCHES, mu=0.5, config=config)
        plain = prune_model(model, BATCHES, mu=0.5, config=config, objective=type(objective_of(model))(scale=(1.0,)))
        assert found.plan.layers == plain.plan.layers
        assert found.plan.divergences != plain.plan.divergences

    def test_other_heads_have_no_scale(self) -> None:
        for head in ("ForSequenceClassification", "ForQuestionAnswering", "ForMaskedLM"):
            model = build_model("bert", head)
            assert objective_of(model).scaled(model, BATCHES).scale == ()


def metrics_of(model: Any, batches: list[dict[str, Any]]) -> torch.Tensor:
    layer = model.base_model.layers[-1].mlp.down_proj
    return output_metrics(model, {"it": layer}, batches, objective=objective_of(model), tokens=10**9)["it"]


def test_the_last_token_is_that_of_the_text() -> None:
    """A decoder's classifier looks for the last token by its id, so embeddings must not take the place of ids."""
    model = build_model("llama", "ForSequenceClassification")
    found: list[torch.Tensor] = []
    pass_gradients(
        model,
        {"it": model.base_model.layers[-1].mlp.down_proj},
        BATCHES[:1],
        lambda _, gradients: found.append(gradients.abs().sum(-1)),
        objective=objective_of(model),
    )
    last = BATCHES[0]["attention_mask"].sum(1) - 1
    assert torch.equal(found[0].nonzero()[:, 1], last)
    alone = [{name: value[row : row + 1, : last[row] + 1] for name, value in BATCHES[0].items()} for row in range(16)]
    with torch.no_grad():
        each = torch.cat([model(**one).logits for one in alone])
        torch.testing.assert_close(each, model(**BATCHES[0]).logits)


def test_padding_by_another_id() -> None:
    """What a tokenizer pads with need not be what the model looks for behind the last token."""
    model = build_model("llama", "ForSequenceClassification")
    other = [{**one, "input_ids": one["input_ids"].masked_fill(one["attention_mask"] == 0, 7)} for one in BATCHES]
    for given, same in zip(other, BATCHES, strict=True):
        with torch.no_grad():
            assert torch.equal(outputs_of(model, given).logits, model(**same).logits)
            assert not torch.equal(model(**given).logits, model(**same).logits)
    model.config.pad_token_id = None
    with pytest.raises(InputError, match="LlamaForSequenceClassification has no pad_token_id"):
        prune_model(model, BATCHES, mu=0.5)


HEADS = {
    "labels of bert": ("bert", "ForSequenceClassification", {"num_labels": 4, "problem_type": MULTI}),
    "labels of llama": ("llama", "ForSequenceClassification", {"num_labels": 3, "problem_type": MULTI}),
    "numbers": ("distilbert", "ForSequenceClassification", {"num_labels": 3, "problem_type": REGRESSION}),
    "two parts": ("bert", "ForPreTraining", {}),
    "replaced tokens": ("electra", "ForPreTraining", {}),
    "tags": ("gpt2", "ForTokenClassification", {}),
    "masked words": ("roberta", "ForMaskedLM", {}),
    "answers": ("opt", "ForQuestionAnswering", {}),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("method", ["shrink", "kwon", "kprune"])
def test_every_head_by_every_method_that_looks_at_predictions(head: str, method: str) -> None:
    family, ending, sizes = HEADS[head]
    model = build_model(family, ending, **sizes)
    found = prune_model(model, BATCHES, mu=0.5, method=method, config=ShrinkConfig(search_seconds=0.0))
    assert 0.4 < found.plan.ratio <= 0.5
    judge = Judge(model, BATCHES, objective_of(model).scaled(model, BATCHES))
    assert judge.of(model) == 0
    assert 0 < judge.of(found.model) < 20


class TestPaddingSide:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_plans_do_not_depend_on_it(self, family: str) -> None:
        model = build_model(family, **({"pad_token_id": 0} if family == "roberta" else {}))
        left = [padded_left(batch) for batch in BATCHES]
        plans = [prune_model(model, given, mu=0.6, method="stat").plan for given in (BATCHES, left)]
        assert plans[0] == plans[1]

    def test_nothing_is_moved_where_nothing_stands_on_the_left(self) -> None:
        assert all(found is given for found, given in zip(padded_right(BATCHES), BATCHES, strict=True))

    def test_choices_and_more_inputs(self) -> None:
        batch = {**BATCHES[0], "token_type_ids": BATCHES[0]["input_ids"] % 2, "rows": torch.arange(16)}
        choices = {name: value.reshape(4, 4, -1) for name, value in batch.items() if value.ndim == 2}
        left = {name: value.reshape(4, 4, -1) for name, value in padded_left(choices_of(batch)).items()}
        (found,) = padded_right([left])
        assert all(torch.equal(found[name], value) for name, value in choices.items())
        (kept,) = padded_right([{**padded_left(choices_of(batch)), "rows": batch["rows"]}])
        assert torch.equal(kept["rows"], batch["rows"])
        assert torch.equal(kept["token_type_ids"], batch["token_type_ids"])


def choices_of(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if value.ndim == 2}


@pytest.mark.parametrize("family", ENCODERS)
def test_a_model_without_a_head_says_how_it_is_judged(family: str) -> None:
    with pytest.warns(UserWarning, match="no head and no modules.json: it is judged by the mean of its tokens"):
        found = objective_of(build_model(family, "Model"))
    assert found.sentence.poolings == ("mean",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective_of(build_model(family))
