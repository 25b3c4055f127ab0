"""Pruning and evaluating what is in memory: in place, from loaders, inside a Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

import shrinkformer
from shrinkformer.api import PruneCallback, PruneConfig, evaluate, prune_
from shrinkformer.dataset.batches import as_batches
from shrinkformer.errors import InputError
from tests import dataset_fixtures as made
from tests.conftest import build_model, build_tokenizer

WORDS = len(made.bert_tokenizer())
STAT = PruneConfig(mu=0.5, method="stat")


def loader(size: int = 48, batch_size: int = 16, *, labels: bool = True) -> DataLoader[Any]:
    tokenizer = made.bert_tokenizer()
    examples = made.pairs(size)
    rows = [
        {**tokenizer(row["sentence1"], row["sentence2"]), **({"labels": index % 2} if labels else {})}
        for index, row in enumerate(examples)
    ]
    return DataLoader(rows, batch_size=batch_size, collate_fn=DataCollatorWithPadding(tokenizer))  # type: ignore[arg-type]


class TestPruneInPlace:
    def test_whoever_holds_the_model_holds_the_smaller_one(self, tmp_path: Path) -> None:
        class Mine(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.encoder = build_model("bert", "Model", vocab_size=WORDS)
                self.head = nn.Linear(32, 3)

            def forward(self, **inputs: Any) -> torch.Tensor:
                return self.head(self.encoder(**inputs).last_hidden_state[:, 0])

        mine, kind = Mine().train(), type(build_model("bert", "Model", vocab_size=WORDS))
        before = sum(parameter.numel() for parameter in mine.parameters())
        plan = prune_(mine.encoder, loader(), STAT)
        assert 0.4 < plan.ratio <= 0.5
        assert sum(parameter.numel() for parameter in mine.parameters()) < 0.8 * before
        assert mine.encoder.training
        assert isinstance(mine.encoder, kind)
        assert type(mine.encoder).__name__ == kind.__name__
        mine.eval()
        batch = next(iter(loader(labels=False)))
        assert mine(**batch).shape == (16, 3)
        shrinkformer.save(mine.encoder, tmp_path / "smaller", plan=plan)
        again = shrinkformer.load(tmp_path / "smaller").eval()
        assert torch.equal(again(**batch)[0], mine.encoder(**batch)[0])

    def test_same_as_prune_model(self) -> None:
        model, same = build_model(vocab_size=WORDS), build_model(vocab_size=WORDS)
        batches = as_batches(loader(), model)
        plan = prune_(model, loader(), STAT)
        wanted = shrinkformer.prune_model(same, batches, mu=0.5, method="stat")
        assert plan == wanted.plan
        assert torch.equal(model(**batches[0]).logits, wanted.model(**batches[0]).logits)

    def test_default_method(self) -> None:
        model = build_model(vocab_size=WORDS)
        plan = prune_(model, loader(), PruneConfig(shrink=shrinkformer.ShrinkConfig(search_seconds=0)))
        assert plan.method in {"shrink", "stat"}
        assert plan.ratio <= 0.5

    def test_full_size_keeps_the_logits(self) -> None:
        model, batch = build_model(vocab_size=WORDS), next(iter(loader(labels=False)))
        before = model(**batch).logits
        assert prune_(model, loader(), PruneConfig(mu=1.0, method="stat")).ratio == 1
        assert torch.allclose(model(**batch).logits, before, atol=1e-5)

    def test_a_model_that_was_pruned(self) -> None:
        model = build_model(vocab_size=WORDS)
        first = prune_(model, loader(), STAT)
        second = prune_(model, loader(), STAT)
        assert second.macs <= 0.5 * first.macs


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mu": 0.0}, r"--mu 0.0: must be in \(0, 1\]"),
        ({"method": "best"}, "'best'"),
        ({"examples": 0}, "examples is 0"),
        ({"round_to": 0}, "--round_to 0"),
    ],
)
def test_configurations_that_make_no_sense(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PruneConfig(**wrong)


def test_inside_a_trainer(tmp_path: Path) -> None:
    model = build_model(vocab_size=WORDS)
    callback = PruneCallback(STAT)
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path / "run"), max_steps=2, report_to=[], use_cpu=True, save_strategy="no"),
        train_dataset=loader().dataset,
        data_collator=loader().collate_fn,
        callbacks=[callback],
    )
    trainer.train()
    assert callback.plan is not None
    assert 0.4 < callback.plan.ratio <= 0.5
    assert trainer.model is model
    shrinkformer.save(model, tmp_path / "smaller", plan=callback.plan)
    predicted = trainer.predict(trainer.train_dataset).predictions
    again = shrinkformer.load(tmp_path / "smaller").eval()
    batch = next(iter(loader(labels=False)))
    assert torch.allclose(again(**batch).logits, torch.tensor(predicted[:16]), atol=1e-5)


class TestEvaluate:
    def test_an_encoder(self, tmp_path: Path) -> None:
        model, tokenizer = build_model("bert", "Model", vocab_size=WORDS), made.bert_tokenizer()
        found = evaluate(model, tokenizer, "similarity", bundled_data=True)
        assert set(found) >= {"spearmanr", "spearmanr_stderr", "pearson"}

    def test_a_decoder(self, tmp_path: Path) -> None:
        (tmp_path / "ptb").mkdir()
        for split in ("train", "test"):
            (tmp_path / "ptb" / f"{split}.txt").write_text("the cat sees a bird\nthe dog never sleeps\n" * 60)
        model, tokenizer = build_model("opt"), build_tokenizer()
        found = evaluate(model, tokenizer, "ptb-new", data_dir=tmp_path)
        assert found["perplexity"] > 1
        assert found["perplexity_stderr"] > 0

    def test_a_task_that_is_none(self) -> None:
        with pytest.raises(InputError, match="task 'sst3' is not known; choose one of mnli"):
            evaluate(build_model(vocab_size=WORDS), made.bert_tokenizer(), "sst3")
