"""The form of inputs and outputs: several choices for each example, outputs without names, caches that nobody wants."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import shrinkformer
from shrinkformer.prune.divergence import Judge
from shrinkformer.prune.objective import objective_of
from tests.conftest import build_model, make_batches

QUICK = shrinkformer.ShrinkConfig(search_seconds=0)


def with_choices(family: str = "bert", choices: int = 3) -> Any:
    """A tiny model that answers by choosing, and batches of ``(examples, choices, length)``."""
    model = build_model(family, "ForMultipleChoice")
    batches = make_batches([3 + index % 18 for index in range(16 * choices)], batch_size=8 * choices)
    return model, [{name: value.unflatten(0, (-1, choices)) for name, value in batch.items()} for batch in batches]


class TestMultipleChoice:
    @pytest.mark.parametrize("method", ["shrink", "stat", "kwon", "kprune"])
    def test_pruned_in_memory_and_back(self, method: str, tmp_path: Path) -> None:
        model, batches = with_choices()
        pruned = shrinkformer.prune_model(model, batches, mu=0.5, method=method, config=QUICK)
        assert 0.4 < pruned.plan.ratio <= 0.5
        shrinkformer.save(pruned.model, tmp_path / "smaller", plan=pruned.plan)
        again = shrinkformer.load(tmp_path / "smaller").eval()
        assert type(again).__name__ == "BertForMultipleChoice"
        assert torch.equal(again(**batches[0]).logits, pruned.model(**batches[0]).logits)
        assert again(**batches[0]).logits.shape == (8, 3)

    def test_statistics_are_those_of_its_rows(self) -> None:
        """An oracle: the encoder inside, on the same rows without choices, has the same second moments."""
        model, batches = with_choices("distilbert")
        rows = [{name: value.flatten(0, 1) for name, value in batch.items()} for batch in batches]
        ours = shrinkformer.calibrate(model, batches, method="stat")
        theirs = shrinkformer.calibrate(model.base_model, rows, method="stat")
        budget = shrinkformer.Budget(0.5, 10.0)
        assert ours.prune(budget).plan == theirs.prune(budget).plan

    def test_quantized_in_place(self) -> None:
        model, batches = with_choices("roberta")
        before = Judge(model, batches, objective_of(model))
        config = shrinkformer.QuantizeConfig(bits=8, group_size=16, also=("head",))
        found = shrinkformer.quantize_(model, batches, config)
        assert "classifier" in found.weights
        assert 0 < before.of(model) < 1e-3


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", "ForSequenceClassification"),
        ("distilbert", "ForQuestionAnswering"),
        ("electra", "Model"),
        ("gpt2", "LMHeadModel"),
        ("opt", "ForCausalLM"),
        ("llama", "ForSequenceClassification"),
    ],
)
def test_outputs_without_names(family: str, head: str, batches: list[dict[str, Any]]) -> None:
    """``"return_dict": false``, as exporters leave it in config.json, changes nothing."""
    plans = {}
    for named in (True, False):
        model = build_model(family, head)
        model.config.return_dict = named
        pruned = shrinkformer.prune_model(model, batches, mu=0.6, config=QUICK)
        plans[named] = pruned.plan
        shrinkformer.quantize_(pruned.model, batches, shrinkformer.QuantizeConfig(bits=8, group_size=8))
    assert plans[True] == plans[False]


@pytest.mark.parametrize("entry", ["output_hidden_states", "output_attentions", "use_cache"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_entries_that_add_outputs(family: str, entry: str, batches: list[dict[str, Any]]) -> None:
    plain = shrinkformer.prune_model(build_model(family), batches, mu=0.6, config=QUICK)
    model = build_model(family)
    model.set_attn_implementation("eager")
    setattr(model.config, entry, entry != "use_cache")
    pruned = shrinkformer.prune_model(model, batches, mu=0.6, config=QUICK)
    assert pruned.plan.heads == plain.plan.heads
    assert isinstance(pruned.model, transformers.PreTrainedModel)
