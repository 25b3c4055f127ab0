"""Evaluation of tiny models on every kind of task."""

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from shrinkformer.dataset.encoding import Encoded, Window, encode
from shrinkformer.dataset.tasks import get_task
from shrinkformer.errors import CheckpointError, DataError, NumericalError
from shrinkformer.evaluate.evaluation import evaluate_model
from shrinkformer.utils.parallel import Workers

WORDS = [f"w{index}" for index in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        model_max_length=64, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def sentence(generator, longest=20):
    return " ".join(generator.choice(WORDS, size=generator.integers(1, longest)))


def encoded(task, tokenizer, n=13, seed=0):
    generator = np.random.default_rng(seed)
    columns = {name: [sentence(generator) for _ in range(n)] for name in task.columns}
    if task.kind == "question_answering":
        spans = [context.split() for context in columns["context"]]
        columns["id"] = [f"q{row}" for row in range(n)]
        columns["answers"] = [{"text": [words[0]], "answer_start": [0]} for words in spans]
    elif task.kind == "classification":
        columns["label"] = generator.integers(task.num_labels, size=n).tolist()
    else:
        columns["label"] = (generator.random(n) * 5).tolist()
    return encode(datasets.Dataset.from_dict(columns), task, tokenizer)


def tiny(cls, num_labels=2, **options):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=44, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, num_labels=num_labels, initializer_range=0.5, **options,
    )  # fmt: skip
    return cls(config)


class Scripted(nn.Module):
    """A model that says what it is told: ``function`` of one unpadded row of token ids, for every row of a batch."""

    def __init__(self, function, name="logits", config=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.function, self.name, self.config = function, name, config

    def forward(self, input_ids, attention_mask):
        rows = [self.function(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        return SimpleNamespace(**{self.name: torch.tensor(rows, dtype=torch.float32)})


def rows_of(*ids):
    return [{"input_ids": list(row), "attention_mask": [1] * len(row)} for row in ids]


class TestTinyModels:
    @pytest.mark.parametrize(
        ("name", "cls", "num_labels"),
        [
            ("mrpc", BertForSequenceClassification, 2),
            ("cola", BertForSequenceClassification, 2),
            ("stsb", BertForSequenceClassification, 1),
            ("squad", BertForQuestionAnswering, 2),
            ("squad_v2", BertForQuestionAnswering, 2),
            ("similarity", BertModel, 2),
        ],
    )
    def test_batch_size_and_padding_do_not_matter(self, name, cls, num_labels, tokenizer):
        task = get_task(name)
        data, model = encoded(task, tokenizer), tiny(cls, num_labels).train()
        results = [
            evaluate_model(model, tokenizer, task, {"validation": data}, batch_size=size, keep_logits=True)
            for size in (1, 5, 64)
        ]
        assert model.training
        assert all(module.training for module in model.modules())
        assert list(results[0].metrics) == [f"{metric}{end}" for metric in task.metrics for end in ("", "_stderr")]
        assert results[0].examples == 13
        assert results[0].tokens == data.tokens
        assert results[0].seconds > 0
        for other in results[1:]:
            assert other.metrics == pytest.approx(results[0].metrics, abs=1e-5)
            difference = np.nan_to_num(other.logits["validation"] - results[0].logits["validation"])
            assert np.abs(difference).max() < 2e-5

    def test_a_model_without_token_types(self, tokenizer):
        torch.manual_seed(0)
        config = DistilBertConfig(vocab_size=44, dim=16, n_layers=1, n_heads=2, hidden_dim=24)
        task = get_task("mrpc")
        data = encoded(task, tokenizer)
        assert "token_type_ids" in data.features[0]
        model = DistilBertForSequenceClassification(config)
        result = evaluate_model(model, tokenizer, task, {"validation": data})
        assert 0 < result.metrics["accuracy_stderr"] < 0.2
        assert result.logits is None

    def test_mnli_has_two_splits(self, tokenizer):
        task = get_task("mnli")
        matched, mismatched = encoded(task, tokenizer, seed=1), encoded(task, tokenizer, n=20, seed=2)
        model = tiny(BertForSequenceClassification, 3)
        splits = {"validation_mismatched": mismatched, "validation_matched": matched}
        result = evaluate_model(model, tokenizer, task, splits)
        assert set(result.metrics) == {"accuracy", "accuracy_stderr", "accuracy_mm", "accuracy_mm_stderr"}
        assert result.examples == 33
        for split, name in (("validation_matched", "accuracy"), ("validation_mismatched", "accuracy_mm")):
            alone = evaluate_model(model, tokenizer, task, {split: splits[split]})
            assert alone.metrics[name] == result.metrics[name]

    def test_progress_bar(self, tokenizer, capsys):
        task = get_task("sst2")
        data = encoded(task, tokenizer, n=4)
        evaluate_model(tiny(BertForSequenceClassification), tokenizer, task, {"validation": data}, progress=True)
        assert "sst2 validation: 4 of 4 inputs in 0:0" in capsys.readouterr().out  # whole lines: this is no terminal
        evaluate_model(tiny(BertForSequenceClassification), tokenizer, task, {"validation": data})
        assert capsys.readouterr() == ("", "")


class TestByHand:
    def test_classification(self, tokenizer):
        data = Encoded(rows_of([4], [5, 9], [6, 6, 6], [7]), [0, 1, 1, 1], None, None)
        model = Scripted(lambda ids: [0.0, float(ids[0] >= 6) - 0.5])  # predicts 0 0 1 1
        metrics = evaluate_model(model, tokenizer, get_task("mrpc"), {"validation": data}, batch_size=3).metrics
        assert metrics["accuracy"] == 0.75
        assert metrics["accuracy_stderr"] == pytest.approx(np.sqrt(0.75 * 0.25 / 4))
        assert metrics["f1"] == pytest.approx(2 * 2 / (2 + 3))

    @pytest.mark.parametrize("names", [{"CONTRADICTION": 0, "NEUTRAL": 1, "ENTAILMENT": 2}, None])
    def test_mnli_labels_go_by_their_names(self, tokenizer, names):
        data = Encoded(rows_of([4], [5], [6]), [0, 1, 2], None, None)  # entailment, neutral, contradiction
        order = [2, 1, 0] if names else [0, 1, 2]
        config = SimpleNamespace(label2id=names or {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2})
        model = Scripted(lambda ids: [float(column == order[ids[0] - 4]) for column in range(3)], config=config)
        result = evaluate_model(model, tokenizer, get_task("mnli"), {"validation_matched": data}, keep_logits=True)
        assert result.metrics["accuracy"] == 1.0
        np.testing.assert_array_equal(result.logits["validation_matched"], np.eye(3))

    def test_regression(self, tokenizer):
        labels = [0.0, 2.0, 1.0, 5.0, 4.0]
        data = Encoded(rows_of([4], [5], [6], [7], [8]), labels, None, None)
        model = Scripted(lambda ids: [float(ids[0] ** 2)])
        metrics = evaluate_model(model, tokenizer, get_task("stsb"), {"validation": data}, batch_size=2).metrics
        assert metrics["pearson"] == pytest.approx(stats.pearsonr([16, 25, 36, 49, 64], labels).statistic)
        assert metrics["spearmanr"] == pytest.approx(0.8)

    def test_similarity_is_the_cosine_of_masked_means(self, tokenizer):
        table = torch.tensor([[100.0, 100.0]] * 4 + [[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [-1.0, 0.0]])

        class Embedder(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Parameter(table)

            def forward(self, input_ids, attention_mask):
                return SimpleNamespace(last_hidden_state=self.table[input_ids])

        first, second = [[4], [4, 4, 5], [4]], [[4, 4], [6], [7]]
        data = Encoded(rows_of(*first, *second), [5.0, 3.0, 0.0], None, None)
        result = evaluate_model(
            Embedder(), tokenizer, get_task("similarity"), {"validation": data}, batch_size=4, keep_logits=True
        )
        expected = [1.0, 1.0, -1.0]  # the mean of (1, 0), (1, 0), (0, 2) points where (3, 3) does; padding is left out
        np.testing.assert_allclose(result.logits["validation"][:, 0], expected, atol=1e-6)
        assert result.examples == 3

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_question_answering(self, tokenizer, side, monkeypatch):
        monkeypatch.setattr(tokenizer, "padding_side", side)
        contexts = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9 w10 w11"]
        offsets = [[(0, 2), (3, 5), (6, 8)], [(0, 2), (3, 5)],
                   [(0, 2), (3, 5)], [(6, 8), (9, 11), (12, 15), (16, 19)]]  # fmt: skip
        windows = [
            Window(example, np.array([(-1, -1), *spans], dtype=np.int32))
            for example, spans in zip((0, 1, 2, 2), offsets, strict=True)
        ]
        answers = [{"text": text, "answer_start": [0]} for text in (["w2 w3"], ["w9"], ["the w8 w9", "w8"])]
        examples = datasets.Dataset.from_dict({"id": ["a", "b", "c"], "context": contexts, "answers": answers})
        data = Encoded(rows_of([1, 5, 6, 7], [1, 8, 9], [1, 10, 11], [1, 12, 13, 14, 15]), None, windows, examples)

        class Spans(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(1))
                # id of the first context token -> start, end, logit
                self.best = {5: (2, 3, 4.0), 8: (1, 1, 4.0), 10: (1, 2, 4.0), 12: (1, 2, 5.0)}

            def forward(self, input_ids, attention_mask):
                start, end = torch.zeros(2, *input_ids.shape)
                for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
                    begin = int(mask.argmax())
                    first, last, logit = self.best[int(ids[begin + 1])]
                    start[row, begin + first] = end[row, begin + last] = logit
                    start[row, mask == 0] = end[row, mask == 0] = 99.0  # padding must not be an answer
                return SimpleNamespace(start_logits=start, end_logits=end)

        metrics = evaluate_model(Spans(), tokenizer, get_task("squad"), {"validation": data}, batch_size=2).metrics
        assert metrics["exact_match"] == pytest.approx(100 * 2 / 3)
        assert metrics["f1"] == pytest.approx(100 * 2 / 3)
        assert metrics["f1_stderr"] == pytest.approx(stats.sem([100, 0, 100]))


class Waiting(Exception):  # noqa: N818
    """Raised where a process would wait for the others."""


class OneByOne(Workers):
    """Processes that take turns: the last one to be asked gets what all of them gathered."""

    def __init__(self, rank, parts):
        super().__init__(rank, size=3)
        object.__setattr__(self, "parts", parts)

    def gather(self, items):
        self.parts[self.rank] = list(items)
        if len(self.parts) < self.size:
            raise Waiting
        together = [None] * sum(map(len, self.parts.values()))
        for rank, part in self.parts.items():
            together[rank :: self.size] = part
        return together


@pytest.mark.parametrize(
    ("name", "cls"), [("squad", BertForQuestionAnswering), ("mrpc", BertForSequenceClassification)]
)
def test_processes_share_the_work(name, cls, tokenizer):
    task, parts = get_task(name), {}
    data, model = encoded(task, tokenizer), tiny(cls)
    arguments = (model, tokenizer, task, {"validation": data})
    for rank in (2, 1):
        with pytest.raises(Waiting):
            evaluate_model(*arguments, keep_logits=True, workers=OneByOne(rank, parts))
    shared = evaluate_model(*arguments, keep_logits=True, workers=OneByOne(0, parts))
    alone = evaluate_model(*arguments, keep_logits=True)
    assert sorted(map(len, parts.values())) == [4, 4, 5]
    assert shared.metrics == pytest.approx(alone.metrics, abs=1e-5)
    assert shared.tokens == alone.tokens
    np.testing.assert_allclose(shared.logits["validation"], alone.logits["validation"], atol=2e-5)


class TestErrors:
    def run(self, tokenizer, task, data, model=None):
        model = model or Scripted(lambda ids: [0.0, 1.0])
        return evaluate_model(model, tokenizer, get_task(task), {"validation": data})

    @pytest.mark.parametrize("labels", [None, [-1, -1], [0, -1]])
    def test_no_labels(self, tokenizer, labels):
        with pytest.raises(DataError, match=r"task sst2, validation: .*evaluate on validation data"):
            self.run(tokenizer, "sst2", Encoded(rows_of([4], [5]), labels, None, None))

    def test_too_few_examples(self, tokenizer):
        with pytest.raises(DataError, match="1 examples"):
            self.run(tokenizer, "sst2", Encoded(rows_of([4]), [0], None, None))
        with pytest.raises(DataError, match="no evaluation split"):
            evaluate_model(Scripted(lambda ids: [0.0]), tokenizer, get_task("sst2"), {})

    def test_wrong_number_of_labels(self, tokenizer):
        with pytest.raises(CheckpointError, match=r"mnli has 3 labels, the model gives outputs of shape \(2,\)"):
            self.run(tokenizer, "mnli", Encoded(rows_of([4], [5]), [0, 2], None, None))

    def test_wrong_head(self, tokenizer):
        with pytest.raises(CheckpointError, match="needs a model with last_hidden_state"):
            self.run(tokenizer, "similarity", Encoded(rows_of([4], [5], [6], [7]), [0.0, 2.0], None, None))

    def test_nan(self, tokenizer):
        data = Encoded(rows_of([4], [5]), [0, 1], None, None)
        with pytest.raises(NumericalError, match="2 of 4 outputs of the model are NaN"):
            self.run(tokenizer, "sst2", data, Scripted(lambda ids: [float("nan"), 1.0]))

    def test_the_training_mode_survives_an_error(self, tokenizer):
        model = Scripted(lambda ids: [float("nan"), 1.0]).train()
        with pytest.raises(NumericalError):
            self.run(tokenizer, "sst2", Encoded(rows_of([4], [5]), [0, 1], None, None), model)
        assert model.training

    def test_version_1_needs_answers(self, tokenizer):
        task = get_task("squad")
        columns = {"id": ["a", "b"], "question": ["w1", "w2"], "context": ["w3", "w4"],
                   "answers": [{"text": ["w3"], "answer_start": [0]}, {"text": [], "answer_start": []}]}  # fmt: skip
        data = encode(datasets.Dataset.from_dict(columns), task, tokenizer)
        with pytest.raises(DataError, match="question b has no reference answer; use --task_name squad_v2"):
            self.run(tokenizer, "squad", data, tiny(BertForQuestionAnswering))
