"""Without a task a checkpoint keeps its own head, whatever that is, and is judged by its own answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import shrinkformer
from shrinkformer.architectures.heads import head_of
from shrinkformer.commands.main import main
from shrinkformer.dataset.batches import as_batches
from shrinkformer.dataset.given import Words
from shrinkformer.dataset.own_texts import read_own_texts
from shrinkformer.errors import DataError
from shrinkformer.evaluate.agreement import compare
from shrinkformer.prune.objective import objective_of
from tests.conftest import WORDS, build_model, build_tokenizer

TEXTS = [" ".join(WORDS[(5 * index + k) % len(WORDS)] for k in range(3 + index % 9)) for index in range(60)]
HEADS = {
    "ForSequenceClassification": ("text-classification", {"agreement", "divergence"}),
    "ForTokenClassification": ("token-classification", {"agreement", "divergence"}),
    "ForQuestionAnswering": ("question-answering", {"agreement", "divergence"}),
    "ForMaskedLM": ("fill-mask", {"agreement", "divergence"}),
    "ForMultipleChoice": ("multiple-choice", {"agreement", "divergence"}),
    "Model": ("feature-extraction", {"cosine", "divergence"}),
}


def checkpoint(folder: Path, family: str = "bert", head: str = "ForSequenceClassification", **sizes: Any) -> Path:
    build_model(family, head, **sizes).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def rows_file(folder: Path, head: str) -> Path:
    rows: list[dict[str, Any]] = [{"text": text, "label": "?"} for text in TEXTS]
    if head == "ForQuestionAnswering":
        rows = [{"question": text, "context": other} for text, other in zip(TEXTS, reversed(TEXTS), strict=True)]
    if head == "ForMultipleChoice":
        rows = [{"question": text, "choices": [TEXTS[0], TEXTS[index - 1], text]} for index, text in enumerate(TEXTS)]
    file = folder / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def run(command: str, *arguments: Any) -> int:
    return main([command, *map(str, arguments)])


@pytest.mark.parametrize("name", ["tokens", "words"])
def test_rows_of_words(name: str, tmp_path: Path) -> None:
    """Data for token classification: a row is one example, as its text would be."""
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([{"id": "0", name: text.split(), "ner_tags": ["O"]} for text in TEXTS]))
    (tmp_path / "mine.txt").write_text("\n".join(TEXTS))
    head = head_of("BertForTokenClassification")
    assert head is not None
    words, texts = (read_own_texts(path, head, size=99, seed=1) for path in (file, file.with_suffix(".txt")))
    assert words.calibration == [Words(tuple(str(text).split())) for text in texts.calibration]
    model, tokenizer = build_model(), build_tokenizer()
    found, wanted = (as_batches(some.judged, model, tokenizer=tokenizer) for some in (words, texts))
    assert torch.equal(found[0]["input_ids"], wanted[0]["input_ids"])
    file.write_text(json.dumps([{name: ["a"]}] * 9 + [{name: None}]))
    with pytest.raises(DataError, match=f"row 9: {name} holds None, which is no list of words"):
        read_own_texts(file, head, size=99, seed=1)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_stays(head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "m", head=head, num_labels=2 if head == "ForQuestionAnswering" else 5)
    file, out = rows_file(tmp_path, head), tmp_path / "out"
    flags = ["--method", "stat", "--mu", 0.6, "--calibration_file", file, "--output_dir", out]
    assert run("prune", "--model_name", folder, *flags) == 0
    task, figures = HEADS[head]
    said = capsys.readouterr().out
    assert f"keeps its head ({task}) and is judged by its own answers" in said
    assert "48 of 60 examples of" in said
    record = json.loads((out / "m" / f"{task}.jsonl").read_text())
    assert {name for name in record["pruned"]["metrics"] if not name.endswith("_stderr")} == figures
    assert record["dense"]["metrics"]["divergence"] == 0
    assert record["pruned"]["metrics"]["divergence"] > 0
    saved = out / "m" / f"{task}-mu0.6"
    architecture = json.loads((saved / "config.json").read_text())["architectures"]
    assert architecture == [f"Bert{head}"]
    model = shrinkformer.load(saved)
    dense = getattr(transformers, f"Bert{head}").from_pretrained(folder)
    assert {name for name, _ in model.named_children()} == {name for name, _ in dense.named_children()}
    if hasattr(dense, "classifier"):  # the head itself is as it was
        assert torch.equal(model.classifier.weight, dense.classifier.weight)


@pytest.mark.parametrize(
    ("family", "head"), [("llama", "ForSequenceClassification"), ("distilbert", "ForMultipleChoice")]
)
def test_other_families_and_bundled_texts(
    family: str, head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(tmp_path / "m", family, head)
    flags = ["--method", "stat", "--mu", 0.6, "--sample_batch_size", 32, "--output_dir", tmp_path / "out"]
    assert run("prune", "--model_name", folder, *flags) == 0
    assert "bundled sentences, which need not be like those" in capsys.readouterr().out


def test_exporting_a_model_that_chooses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "m", head="ForMultipleChoice")
    assert run("export", folder, "--output", tmp_path / "onnx") == 2
    assert "answers by choosing, and inputs of" in capsys.readouterr().err
    assert not (tmp_path / "onnx").exists()


def test_quantized_with_its_own_head(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", head="ForTokenClassification", num_labels=3)
    flags = ["--quantizer", "rtn", "--group_size", 16, "--output_dir", tmp_path / "out"]
    assert run("quantize", "--model_name", folder, "--calibration_file", rows_file(tmp_path, ""), *flags) == 0
    record = json.loads((tmp_path / "out" / "m" / "token-classification.jsonl").read_text())
    assert 0 < record["quantized"]["metrics"]["divergence"] < 1


def test_token_types_of_a_model_that_knows_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As guwenbert has it: a RoBERTa beside BERT's tokenizer. What is saved computes pairs."""
    folder = checkpoint(tmp_path / "m", "roberta", type_vocab_size=1)
    file = rows_file(tmp_path, "ForQuestionAnswering")
    flags = ["--method", "stat", "--mu", 0.6, "--calibration_file", file, "--output_dir", tmp_path / "out"]
    assert run("prune", "--model_name", folder, *flags) == 0
    assert "type_vocab_size 1); they are left out, in the saved tokenizer, too" in capsys.readouterr().err
    saved = tmp_path / "out" / "m" / "text-classification-mu0.6"
    inputs = transformers.AutoTokenizer.from_pretrained(saved)(TEXTS[0], TEXTS[1], return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert shrinkformer.load(saved)(**inputs).logits.shape == (1, 2)


@pytest.mark.parametrize(
    ("head", "flags", "message"),
    [
        ("ForSequenceClassification", ["--task_name", "similarity"], "whose head --task_name similarity would drop"),
        ("ForTokenClassification", ["--task_name", "similarity"], "leave --task_name out to prune it with its head"),
        ("ForPreTraining", [], "it is a BertForPreTraining; heads that commands know are"),
        ("ForSequenceClassification", ["--data_dir", "."], "data sets there belong to tasks; add --task_name"),
        ("ForSequenceClassification", ["--mu", "1"], "only how far another model is from it"),
        (
            "ForMultipleChoice",
            ["--export", "onnx"],
            "inputs of (examples, choices, length) are not exported",
        ),
        ("ForMultipleChoice", ["--calibration_file", "{file}"], "has no column choices, options, endings"),
        (
            "ForQuestionAnswering",
            ["--calibration_file", "{file}"],
            "question-answering needs two columns of texts (question, context)",
        ),
    ],
)
def test_refused(head: str, flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = checkpoint(tmp_path / "m", head=head), rows_file(tmp_path, "")
    given = [flag.format(file=file) for flag in flags]
    assert run("prune", "--model_name", folder, "--output_dir", tmp_path / "out", *given) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line


class TestAgreement:
    """Against oracles in numpy."""

    def test_of_classes(self) -> None:
        dense, other = build_model(num_labels=5), build_model(seed=1, num_labels=5)
        batches = as_batches([build_tokenizer()(text) for text in TEXTS], dense)
        found = compare(dense, other, batches, objective_of(dense)).metrics
        with torch.no_grad():
            logits = [torch.cat([model(**batch).logits for batch in batches]).double() for model in (dense, other)]
        equal = (logits[0].argmax(1) == logits[1].argmax(1)).numpy()
        logs = [torch.log_softmax(one, 1).numpy() for one in logits]
        assert found["agreement"] == pytest.approx(equal.mean())
        assert found["agreement_stderr"] == pytest.approx(np.sqrt(equal.mean() * (1 - equal.mean()) / len(equal)))
        assert found["divergence"] == pytest.approx((np.exp(logs[0]) * (logs[0] - logs[1])).sum(1).mean(), rel=1e-4)

    def test_of_tokens_and_of_masked_ones(self) -> None:
        dense, other = build_model("bert", "ForMaskedLM"), build_model("bert", "ForMaskedLM", seed=1)
        batches = as_batches([build_tokenizer()(text) for text in TEXTS], dense)
        for mask_id in (None, int(batches[0]["input_ids"][0, 1])):
            found = compare(dense, other, batches, objective_of(dense), mask_id=mask_id).metrics
            equal = []
            for batch in batches:
                wanted = batch["attention_mask"].bool()
                wanted = wanted if mask_id is None else wanted & (batch["input_ids"] == mask_id)
                with torch.no_grad():
                    answers = [model(**batch).logits.argmax(-1)[wanted] for model in (dense, other)]
                equal += (answers[0] == answers[1]).tolist()
            assert found["agreement"] == pytest.approx(np.mean(equal))

    def test_of_both_ends_of_an_answer(self) -> None:
        dense = build_model("bert", "ForQuestionAnswering")
        other = build_model("bert", "ForQuestionAnswering", seed=1)
        batches = as_batches([build_tokenizer()(text) for text in TEXTS], dense)
        found = compare(dense, other, batches, objective_of(dense)).metrics
        equal = []
        for batch in batches:
            hidden = batch["attention_mask"] == 0
            with torch.no_grad():
                outputs = [model(**batch) for model in (dense, other)]
            ends = [
                [one[name].masked_fill(hidden, -torch.inf).argmax(1) for name in ("start_logits", "end_logits")]
                for one in outputs
            ]
            equal += ((ends[0][0] == ends[1][0]) & (ends[0][1] == ends[1][1])).tolist()
        assert found["agreement"] == pytest.approx(np.mean(equal))

    @pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForTokenClassification"])
    def test_a_model_agrees_with_itself(self, head: str) -> None:
        model = build_model("bert", head, num_labels=4)
        batches = as_batches([build_tokenizer()(text) for text in TEXTS], model)
        found = compare(model, model, batches, objective_of(model)).metrics
        assert found["divergence"] == pytest.approx(0, abs=1e-9)
        assert found["cosine" if head == "Model" else "agreement"] == pytest.approx(1)


@pytest.mark.parametrize("command", ["prune", "quantize"])
def test_a_kind_of_answers_that_nobody_knows(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = checkpoint(tmp_path / "m") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"problem_type": "multi-label"}))
    file = rows_file(tmp_path, "ForSequenceClassification")
    assert run(command, "--model_name", "m", "--dry_run", "--calibration_file", file) == 2
    assert "problem_type in config.json is 'multi-label'; transformers knows regression" in capsys.readouterr().err
