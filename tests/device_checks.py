"""Models on an accelerator, as far as a pretend one can tell: no tensor is left where another is not."""

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn
from torch.nn import functional

import shrinkformer
from shrinkformer.architectures import layer_views
from shrinkformer.commands import prune_bert, prune_opt, quantize_opt
from shrinkformer.dataset.encoding import encode
from shrinkformer.dataset.tasks import get_task
from shrinkformer.efficiency.latency import measure_latency
from shrinkformer.efficiency.rounding import choose_multiple
from shrinkformer.evaluate.evaluation import evaluate_model
from shrinkformer.evaluate.perplexity import evaluate_perplexity
from shrinkformer.export.tracing import float_copy
from shrinkformer.prune import pooling
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.divergence import Judge
from shrinkformer.prune.fisher import output_metrics
from shrinkformer.prune.latency_table import LatencyTable
from shrinkformer.prune.methods import METHOD_NAMES
from shrinkformer.prune.objective import Objective, objective_of
from shrinkformer.prune.pooling import SentenceHead
from shrinkformer.prune.pruner import calibrate
from shrinkformer.prune.result import Pruned
from shrinkformer.prune.shrink_config import ShrinkConfig
from shrinkformer.quantize.checkpoint import save as save_quantized
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.quantizer import quantize_
from tests import dataset_fixtures
from tests.conftest import build_model, build_tokenizer, make_batches
from tests.pretend_device import NAME, Pretend, on_the_device
from tests.test_commands import sentences
from tests.test_prune_opt import write_corpora

BATCHES = make_batches([3 + index % 18 for index in range(16)], batch_size=8)
WHOLE = make_batches([12] * 16, batch_size=8)
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

MISTAKES: dict[str, Callable[[torch.Tensor], object]] = {
    "add": lambda x: x + torch.ones(4, 3),
    "index_select": lambda x: x.index_select(0, torch.tensor([1])),
    "masked_fill": lambda x: x.masked_fill(torch.ones(4, 3, dtype=torch.bool), 0.0),
    "matmul": lambda x: x @ torch.ones(3, 2),
    "cat": lambda x: torch.cat([x, torch.ones(1, 3)]),
    "CPU indexed by the device": lambda x: torch.arange(4)[torch.tensor([0], device=NAME)],
    "CPU values put in": lambda x: x.index_put_((torch.tensor([0]),), torch.ones(3)),
    "numpy": lambda x: x.numpy(),
    "generator": lambda x: torch.rand(3, generator=torch.Generator().manual_seed(0), device=NAME),
}


@pytest.fixture(autouse=True)
def pretend() -> Iterator[None]:
    """Every test of this file runs beside the device, and with warnings that are not about it silenced."""
    with warnings.catch_warnings(), Pretend() as mistakes:
        warnings.simplefilter("ignore")
        yield
    assert not mistakes or list(mistakes) == ["outside"]


def there(family: str = "bert", head: str | None = None, **sizes: Any) -> Any:
    return build_model(family, head, **SIZES | sizes).to(NAME)


class TestPretendDevice:
    @pytest.mark.parametrize("name", MISTAKES)
    def test_mistakes_are_caught(self, name: str) -> None:
        with pytest.raises((RuntimeError, TypeError)):
            MISTAKES[name](torch.randn(4, 3).to(NAME))

    def test_what_cuda_takes_is_taken(self) -> None:
        x, weight = torch.ones(4, 3).to(NAME), torch.ones(2, 3, device=NAME, requires_grad=True)
        assert x.is_cuda
        assert (x * torch.tensor(2.0)).sum().item() == 24.0
        assert x[torch.tensor([0, 1])].shape == (2, 3)
        assert x.new_tensor([1.0]).device.type == torch.zeros(3, device=NAME).device.type == NAME
        x[1:3].add_(1.0)
        assert x.cpu().tolist() == [[1.0] * 3, [2.0] * 3, [2.0] * 3, [1.0] * 3]
        functional.linear(x, weight).square().sum().backward()
        assert weight.grad is not None
        assert weight.grad.device.type == NAME

    def test_autocast_is_that_of_cuda(self) -> None:
        x, weight = torch.randn(4, 3, device=NAME), torch.randn(3, 3, device=NAME)
        with torch.autocast(NAME, torch.bfloat16):
            product = functional.linear(x, weight)
            assert product.dtype == torch.bfloat16
            assert functional.layer_norm(product, (3,)).dtype == torch.float32
        assert functional.linear(x, weight).dtype == torch.float32


def pruned(model: Any, method: str = "shrink", batches: Any = BATCHES, seconds: float = 0.0) -> Pruned:
    found = calibrate(model, batches, method=method, config=ShrinkConfig(search_seconds=seconds)).prune(
        Budget(0.5, 12.0)
    )
    assert not list(on_the_device(found.model))
    return found


class TestPruning:
    @pytest.mark.parametrize("method", METHOD_NAMES)
    def test_every_method_and_saving(self, method: str, tmp_path: Path) -> None:
        found = pruned(there(), method)
        shrinkformer.save(found.model, tmp_path / "smaller", plan=found.plan)
        again = shrinkformer.load(tmp_path / "smaller")
        weights = found.model.state_dict()
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, weights[name].cpu()), name

    @pytest.mark.parametrize(
        ("family", "head", "batches"),
        [
            ("bert", "ForQuestionAnswering", BATCHES),
            ("bert", "ForTokenClassification", BATCHES),
            ("distilbert", "Model", BATCHES),
            ("opt", "ForCausalLM", BATCHES),
            ("llama", "ForCausalLM", WHOLE),
        ],
    )
    def test_the_default_method_on_every_head(self, family: str, head: str, batches: Any) -> None:
        pruned(there(family, head, num_hidden_layers=1), batches=batches)

    @pytest.mark.parametrize("method", ["kprune", "kwon", "obs"])
    def test_language_models(self, method: str) -> None:
        pruned(there("opt"), method)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_precision(self, dtype: torch.dtype) -> None:
        assert pruned(there(num_hidden_layers=1).to(dtype)).model.dtype == dtype

    def test_numbers_are_those_of_the_cpu(self) -> None:
        ours, theirs = pruned(there(), "stat").plan, calibrate(build_model(**SIZES), BATCHES, method="stat")
        for one, other in zip(ours.layers, theirs.prune(Budget(0.5, 12.0)).plan.layers, strict=True):
            assert (one.heads, one.neurons) == (other.heads, other.neurons)
            assert one.ffn_error == pytest.approx(other.ffn_error, rel=1e-4)


def multi_label() -> Any:
    model = there(num_labels=3)
    model.config.problem_type = "multi_label_classification"
    return model


CHOICES = [{name: value.view(4, 2, -1) for name, value in batch.items()} for batch in BATCHES]

DENSE = pooling.Dense(nn.Linear(16, 8), nn.Tanh(), None)

HEADS: dict[str, Callable[[], tuple[Any, Any, Objective | None]]] = {
    "labels": lambda: (multi_label(), BATCHES, None),
    "numbers": lambda: (there(num_labels=1), BATCHES, None),
    "choices": lambda: (there("bert", "ForMultipleChoice"), CHOICES, None),
    "masked words": lambda: (there("bert", "ForMaskedLM"), BATCHES, None),
    "pretraining": lambda: (there("bert", "ForPreTraining"), BATCHES, None),
    "discriminator": lambda: (there("electra", "ForPreTraining"), BATCHES, None),
    "last token": lambda: (there("llama", "ForSequenceClassification"), BATCHES, None),
    "poolings": lambda: (
        there("bert", "Model"),
        BATCHES,
        Objective(sentence=SentenceHead(tuple(pooling.POOLINGS), behind=(pooling.Normalize(),))),
    ),
    "dense": lambda: (
        there("bert", "Model"),
        BATCHES,
        Objective(sentence=SentenceHead(("cls",), behind=(DENSE,), similarity="dot")),
    ),
}


class TestObjectives:
    @pytest.mark.parametrize("name", HEADS)
    def test_every_head_is_judged_and_weighed(self, name: str) -> None:
        model, batches, given = HEADS[name]()
        objective = (given or objective_of(model)).scaled(model, batches)
        assert Judge(model, batches, objective).of(model) == pytest.approx(0.0, abs=1e-6)
        (view, *_) = layer_views(model)
        layers = {"it": view.linear(view.architecture.feed_forward.output).module}
        assert output_metrics(model, layers, batches, objective=objective)["it"].device.type == NAME


class TestDoors:
    def test_in_place_and_on_the_way_to_onnx(self) -> None:
        model = there()
        shrinkformer.prune_(model, WHOLE, shrinkformer.PruneConfig(mu=0.6, method="stat"))
        assert not list(on_the_device(model))
        copied = float_copy(model)  # torch.export itself cannot trace here
        assert {value.device.type for value in copied.parameters()} == {"cpu"}
        assert not list(on_the_device(model))


class TestQuantizing:
    @pytest.mark.parametrize("quantizer", ["shrink", "gptq", "rtn"])
    @pytest.mark.parametrize("family", ["bert", "llama"])
    def test_every_quantizer(self, quantizer: str, family: str, tmp_path: Path) -> None:
        model = there(family, num_hidden_layers=1)
        quantized = quantize_(model, BATCHES, QuantizeConfig(group_size=16, quantizer=quantizer))
        assert not list(on_the_device(model))
        save_quantized(model, quantized.weights, tmp_path / "smaller", dtype=torch.float32)
        again = shrinkformer.load(tmp_path / "smaller")
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor.cpu()), name

    def test_everything_outside_the_blocks(self) -> None:
        model = there("opt", num_hidden_layers=1, word_embed_proj_dim=16).half()
        quantize_(
            model, BATCHES, QuantizeConfig(group_size=16, quantizer="gptq", also=("embeddings", "head", "positions"))
        )
        assert not list(on_the_device(model))


class TestMeasuring:
    @pytest.mark.parametrize("name", ["sst2", "stsb", "squad", "similarity"])
    def test_tasks(self, name: str) -> None:
        task, tokenizer = get_task(name), dataset_fixtures.bert_tokenizer()
        head = {"squad": "ForQuestionAnswering", "similarity": "Model"}.get(name, "ForSequenceClassification")
        kinds = {"sst2": dataset_fixtures.sentiment, "squad": dataset_fixtures.questions}
        rows = kinds.get(name, dataset_fixtures.pairs)(4)  # the fifth question has no answer
        model = there("bert", head, vocab_size=len(tokenizer), num_labels=1 if name == "stsb" else 2)
        splits = {task.evaluation_splits[0]: encode(rows, task, tokenizer, max_length=64)}
        ours = evaluate_model(model, tokenizer, task, splits, batch_size=4, device=NAME).metrics
        theirs = evaluate_model(model, tokenizer, task, splits, batch_size=4, device="cpu").metrics
        assert ours == pytest.approx(theirs, abs=1e-4)  # attention in single operators sums in another order

    def test_perplexity(self) -> None:
        windows = torch.randint(5, 40, (6, 16), generator=torch.Generator().manual_seed(0))
        ours = evaluate_perplexity(there("llama"), windows, batch_size=2, device=NAME)
        theirs = evaluate_perplexity(build_model("llama", **SIZES), windows, batch_size=2)
        assert ours.value == pytest.approx(theirs.value, rel=1e-5)

    def test_latency(self) -> None:
        assert measure_latency({"dense": there()}, [(1, 8)], device=NAME, vocabulary_size=40, repeats=1)["dense"]
        assert LatencyTable.measure(there(), (2, 8), narrow=("query_width", "value_width"), repeats=1).neurons[-1] == 32
        assert choose_multiple(16, 32, gated=False, device=NAME, dtype=torch.float32).multiple >= 1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_corpora(tmp_path_factory.mktemp("data"))
    for split, size, seed in (("train", 40, 1), ("validation", 20, 2)):
        (folder / "glue" / "sst2").mkdir(parents=True, exist_ok=True)
        table = {"sentence": sentences(size, seed), "label": [index % 2 for index in range(size)]}
        datasets.Dataset.from_dict(table).to_parquet(folder / "glue" / "sst2" / f"{split}.parquet")
    return folder


class TestCommands:
    """From the checkpoint to the report, with all that lies on the way: opening, blocks from disk, resume files."""

    @pytest.mark.parametrize(
        ("main", "family", "arguments"),
        [
            (prune_bert.main, "bert", ["--task_name", "sst2", "--search_seconds", "0.1", "--mu", "0.6"]),
            (prune_opt.main, "opt", ["--method", "stat", "--mu", "0.6", "--max_memory", "0.0001"]),
            (prune_opt.main, "llama", ["--mu", "0.6", "--search_seconds", "0", "--dtype", "bfloat16"]),
            (quantize_opt.main, "opt", ["--quantizer", "gptq", "--group_size", "16", "--max_memory", "0.0001"]),
        ],
    )
    def test_to_the_report(
        self,
        main: Callable[..., int],
        family: str,
        arguments: list[str],
        tmp_path: Path,
        data: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        more = {"word_embed_proj_dim": 16} if family == "opt" else {}
        build_model(family, **SIZES | more).save_pretrained("mine")
        build_tokenizer().save_pretrained("mine")
        common = ["--model_name", "mine", "--data_dir", str(data), "--sample_batch_size", "16", "--device", NAME]
        if family != "bert":
            common += ["--sequence_length", "16", "--evaluation_windows", "2"]
        assert main([*common, *arguments]) == 0
        (report,) = Path("output").glob("mine/sst2.jsonl" if family == "bert" else "opt/mine.jsonl")
        assert json.loads(report.read_text())["device"].startswith(NAME)
