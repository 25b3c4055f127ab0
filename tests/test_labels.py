"""Outputs of classifiers and labels of data, matched by name."""

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from shrinkformer.api import evaluate
from shrinkformer.commands.prune_bert import main
from shrinkformer.dataset.tasks import get_task
from shrinkformer.errors import CheckpointError, ShrinkformerWarning
from shrinkformer.evaluate.labels import label_columns, output_names, warn_below_chance
from tests.conftest import WORDS, build_model, build_tokenizer

SST2, MNLI = get_task("sst2"), get_task("mnli")


def named(*names: str) -> Any:
    return SimpleNamespace(id2label=dict(enumerate(names)), label2id={name: place for place, name in enumerate(names)})


def silently(task: Any, config: Any, examples: Any = None) -> list[int] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return label_columns(task, config, examples)


class TestNames:
    @pytest.mark.parametrize(
        ("names", "expected"),
        [
            (("negative", "positive"), [0, 1]),
            (("POSITIVE", "Negative"), [1, 0]),
            (("LABEL_0", "LABEL_1"), None),
            (("LABEL_1", "LABEL_0"), [1, 0]),  # the second label comes first
            (("0", "1"), None),
            (("1", "0"), [1, 0]),
        ],
    )
    def test_that_say_it_all(self, names: tuple[str, ...], expected: list[int] | None) -> None:
        assert silently(SST2, named(*names)) == expected

    @pytest.mark.parametrize(
        ("task", "names", "expected"),
        [
            (SST2, ("pos", "neg"), [1, 0]),
            (SST2, ("positive", "bad"), [1, 0]),  # the other one by elimination
            (MNLI, ("contra", "neutral", "entail"), [2, 1, 0]),
            (MNLI, ("neutral", "contradiction", "yes"), [2, 0, 1]),
            (get_task("rte"), ("not entail", "entail"), [1, 0]),  # one name is no beginning of the other
        ],
    )
    def test_that_are_matched_in_part(self, task: Any, names: tuple[str, ...], expected: list[int]) -> None:
        with pytest.warns(
            ShrinkformerWarning, match=rf"names its outputs {', '.join(names)}, task {task.name}"
        ) as caught:
            assert label_columns(task, named(*names)) == expected
        assert all(f"{names[column]} as " in str(caught[0].message) for column in expected)

    @pytest.mark.parametrize(("task", "names"), [(SST2, ("good", "bad")), (MNLI, ("entailment", "b", "c"))])
    def test_that_are_unknown(self, task: Any, names: tuple[str, ...]) -> None:
        """Both lists are said, and nothing is changed."""
        with pytest.warns(ShrinkformerWarning, match=rf"{', '.join(names)}, .*taken in the order in which they stand"):
            assert label_columns(task, named(*names)) is None

    def test_that_contradict_the_order_in_part(self) -> None:
        with pytest.raises(CheckpointError, match=r"a, entailment, c.*entailment stands in another place"):
            label_columns(MNLI, named("a", "entailment", "c"))

    def test_only_one_of_two_sections(self) -> None:
        """``label2id`` is optional; transformers makes one up that says nothing."""
        both = {"id2label": {0: "positive", 1: "negative"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
        assert silently(SST2, SimpleNamespace(**both)) == [1, 0]
        assert silently(SST2, SimpleNamespace(id2label={"0": "positive", "1": "negative"})) == [1, 0]
        assert silently(SST2, SimpleNamespace(label2id={"positive": 0, "negative": 1})) == [1, 0]
        default = {0: "LABEL_0", 1: "LABEL_1"}
        assert silently(SST2, SimpleNamespace(id2label=default, label2id={"positive": 0, "negative": 1})) == [1, 0]

    def test_sections_that_cannot_be_read(self) -> None:
        named_so = SimpleNamespace(id2label={0: "negative", 1: "positive"}, label2id={"negative": "x", "positive": 1})
        assert silently(SST2, named_so) == [0, 1]
        for broken in ({"id2label": {"a": "positive", "b": "negative"}}, {"label2id": {"positive": "x"}}, {}, None):
            config = None if broken is None else SimpleNamespace(**broken)
            assert output_names(config) == []
            assert silently(SST2, config) is None
        assert silently(MNLI, SimpleNamespace(id2label={0: "entailment", 1: "neutral"})) is None
        assert silently(get_task("stsb"), named("LABEL_0")) is None

    def test_data_with_names_of_its_own(self) -> None:
        def labelled(*names: str) -> datasets.Dataset:
            features = datasets.Features(
                {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
            )
            return datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [0, 1]}, features=features)

        assert silently(SST2, named("negative", "positive"), labelled("positive", "negative")) == [1, 0]
        assert silently(SST2, named("bad", "good"), labelled("good", "bad")) == [1, 0]
        assert silently(SST2, named("positive", "negative"), labelled("0", "1")) == [1, 0]  # those of GLUE


class TestChance:
    @pytest.mark.parametrize(
        ("task", "metrics", "match"),
        [
            (
                "sst2",
                {"accuracy": 0.094, "accuracy_stderr": 0.05},
                r"accuracy of the model is 0.094 .*chance \(0.500\).*order",
            ),
            ("mnli", {"accuracy": 0.2, "accuracy_stderr": 0.01}, r"chance \(0.333\)"),
            ("stsb", {"spearmanr": -0.8, "spearmanr_stderr": 0.1}, "turned round"),
            ("cola", {"matthews_correlation": -0.5, "matthews_correlation_stderr": 0.1}, r"chance \(0.000\)"),
        ],
    )
    def test_below_it(self, task: str, metrics: dict[str, float], match: str) -> None:
        with pytest.warns(ShrinkformerWarning, match=match):
            warn_below_chance(get_task(task), metrics, named("a", "b"))

    @pytest.mark.parametrize(
        ("task", "metrics"),
        [
            ("sst2", {"accuracy": 0.45, "accuracy_stderr": 0.05}),  # may be chance
            ("mnli", {"accuracy": 0.5, "accuracy_stderr": 0.0}),
            ("squad", {"f1": 1.0, "f1_stderr": 0.0}),
            ("similarity", {"spearmanr": -0.1, "spearmanr_stderr": 0.2}),
            ("sst2", {}),
        ],
    )
    def test_not_below_it(self, task: str, metrics: dict[str, float]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_below_chance(get_task(task), metrics, None)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier whose answers are the labels of its data, and that data."""
    folder = tmp_path_factory.mktemp("labels")
    model, tokenizer = build_model(initializer_range=0.5), build_tokenizer()
    texts = [f"{WORDS[index % 40]} {WORDS[(7 * index) % 40]}" for index in range(48)]
    labels = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.argmax(1).tolist()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    assert 5 < sum(labels) < 43
    for split in ("train", "validation"):
        file = folder / "data/glue/sst2" / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"sentence": text, "label": label} for text, label in zip(texts, labels, strict=True)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def renamed(work: Path, target: Path, *names: str) -> Path:
    """The classifier with other names of its outputs."""
    shutil.copytree(work / "model", target)
    config = json.loads((target / "config.json").read_text())
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: place for place, name in enumerate(names)}}
    (target / "config.json").write_text(json.dumps(config))
    return target


def flags(work: Path, folder: Path) -> list[str]:
    """Evaluate on the data of this file."""
    return f"--task_name sst2 --data_dir {work / 'data'} --output_dir {folder / 'output'} --mu 1".split()


def test_by_command_and_in_python(work: Path, tmp_path: Path, capsys: Any) -> None:
    where = flags(work, tmp_path)
    said = {}
    for place, names in enumerate((("neg", "pos"), ("awful", "fine"), ("positive", "negative"))):
        folder = renamed(work, tmp_path / f"model{place}", *names)
        assert main(["--model_name", str(folder), "--sample_batch_size", "8", *where]) == 0
        said[names] = capsys.readouterr().err
        record = json.loads((tmp_path / f"output/model{place}/sst2.jsonl").read_text())
        assert record["dense"]["metrics"]["accuracy"] == float(names[0] != "positive")
    assert "label names are read so: neg as negative, pos as positive" in said["neg", "pos"]
    assert (
        "the checkpoint names its outputs awful, fine, task sst2 its labels negative, positive" in said["awful", "fine"]
    )
    assert "accuracy of the model is 0.000 (standard error 0.000), below chance (0.500)" in said["positive", "negative"]
    model = build_model(initializer_range=0.5)
    model.config.id2label = {0: "positive", 1: "negative"}
    with pytest.warns(ShrinkformerWarning, match="below chance"):
        assert evaluate(model, build_tokenizer(), "sst2", data_dir=work / "data")["accuracy"] == 0


def test_names_that_contradict_are_refused_before_anything_runs(work: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "model"
    build_model(num_labels=3).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {0: "x", 1: "entailment", 2: "y"}, "label2id": {"x": 0, "entailment": 1, "y": 2}}
    (folder / "config.json").write_text(json.dumps(config))
    for split in ("train", "validation_matched"):
        file = tmp_path / "data/glue/mnli" / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"premise": "a cat", "hypothesis": "a dog", "label": 1}\n' * 4)
    where = ["--task_name", "mnli", "--data_dir", str(tmp_path / "data"), "--sample_batch_size", "2", "--mu", "1"]
    assert main(["--model_name", str(folder), "--dry_run", *where]) == 2
    assert "entailment stands in another place" in capsys.readouterr().err


def test_a_tokenizer_that_pads_on_the_wrong_side_is_said(work: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(work / "model", tmp_path / "model")
    build_tokenizer(pad_left=True).save_pretrained(tmp_path / "model")
    where = flags(work, tmp_path)
    found = {}
    for size in ("1", "32"):
        assert (
            main(["--model_name", str(tmp_path / "model"), "--sample_batch_size", "8", "--batch_size", size, *where])
            == 0
        )
        assert "its tokenizer pads on the left" in capsys.readouterr().err
        record = json.loads((tmp_path / "output/model/sst2.jsonl").read_text().splitlines()[-1])
        found[size] = record["dense"]["metrics"]["accuracy"]
    assert found == {"1": 1.0, "32": 1.0}
