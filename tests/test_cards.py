"""Model cards: what the hub reads, figures, examples that run, and what stays when a run dies."""

import importlib.metadata
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from huggingface_hub import ModelCard

import shrinkformer
from shrinkformer.commands import prune_bert, prune_opt, pruning, publishing, quantize_bert, quantize_opt
from shrinkformer.commands.card_metadata import inherited, pipeline_tag, results_of
from shrinkformer.commands.locate import Source
from shrinkformer.commands.options import EncoderOptions
from shrinkformer.commands.publishing import Publisher
from shrinkformer.errors import CheckpointError, HubError, InputError
from tests.conftest import build_model, build_tokenizer
from tests.test_prune_opt import checkpoint, write_corpora

SOURCE_CARD = "---\nlicense: mit\nlanguage: [en, de]\nbase_model: someone/tiny\ntags: [theirs]\n---\n# Tiny\n"


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an encoder and data for similarity and sst2."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    words = ["the small cat sees", "a big dog", "red fish and bird", "the old man sings today"]
    for split, size in (("train", 40), ("validation", 24)):
        first, second = ([words[int(index)] for index in rng.integers(0, 4, size)] for _ in range(2))
        scores = {"sentence1": first, "sentence2": second, "label": rng.uniform(0, 5, size).tolist()}
        classes = {"sentence": first, "label": [index % 2 for index in range(size)]}
        for name, table in (("stsb", scores), ("sst2", classes)):
            (tmp_path / "data/glue" / name).mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_dict(table).to_parquet(tmp_path / f"data/glue/{name}/{split}.parquet")
    return tmp_path


def encoder(folder: Path, head: str | None = None) -> None:
    build_model(head=head).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def call(command: Any, *arguments: str) -> None:
    common = ["--data_dir", "data", "--sample_batch_size", "16"]
    assert command.main([*common, *arguments]) == 0


def run_examples(folder: Path) -> list[Any]:
    """What the examples of a card open; those that need a package which is not here are left out."""
    text = (folder / "README.md").read_text()
    opened = []
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        packages = re.findall(r"# pip install (.*)", block)
        names = [name.replace("-", "_") for line in packages for name in line.split()]
        imported = re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE)
        if all(importlib.util.find_spec(name) for name in [*names, *imported]):
            space: dict[str, Any] = {}
            exec(block, space)
            opened.append(space.get("model") or space["session"])
    return opened


class TestOfAPrunedFolder:
    def test_sentence_encoder(self, inside: Path) -> None:
        encoder(inside / "mine", "Model")
        (inside / "mine/README.md").write_text(SOURCE_CARD)
        call(prune_bert, "--model_name", "mine", "--task_name", "similarity", "--method", "stat")
        folder = Path("output/mine/similarity-mu0.5")
        card = ModelCard.load(folder / "README.md")
        assert card.data.to_dict() | {"model-index": None} == {
            "library_name": "sentence-transformers",
            "pipeline_tag": "sentence-similarity",
            "tags": ["shrinkformer", "pruned", "sentence-transformers", "feature-extraction"],
            "license": "mit",
            "language": ["en", "de"],
            "base_model": "someone/tiny",
            "model-index": None,
        }
        (record,) = (json.loads(line) for line in Path("output/mine/similarity.jsonl").read_text().splitlines())
        assert [(result.metric_type, result.dataset_type, result.dataset_config) for result in card.data.eval_results]
        found = {result.metric_type: result.metric_value for result in card.data.eval_results}
        metrics = record["pruned"]["metrics"]
        assert found == {name: round(metrics[name], 5) for name in ("spearmanr", "pearson")}
        dense = record["dense"]["metrics"]
        row = "| spearmanr on similarity | {spearmanr:.4f} ± {spearmanr_stderr:.4f} |".format(**dense)
        assert f"{row} {metrics['spearmanr']:.4f} ± {metrics['spearmanr_stderr']:.4f} |" in card.text
        for shape, value in record["pruned"]["latency_ms"].items():
            assert re.search(rf"latency, {shape} tokens \(ms, cpu\) .* {value:,.2f} \|\n", card.text)
        assert record["command"] in card.text
        assert f"torch {importlib.metadata.version('torch')}" in card.text
        for layer in record["layers"]:
            assert f"| {layer['layer']} | {layer['heads']} | {layer['neurons']} | " in card.text
        assert not list(folder.glob(".*"))  # what it was written to is gone
        models = run_examples(folder)
        assert [type(model).__name__ for model in models][:2] == ["BertModel", "BertModel"]
        assert len(models) == 2 + (importlib.util.find_spec("sentence_transformers") is not None)

    def test_classifier_and_a_run_that_dies(self, inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        encoder(inside / "mine")

        def die(*_: Any, **__: Any) -> None:
            raise CheckpointError("stopped")

        monkeypatch.setattr(pruning, "measure", die)
        flags = ("--model_name", "mine", "--task_name", "sst2", "--method", "stat", "--data_dir", "data")
        assert prune_bert.main([*flags, "--sample_batch_size", "16"]) == 1
        folder = Path("output/mine/sst2-mu0.5")
        card = ModelCard.load(folder / "README.md")
        assert card.data.pipeline_tag == "text-classification"
        assert card.data.library_name == "transformers"
        assert card.data.eval_results is None
        assert "## Measured" not in card.text
        assert "## What every layer keeps" in card.text
        assert [type(model).__name__ for model in run_examples(folder)] == ["BertForSequenceClassification"] * 2

        before = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "README.md"}
        monkeypatch.undo()
        monkeypatch.chdir(inside)
        call(prune_bert, *flags)
        text = (folder / "README.md").read_text()
        assert "## Measured" in text
        after = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "README.md"}
        assert after["model.safetensors"] == before["model.safetensors"]
        assert set(after) == set(before)

    def test_language_model_block_by_block(self, inside: Path) -> None:
        checkpoint(inside / "mine")
        write_corpora(inside / "data")
        flags = ("--model_name", "mine", "--method", "stat", "--max_memory", "0.0001")
        call(prune_opt, *flags)
        folder = Path("output/opt/mine-wikitext2-mu0.7")
        card = ModelCard.load(folder / "README.md")
        assert card.data.pipeline_tag == "text-generation"
        found = {result.dataset_type: result.metric_type for result in card.data.eval_results}
        assert found["Salesforce/wikitext"] == found["allenai/c4"] == "perplexity"
        assert "| perplexity_ptb-new on wikitext2 |" in card.text
        assert "latency" not in card.text.partition("## How it was made")[0]  # nothing was timed
        assert len(run_examples(folder)) == 2


class TestOfAQuantizedFolder:
    def test_every_format_has_figures_of_its_own(self, inside: Path) -> None:
        encoder(inside / "mine", "Model")
        formats = ["float", "compressed-tensors"]
        if importlib.util.find_spec("onnxscript") and importlib.util.find_spec("onnxruntime"):
            formats.insert(0, "onnx")  # the first one is measured
        flags = (
            "--model_name",
            "mine",
            "--task_name",
            "similarity",
            "--bits",
            "8",
            "--group_size",
            "16",
            "--quantizer",
            "rtn",
        )
        call(quantize_bert, *flags, "--format", *formats)
        for kind in formats:
            folder = Path("output/mine/similarity-w8g16" + ("" if kind == formats[0] else f"-{kind}"))
            card = ModelCard.load(folder / "README.md")
            assert "trust_remote_code" not in card.text  # stock shape
            size = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in {".safetensors", ".onnx"})
            assert re.search(rf"weight file \(MB\) \| .* \| {size / 1e6:,.2f} \|", card.text)
            assert "| 0 | `attention.self.query` | 8 |" in card.text
            assert card.data.library_name == ("onnx" if kind == "onnx" else "sentence-transformers")
            assert set(card.data.tags) >= {"shrinkformer", "quantized"}
            assert run_examples(folder)

    def test_block_by_block_after_pruning(self, inside: Path) -> None:
        checkpoint(inside / "mine", hidden_size=64, intermediate_size=128, word_embed_proj_dim=64)
        write_corpora(inside / "data")
        flags = ("--model_name", "mine", "--mu", "0.8", "--method", "stat", "--bits", "8", "--group_size", "16")
        call(quantize_opt, *flags, "--quantizer", "rtn", "--format", "float", "--max_memory", "0.0001")
        folder = Path("output/opt/mine-wikitext2-mu0.8-w8g16")
        card = ModelCard.load(folder / "README.md")
        assert card.data.tags == ["shrinkformer", "pruned", "quantized"]
        assert "## Measured" in card.text
        assert "trust_remote_code=True" in card.text
        assert len(run_examples(folder)) == 2


class TestMetadata:
    @pytest.mark.parametrize(
        ("name", "location", "base"),
        [
            ("user/model", "user/model", "user/model"),
            ("opt-125M", "facebook/opt-125m", "facebook/opt-125m"),
            ("user/model", "models/user/model/qqp", "user/model"),
            ("mine", "models/mine/qqp", None),
        ],
    )
    def test_base_model(self, name: str, location: str, base: str | None) -> None:
        found = inherited(Source(name, location, build_model().config), None)
        assert found.get("base_model") == base

    def test_nothing_is_made_up(self, tmp_path: Path) -> None:
        source = Source("mine", str(tmp_path), build_model().config)
        assert inherited(source, tmp_path) == {}
        (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
        assert inherited(source, tmp_path) == {}
        (tmp_path / "README.md").write_text(SOURCE_CARD)
        assert inherited(source, tmp_path) == {"license": "mit", "language": ["en", "de"], "base_model": "someone/tiny"}

    @pytest.mark.parametrize(
        ("architecture", "tag"),
        [
            ("BertForSequenceClassification", "text-classification"),
            ("RobertaForQuestionAnswering", "question-answering"),
            ("LlamaForCausalLM", "text-generation"),
            ("GPT2LMHeadModel", "text-generation"),
            ("BertModel", "feature-extraction"),
        ],
    )
    def test_pipeline_tags(self, architecture: str, tag: str) -> None:
        assert pipeline_tag(architecture, sentence_encoder=False) == tag

    def test_results(self) -> None:
        metrics = {"accuracy": 0.8, "accuracy_stderr": 0.1, "accuracy_mm": 0.7, "accuracy_mm_stderr": 0.1}
        matched, mismatched = results_of("mnli", metrics, "text-classification")
        assert (matched.dataset_split, mismatched.dataset_split) == ("validation_matched", "validation_mismatched")
        assert (matched.dataset_config, mismatched.metric_value) == ("mnli", 0.7)
        assert results_of("my.txt", {"perplexity": 3.0, "perplexity_my.txt": 3.0}, "text-generation") == []


class TestPublishing:
    def test_names_and_failures(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pushed, said = [], []

        def push(folder: Path, repo_id: str, *, private: bool) -> str:
            pushed.append((folder.name, repo_id, private))
            if folder.name == "b":
                raise HubError(f"{repo_id}: refused.")
            return f"https://hub/{repo_id}"

        class Saved:
            def __init__(self, name: str, kind: str) -> None:
                self.folder, self.kind = tmp_path / name, kind

        class Finished:
            mu = 0.5

        monkeypatch.setattr(publishing, "push_to_hub", push)
        monkeypatch.setattr(publishing, "finish_card", lambda *_: None)
        publisher = Publisher("me/it", private=True, several=True, report_to=(), say=said.append)
        cards: Any = [Saved("a", "float"), Saved("b", "gptq"), Saved("c", "onnx")]
        run: Any = Finished()
        publisher.take(run, cards, tmp_path)
        assert pushed == []  # not before everything is done
        with pytest.raises(
            HubError, match=r"^me/it-mu0\.5-gptq: refused\. It is saved; shrinkformer push .*b me/it-mu0"
        ):
            publisher.close()
        assert pushed == [("a", "me/it-mu0.5", True), ("b", "me/it-mu0.5-gptq", True), ("c", "me/it-mu0.5-onnx", True)]
        assert said == [
            f"pushed {tmp_path / name} to https://hub/me/it-mu0.5{ending}"
            for name, ending in (("a", ""), ("c", "-onnx"))
        ]

    def test_flags_that_do_not_fit(self) -> None:
        for given, said in (
            ({"private": True}, "--private: it is said of a repository"),
            ({"push_to_hub": "me/it", "mu": (1.0,)}, "--push_to_hub me/it: --mu 1 saves nothing"),
            ({"push_to_hub": "me/it"}, "--push_to_hub me/it: HF_HUB_OFFLINE=1 forbids"),
            ({"push_to_hub": "me/it/there"}, "--push_to_hub 'me/it/there': it is no name"),
        ):
            with pytest.raises(InputError, match=re.escape(said)):
                EncoderOptions(**given)  # type: ignore[arg-type]


def test_every_saved_folder_loads_by_its_example(inside: Path) -> None:
    """Where a folder is moved, the example names the old place; load() takes the new one."""
    encoder(inside / "mine")
    call(prune_bert, "--model_name", "mine", "--task_name", "sst2", "--method", "stat", "--save_dir", "here/small")
    text = Path("here/small/README.md").read_text()
    assert 'shrinkformer.load("here/small")' in text
    Path("here/small").rename("moved")
    assert shrinkformer.load("moved").config.shrinkformer["format"] == 1
