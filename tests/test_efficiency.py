"""MACs against an independent count, latency, sizes."""

import doctest
import math

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from shrinkformer.architectures import layer_views
from shrinkformer.efficiency import latency, macs, size
from shrinkformer.efficiency.latency import measure_latency
from shrinkformer.efficiency.macs import LayerSize, count_matmul_macs, head_macs, model_macs, neuron_macs
from shrinkformer.efficiency.size import (
    PeakMemory,
    checkpoint_bytes,
    count_parameters,
    folder_bytes,
    peak_memory_bytes,
)
from shrinkformer.errors import CheckpointError, InputError, UnsupportedModelError
from shrinkformer.prune.budget import layer_sizes
from shrinkformer.prune.pruner import prune_model
from tests.conftest import ENCODERS, FAMILIES, GROUPED, build_model, make_batches

SIZE = LayerSize(heads=4, head_size=8, neurons=56)


def bert(attention="sdpa", cls=BertForSequenceClassification, layers=3):
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=56
    )
    return cls._from_config(config, attn_implementation=attention)


def distilbert(attention="sdpa"):
    config = DistilBertConfig(vocab_size=50, dim=32, n_layers=3, n_heads=4, hidden_dim=56)
    return DistilBertForSequenceClassification._from_config(config, attn_implementation=attention)


def llama(attention="sdpa"):
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=56
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=attention)


def batch(examples, tokens):
    ids = torch.ones(examples, tokens, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("module", [macs, size, latency])
def test_examples_in_the_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


class TestMacs:
    def test_by_hand(self):
        assert head_macs(10, 32, 8) == 4 * 10 * 32 * 8 + 2 * 100 * 8
        assert neuron_macs(10, 32) == 640
        assert neuron_macs(10, 32, gated=True) == 960
        assert neuron_macs(12.5, 32) == 800.0

    def test_layers_may_differ_and_vanish(self):
        layers = [LayerSize(0, 8, 0), LayerSize(1, 8, 0), LayerSize(0, 8, 3, gated=True)]
        assert model_macs(layers, 32, 10) == head_macs(10, 32, 8) + 3 * neuron_macs(10, 32, gated=True)
        assert model_macs([], 32, 10) == 0

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("build", [bert, distilbert])
    @pytest.mark.parametrize(("examples", "tokens"), [(1, 1), (1, 13), (3, 32)])
    def test_formula_is_the_real_count(self, build, attention, examples, tokens):
        model = build(attention).train()
        counted = count_matmul_macs(model, batch(examples, tokens))
        assert counted == examples * model_macs([SIZE] * 3, 32, tokens)
        assert model.training

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_gated_decoder(self, attention):
        gated = LayerSize(heads=4, head_size=8, neurons=56, gated=True)
        assert count_matmul_macs(llama(attention), batch(2, 9)) == 2 * model_macs([gated] * 3, 32, 9)

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ENCODERS])
    def test_formula_is_the_real_count_of_decoders_dense_and_pruned(self, family, attention):
        """A causal model multiplies whole score matrices and masks half of them: both sides count 2 L^2 dh per head."""
        dense = build_model(family, attn_implementation=attention)
        assert layer_views(dense)[0].queries == (2 if family in GROUPED else 1)
        calibration = make_batches([3 + index % 18 for index in range(48)], batch_size=8)
        pruned = prune_model(dense, calibration, mu=0.5, sequence_length=13, method="stat-bias")
        for model in (dense, pruned.model):
            sizes = layer_sizes(layer_views(model))
            assert count_matmul_macs(model, batch(2, 13)) == 2 * model_macs(sizes, 32, 13)
        assert model_macs(sizes, 32, 13) == pruned.plan.macs <= 0.5 * pruned.plan.dense_macs

    def test_padding_does_not_change_the_count(self):
        padded = batch(2, 9)
        padded["attention_mask"][1, 5:] = 0
        assert count_matmul_macs(bert(), padded) == 2 * model_macs([SIZE] * 3, 32, 9)

    def test_a_model_without_layers_is_refused(self):
        with pytest.raises(UnsupportedModelError, match=r"Linear has no nn\.ModuleList"):
            count_matmul_macs(torch.nn.Linear(2, 2), {"input": torch.ones(1, 2)})


class TestLatency:
    def test_every_model_and_shape_gets_a_time(self):
        models = {"dense": bert(layers=4).train(), "pruned": distilbert()}
        state = torch.get_rng_state()
        result = measure_latency(models, ((1, 8), (2, 16)), vocabulary_size=50, repeats=3, warmup=1)
        assert {name: tuple(times) for name, times in result.items()} == dict.fromkeys(models, ("1x8", "2x16"))
        assert all(0 < value < 10_000 for times in result.values() for value in times.values())
        assert models["dense"].training
        assert models["dense"].bert.encoder.layer[0].training
        assert torch.equal(state, torch.get_rng_state())

    def test_models_take_turns_on_the_same_inputs_and_the_median_is_returned(self, monkeypatch):
        calls = []

        class Probe(torch.nn.Module):
            def __init__(self, name):
                super().__init__()
                self.name = name

            def forward(self, input_ids, attention_mask):
                assert torch.is_inference_mode_enabled()
                assert not self.training
                assert attention_mask.all()
                calls.append((self.name, input_ids))

        clock = iter([0, 9, 0, 9, 0, 1, 0, 10, 0, 3, 0, 10, 0, 2, 0, 70])  # begin and end of each run, in seconds
        monkeypatch.setattr(latency.time, "perf_counter", lambda: next(clock))
        models = {"a": Probe("a"), "b": Probe("b")}
        result = measure_latency(models, [(2, 3)], vocabulary_size=7, repeats=3, warmup=1)
        assert [name for name, _ in calls] == ["a", "b"] * 4
        assert all(torch.equal(ids, calls[0][1]) for _, ids in calls)
        assert calls[0][1].shape == (2, 3)
        assert calls[0][1].max() < 7
        assert result == {"a": {"2x3": 2000.0}, "b": {"2x3": 10000.0}}

    @pytest.mark.parametrize("wrong", [{"repeats": 0}, {"vocabulary_size": 0}, {"shapes": [(0, 8)]}])
    def test_wrong_sizes(self, wrong):
        with pytest.raises(InputError, match="positive sizes"):
            measure_latency({}, **({"vocabulary_size": 5} | wrong))


class TestSize:
    @pytest.mark.parametrize("cls", [BertForSequenceClassification, BertForMaskedLM])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_bytes_are_those_of_the_saved_file(self, cls, dtype, tmp_path):
        model = bert(cls=cls).to(dtype)
        model.save_pretrained(tmp_path)
        assert abs(checkpoint_bytes(model) - folder_bytes(tmp_path)) <= 64
        assert checkpoint_bytes(model) > count_parameters(model) * dtype.itemsize

    def test_tied_weights_count_once(self):
        tied = bert(cls=BertForMaskedLM)
        assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
        head = tied.cls.predictions.transform
        expected = count_parameters(tied.bert) + sum(p.numel() for p in head.parameters()) + 50  # and the output bias
        assert count_parameters(tied) == expected

    def test_buffers_are_stored_but_are_no_parameters(self):
        module = torch.nn.Module()
        module.register_buffer("packed", torch.zeros(1000, dtype=torch.uint8))
        module.register_buffer("scratch", torch.zeros(1000), persistent=False)
        assert count_parameters(module) == 0
        assert 1000 < checkpoint_bytes(module) < 1200

    def test_a_folder_with_shards_and_one_without_weights(self, tmp_path):
        (tmp_path / "training_args.bin").write_bytes(b"1234567")
        with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
            folder_bytes(tmp_path)
        (tmp_path / "pytorch_model.bin").write_bytes(b"12345")
        assert folder_bytes(tmp_path) == 5
        (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"123")
        (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"12")
        assert folder_bytes(str(tmp_path)) == 5

    def test_peak_memory_is_that_of_the_process(self):
        with PeakMemory() as memory:
            block = torch.ones(8 * 2**20)
            assert math.isclose(float(block.sum()), 8 * 2**20)
        assert memory.bytes >= 32 * 2**20
        assert peak_memory_bytes() >= memory.bytes
