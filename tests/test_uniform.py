"""Blocks that are all alike: sizes, budgets, folders that plain transformers opens, what it costs, and errors."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import shrinkformer
from shrinkformer.architectures import find_architecture, layer_views
from shrinkformer.commands import prune_bert, prune_opt, quantize_opt, running
from shrinkformer.commands.report import Measured, Run
from shrinkformer.efficiency.macs import LayerSize, count_matmul_macs
from shrinkformer.errors import InputError
from shrinkformer.prune import pruned_modeling
from shrinkformer.prune.budget import Budget, CostModel, Counts, layer_sizes
from shrinkformer.prune.checkpoint import describe_sizes, save
from shrinkformer.prune.latency_table import LatencyCosts, LatencyTable
from shrinkformer.prune.plan import Plan
from shrinkformer.prune.pruner import prune_model
from shrinkformer.prune.result import Pruned
from shrinkformer.prune.shrink import learn
from shrinkformer.prune.shrink_config import ShrinkConfig
from shrinkformer.prune.stock import stock_values
from shrinkformer.prune.surgery import kept_sizes
from shrinkformer.prune.uniform import Losses, allocate_alike, uniform_counts
from tests.conftest import FAMILIES, GROUPED, WITHOUT_US, build_model, make_batches
from tests.test_prune_opt import call, checkpoint, read_plan, read_records, write_corpora
from tests.test_streamed import (
    encoder_command,
    encoder_data,  # noqa: F401  (a fixture)
)

BATCHES = make_batches([3 + index % 18 for index in range(48)], batch_size=8)
WIDER = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2, "head_dim": 8}
FEWER_HEADS = [f"{family}-fewer-heads" for family in GROUPED]
"""Models that lose whole groups of heads as well."""

# Runs where shrinkformer cannot be imported, and no code of a folder is trusted.
ELSEWHERE = (
    WITHOUT_US
    + """
batch, expected = torch.load(sys.argv[1], weights_only=True)
for folder, (auto, outputs) in expected.items():
    for attention, output in outputs.items():
        kind = getattr(transformers, auto)
        model = kind.from_pretrained(folder, trust_remote_code=False, attn_implementation=attention)
        assert type(model).__module__.startswith("transformers.models."), folder
        with torch.no_grad():
            assert torch.equal(model.eval()(**batch)[0], output), (folder, attention)
print(len(expected), "folders")
"""
)


def auto_class(model: Any) -> str:
    return "AutoModelForCausalLM" if model.can_generate() else "AutoModelForSequenceClassification"


@pytest.fixture(scope="module")
def pruned() -> dict[str, Pruned]:
    """A model of each family at 0.7 of its MACs, and of those whose heads can go, one at much less."""
    found = {}
    for family in FAMILIES:
        found[family] = prune_model(build_model(family), BATCHES, mu=0.7, method="stat", uniform=True)
        if family in GROUPED:
            dense = build_model(family, seed=1, **WIDER)
            found[f"{family}-fewer-heads"] = prune_model(dense, BATCHES, mu=0.25, method="stat", uniform=True)
    return found


@pytest.fixture(scope="module")
def folders(pruned: dict[str, Pruned], tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("uniform")
    for name, result in pruned.items():
        save(result.model, base / name, plan=result.plan)
    return base


class TestFamilies:
    @pytest.mark.parametrize("name", [*FAMILIES, *FEWER_HEADS])
    def test_blocks_are_alike_and_within_the_budget(self, pruned: dict[str, Pruned], name: str) -> None:
        model, plan = pruned[name].model, pruned[name].plan
        (size,) = set(layer_sizes(layer_views(model)))
        assert (set(plan.heads), set(plan.neurons)) == ({size.heads}, {size.neurons})
        assert plan.mu - 0.05 < plan.ratio <= plan.mu
        family = name.removesuffix("-fewer-heads")
        dense = build_model(family, seed=1, **WIDER) if name != family else build_model(family)
        batch = {key: value[:, :3] for key, value in BATCHES[0].items()}
        at_three = CostModel.of(layer_views(dense), Budget(1.0, 3.0))
        counted = count_matmul_macs(model, batch) / count_matmul_macs(dense, batch)
        assert counted == pytest.approx(at_three.macs(Counts(tuple(plan.heads), tuple(plan.neurons))) / at_three.dense)
        assert size.heads == (4 if name not in GROUPED else 2) if name == family else size.heads < 4
        neurons = [layer.neurons for layer in plan.layers]
        assert len(set(neurons)) == len(neurons)  # as many, but each block its own

    def test_plain_transformers_gives_equal_logits(
        self, pruned: dict[str, Pruned], folders: Path, tmp_path: Path
    ) -> None:
        expected = {}
        for name, result in pruned.items():
            outputs = {}
            for attention in ("eager", "sdpa"):
                result.model.set_attn_implementation(attention)
                with torch.no_grad():
                    outputs[attention] = result.model(**BATCHES[0])[0]
            expected[str(folders / name)] = (auto_class(result.model), outputs)
        torch.save((BATCHES[0], expected), tmp_path / "expected.pt")
        program = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "expected.pt")]
        done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[0] == str(len(pruned))

    @pytest.mark.parametrize("name", [*FAMILIES, *FEWER_HEADS])
    def test_the_folder_needs_nothing_of_ours(self, pruned: dict[str, Pruned], folders: Path, name: str) -> None:
        config = json.loads((folders / name / "config.json").read_text())
        assert not {"auto_map", "per_layer_config", "shrinkformer"} & set(config)
        assert not list((folders / name).glob("*.py"))
        plan, record = pruned[name].plan, find_architecture(config["model_type"])
        assert read_plan(folders / name) == plan
        assert config[record.neurons_key] == plan.neurons[0]
        if name in FEWER_HEADS:
            assert config["num_key_value_heads"] == plan.heads[0]
            assert (config["num_attention_heads"], config["head_dim"]) == (2 * plan.heads[0], 8)
        loaded = shrinkformer.load(folders / name)
        assert type(loaded) is getattr(transformers, config["architectures"][0]) is type(pruned[name].model)

    def test_generation_with_a_cache(self, pruned: dict[str, Pruned], folders: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folders / "llama-fewer-heads", trust_remote_code=False)
        ids = BATCHES[0]["input_ids"][:, :3]
        found = [
            some.generate(ids, do_sample=False, max_new_tokens=6, use_cache=cached)
            for some in (model, pruned["llama-fewer-heads"].model)
            for cached in (True, False)
        ]
        assert all(torch.equal(tokens, found[0]) for tokens in found)


class TestWhatAConfigurationCanSay:
    def choices(self, model: Any) -> tuple[int, ...]:
        return CostModel.of(layer_views(model), Budget(0.5, 9.0, uniform=True)).head_counts

    def test_query_heads_of_llama_divide_the_hidden_size(self) -> None:
        assert self.choices(build_model("llama", **WIDER)) == (1, 2, 4)
        assert self.choices(build_model("mistral", **WIDER)) == (1, 2, 3, 4)

    def test_norms_of_queries_fix_the_heads_of_phi(self) -> None:
        assert self.choices(build_model("phi")) == (1, 2)
        assert self.choices(build_model("phi", qk_layernorm=True)) == (2,)
        result = prune_model(build_model("phi", qk_layernorm=True), BATCHES, mu=0.6, method="stat", uniform=True)
        assert set(result.plan.heads) == {2}

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_dense_model_is_of_stock_shape(self, family: str) -> None:
        model = build_model(family)
        values = stock_values(find_architecture(family), layer_sizes(layer_views(model)), model.config)
        assert values is not None
        before = model.config.to_dict()
        describe_sizes(model)
        added = {key: value for key, value in model.config.to_dict().items() if before.get(key) != value}
        assert added in ({}, {"head_dim": 8})  # which the other families divide for

    def test_narrow_heads_are_not_said(self) -> None:
        size = LayerSize(4, 8, 64, query_width=8, value_width=4)
        config = build_model("llama").config
        assert stock_values(find_architecture("llama"), [size] * 3, config) is None
        assert stock_values(find_architecture("bert"), [replace(size, value_width=8, heads=3)], config) is None


class TestAllocation:
    def test_is_the_best_of_all_pairs(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(30):
            mu, step = float(rng.uniform(0.2, 1)), int(rng.choice([1, 4]))
            layers = (LayerSize(5, 4, 24), LayerSize(4, 4, 22))
            costs = CostModel(layers, 16, Budget(mu, 9.0, step, uniform=True), head_counts=(1, 2, 4))
            tails = [[np.sort(rng.exponential(size=size + 1))[::-1] for size in sizes] for sizes in ((5, 4), (24, 22))]
            losses = Losses(*tails)
            pairs = [Counts((h, h), (n, n)) for h in (1, 2, 4) for n in range(step, 23, step)]
            fitting = [pair for pair in pairs if costs.macs(pair) <= mu * costs.dense]
            if fitting:
                assert losses.of(allocate_alike(costs, losses)) == min(map(losses.of, fitting))
            else:
                with pytest.raises(InputError, match="cannot be met with --uniform"):
                    uniform_counts(costs)

    def test_floors_and_rounding_hold(self) -> None:
        layers = (LayerSize(6, 8, 100),) * 3
        costs = CostModel(layers, 48, Budget(0.5, 20, 8, 2, 20, uniform=True), head_counts=(1, 2, 3, 4, 5, 6))
        for counts in uniform_counts(costs):
            assert counts.heads[0] >= 2
            assert counts.neurons[0] >= 24
            assert counts.neurons[0] % 8 == 0
            assert costs.macs(counts) <= 0.5 * costs.dense

    @pytest.mark.parametrize("method", ["kwon", "flap", "magnitude", "wanda-refit", "obs"])
    def test_methods_of_others(self, method: str) -> None:
        result = prune_model(build_model("mistral", **WIDER), BATCHES, mu=0.5, method=method, uniform=True)
        (size,) = set(layer_sizes(layer_views(result.model)))
        assert 0.45 < result.plan.ratio <= 0.5
        assert not hasattr(result.model.config, "shrinkformer")
        assert result.model.config.intermediate_size == size.neurons


@pytest.fixture(scope="module")
def result() -> Pruned:
    """A model pruned by ``shrink``."""
    model = build_model("mistral", **WIDER)
    return prune_model(model, BATCHES, mu=0.5, uniform=True, config=ShrinkConfig(search_seconds=60))


class TestShrink:
    def test_blocks_are_alike_and_better_than_by_stat(self, result: Pruned) -> None:
        (size,) = set(layer_sizes(layer_views(result.model)))
        assert size.query_width == size.value_width == 8
        assert 0.45 < result.plan.ratio <= 0.5
        assert not hasattr(result.model.config, "shrinkformer")
        assert min(result.plan.divergences, key=result.plan.divergences.__getitem__).startswith(result.plan.method)

    def test_the_report_states_the_cost(self, result: Pruned) -> None:
        cost = result.plan.uniform
        assert set(cost) == {"divergence", "free_divergence"}
        assert 0 < cost["free_divergence"] < cost["divergence"]
        assert Plan.from_json(result.plan.to_json()) == result.plan
        run = Run(
            task_name="text",
            model_name="mine",
            method="shrink",
            mu=0.5,
            seed=0,
            sample_batch_size=48,
            calibration_tokens=100,
            device="cpu",
            dense=Measured({}, 2.0, 2, 2),
            pruned=Measured({}, 1.0, 1, 1),
            plan=result.plan,
            save_dir=None,
            seconds={},
            peak_memory_bytes=0,
        )
        assert run.to_dict()["uniform"] == cost
        assert f"blocks are all alike: expected divergence {cost['divergence']:.5f}" in run.table()
        free = replace(run, plan=replace(result.plan, uniform={}))
        assert "uniform" not in free.to_dict()
        assert "alike" not in free.table()

    def test_heads_that_stay_leave_one_plan(self) -> None:
        said: list[str] = []
        config = ShrinkConfig(search_seconds=0, say=said.append)
        result = prune_model(build_model("bert", num_hidden_layers=2), BATCHES, mu=0.6, uniform=True, config=config)
        assert set(result.plan.heads) == {4}
        assert said[0].startswith("first plan, all blocks alike: expected divergence")
        assert result.plan.uniform["free_divergence"] <= result.plan.uniform["divergence"]

    def test_a_budget_of_time(self) -> None:
        """With a table where a head takes a millisecond, and a neuron a hundredth of one."""
        table = LatencyTable((1, 4), (8,), (8,), np.array([[[1.0]], [[4.0]]]), (1, 65), np.array([0.0, 0.64]))
        sizes = layer_sizes(layer_views(build_model("mistral", **WIDER)))
        found = uniform_counts(
            LatencyCosts(sizes, 64, Budget(0.5, 9.0, uniform=True), False, (1, 2, 3, 4), table=table)
        )
        assert found == [Counts((1, 1), (64, 64)), Counts((2, 2), (32, 32))]  # 2 x 2.315 of 2 x 4.63 milliseconds
        learnt = learn(build_model("mistral", **WIDER), BATCHES, ShrinkConfig(search_seconds=0))
        timed = replace(learnt, latency=table)
        assert set(layer_sizes(layer_views(timed.prune(Budget(0.5, 9.0, uniform=True)).model))) < {
            replace(sizes[0], heads=counts.heads[0], neurons=counts.neurons[0]) for counts in found
        }
        with pytest.raises(InputError, match=r"cannot be met with --uniform.*the smallest --mu that can is 0\.2160"):
            timed.prune(Budget(0.2, 9.0, uniform=True))


class TestPrunedBefore:
    def test_sizes_that_differ_become_alike(self, tmp_path: Path) -> None:
        once = prune_model(build_model("mistral", **WIDER | {"num_hidden_layers": 3}), BATCHES, mu=0.7, method="stat")
        assert len(set(layer_sizes(layer_views(once.model)))) > 1
        save(once.model, tmp_path / "once", plan=once.plan)
        kind = pruned_modeling.MistralForCausalLM
        again = prune_model(kind.from_pretrained(tmp_path / "once"), BATCHES, mu=0.6, method="stat", uniform=True)
        save(again.model, tmp_path / "twice", plan=again.plan)
        assert not {"pruned_modeling.py"} & {path.name for path in (tmp_path / "twice").iterdir()}
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "twice", trust_remote_code=False)
        with torch.no_grad():
            assert torch.equal(plain.eval()(**BATCHES[0])[0], again.model(**BATCHES[0])[0])

    def test_stock_shape_can_be_pruned_freely(self, folders: Path, tmp_path: Path) -> None:
        again = prune_model(shrinkformer.load(folders / "llama"), BATCHES, mu=0.6, method="stat")
        save(again.model, tmp_path / "free", plan=again.plan)
        assert (tmp_path / "free" / "pruned_modeling.py").exists()
        with torch.no_grad():
            reloaded = shrinkformer.load(tmp_path / "free").eval()
            assert torch.equal(reloaded(**BATCHES[0])[0], again.model(**BATCHES[0])[0])

    def test_what_cannot_be_said_any_more(self) -> None:
        lost = prune_model(build_model("bert"), BATCHES, mu=0.5, method="stat").model
        with pytest.raises(InputError, match=r"lost heads before.*stock bert.*start from the dense checkpoint"):
            prune_model(lost, BATCHES, mu=0.9, method="stat", uniform=True)
        narrow = build_model("llama")
        for view in layer_views(narrow):
            sizes = kept_sizes(replace(layer_sizes([view])[0], value_width=4))
            pruned_modeling.set_block_sizes(view.block, view.architecture.to_dict(), **sizes)
        with pytest.raises(InputError, match=r"narrowed before.*start from the dense checkpoint"):
            CostModel.of(layer_views(narrow), Budget(0.5, 9.0, uniform=True))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Call a command on a tiny Llama in an empty folder."""
    checkpoint(tmp_path / "mine", "llama", hidden_size=64, intermediate_size=128)
    monkeypatch.chdir(tmp_path)
    common = ("--model_name", "mine", "--mu", "0.7", "--evaluation_windows", "4", "--uniform")
    return lambda *arguments, main=prune_opt.main: call(main, data_dir, *common, *arguments)


def text_without_code(folder: str) -> str:
    """config.json and model card of a folder, which holds no code."""
    assert not list(Path(folder).glob("*.py"))
    return (Path(folder) / "config.json").read_text() + (Path(folder) / "README.md").read_text()


class TestCommands:
    @pytest.mark.parametrize("memory", [(), ("--max_memory", "0.0001")])
    def test_prune_opt(
        self, run: Callable[..., int], memory: tuple[str, ...], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(*memory) == 0
        (record,) = read_records(Path("output"))
        assert len({(layer["heads"], layer["neurons"]) for layer in record["layers"]}) == 1
        assert 0.65 < record["ratio"]["macs"] <= 0.7
        text = text_without_code(record["save_dir"])
        assert "trust_remote_code" not in text
        assert "per_layer_config" not in text
        model = AutoModelForCausalLM.from_pretrained(record["save_dir"], trust_remote_code=False)
        assert model.config.intermediate_size == record["layers"][0]["neurons"]
        said = capsys.readouterr()
        assert "--uniform: all blocks keep the same number of groups of heads" in said.out + said.err

    @pytest.mark.parametrize("memory", [(), ("--max_memory", "0.0001")])
    def test_quantize_opt(self, run: Callable[..., int], memory: tuple[str, ...]) -> None:
        small = ("--bits", "8", "--group_size", "32", "--sample_batch_size", "16", "--method", "stat")
        assert run(*small, *memory, main=quantize_opt.main) == 0
        (record,) = read_records(Path("output"))
        text = text_without_code(record["save_dir"])
        assert "auto_map" not in text
        assert '"quant_method": "compressed-tensors"' in text
        assert "trust_remote_code" not in text
        assert record["ratio"]["macs"] <= 0.7
        (neurons,) = set(read_plan(record["save_dir"]).neurons)
        model = shrinkformer.load(record["save_dir"])
        assert type(model) is transformers.LlamaForCausalLM
        assert model.config.intermediate_size == neurons

    def test_dry_run(self, run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
        assert run("--dry_run") == 0
        said = capsys.readouterr()
        assert "--uniform: all blocks keep the same number" in said.out + said.err

    def test_errors_come_before_any_work(
        self,
        run: Callable[..., int],
        encoder_data: Path,  # noqa: F811
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(running, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
        capsys.readouterr()
        assert run("--method", "kprune") == 2
        assert run("--mu", "0.001") == 2
        assert run("--target_ratio", "0.2", main=quantize_opt.main) == 2
        encoder_arguments = encoder_command(Path(), encoder_data)
        assert prune_bert.main([*encoder_arguments, "--uniform", "--mu", "0.2"]) == 2
        kprune, small, ratio, encoder = (line for line in capsys.readouterr().err.splitlines() if ": error: " in line)
        assert "--uniform: --method kprune chooses the size of a block when" in kprune
        assert "every block keeps at least 1 head(s) and at least 1 neuron(s); the smallest --mu that can is" in small
        assert "--target_ratio 0.2 chooses" in ratio
        assert "--mu 0.2 cannot be met with --uniform: every block keeps all 4 heads" in encoder

    def test_the_smallest_budget_can_be_met(self) -> None:
        views = layer_views(build_model("bert"))

        def fits(mu: float) -> Any:
            return uniform_counts(CostModel.of(views, Budget(mu, 12.25, uniform=True)))

        with pytest.raises(InputError) as error:
            fits(0.05)
        smallest = float(str(error.value).partition("that can is ")[2].partition(". ")[0])
        assert fits(smallest)[0].heads == (4, 4, 4)
        with pytest.raises(InputError):
            fits(smallest - 2e-4)
