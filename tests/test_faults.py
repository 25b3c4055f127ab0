"""Numbers that are no numbers, and columns that say nothing: found and named, or computed with to a defined end."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import shrinkformer
from shrinkformer.architectures import layer_views
from shrinkformer.commands import prune_opt
from shrinkformer.commands.pruning import cast_weights, round_weights
from shrinkformer.errors import NumericalError, ShrinkformerWarning
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.cholesky import DampingWarning
from shrinkformer.prune.divergence import Judge, Target, Targets
from shrinkformer.prune.health import locate_fault, require_finite_outputs, require_finite_weights
from shrinkformer.prune.lazy import load_lazily
from shrinkformer.prune.names import METHOD_NAMES
from shrinkformer.prune.objective import Predictions, objective_of
from shrinkformer.prune.plan import SURPRISE, LayerPlan, Plan, warn_of_surprise
from shrinkformer.prune.pruner import calibrate, prune_model
from shrinkformer.prune.shrink_config import ShrinkConfig
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.quantizer import quantize_
from shrinkformer.quantize.scales import require_scales
from shrinkformer.quantize.scheme import Scheme
from shrinkformer.utils.parallel import ALONE
from tests.conftest import build_model, build_tokenizer, make_batches
from tests.test_prune_opt import call, read_records, write_corpora

BATCHES = make_batches([3 + index % 18 for index in range(40)], batch_size=8)
QUICK = ShrinkConfig(search_seconds=0)
SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24}

FAULTS = ("dead", "constant", "duplicated", "huge", "low rank", "few tokens")
KINDS = ("bert", "opt", "llama")  # post-norm, pre-norm, gated


def poisoned(family: str = "bert") -> Any:
    """A model with one broken weight in its second block, at [3, 5] of the layer behind its neurons."""
    model = build_model(family)
    layer_views(model)[1].feed_forward_output.weight.data[3, 5] = float("nan")
    return model


def prune(model: Any, method: str, batches: Any = BATCHES, mu: float = 0.5) -> Any:
    return prune_model(model, batches, mu=mu, method=method, sequence_length=12, config=QUICK)


class TestWeights:
    WHERE = r"bert\.encoder\.layer\.1\.output\.dense\.weight: nan at \[3, 5\], the first of 1 of 2,048 weights"

    @pytest.mark.parametrize("method", METHOD_NAMES)
    def test_every_method_names_them(self, method: str) -> None:
        with pytest.raises(NumericalError, match=self.WHERE):
            calibrate(poisoned(), BATCHES[:1], method=method)

    def test_the_python_functions_name_them(self) -> None:
        with pytest.raises(NumericalError, match=self.WHERE):
            shrinkformer.prune_(poisoned(), BATCHES, shrinkformer.PruneConfig(mu=0.5))
        for quantizer in ("rtn", "gptq", "shrink"):
            with pytest.raises(NumericalError, match=self.WHERE):
                quantize_(poisoned(), BATCHES, QuantizeConfig(group_size=16, quantizer=quantizer))

    def test_infinity_outside_the_blocks(self) -> None:
        model = build_model("opt")
        model.get_input_embeddings().weight.data[7, 2] = -torch.inf
        with pytest.raises(NumericalError, match=r"embed_tokens\.weight: -inf at \[7, 2\].*use another one"):
            require_finite_weights(model)

    def test_blocks_on_disk_are_looked_at_when_they_are_read(self, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        poisoned("opt").save_pretrained(tmp_path)
        _, blocks = load_lazily(AutoModelForCausalLM, str(tmp_path), dtype=torch.float32)
        with blocks.resident(0):
            pass
        with pytest.raises(NumericalError, match=r"layers\.1\.fc2\.weight in .*model\.safetensors: nan at \[3, 5\]"):
            blocks.resident(1).__enter__()

    def test_nothing_broken_is_saved(self, tmp_path: Path) -> None:
        with pytest.raises(NumericalError, match=r"output\.dense\.weight of the model to be saved: nan at \[3, 5\]"):
            shrinkformer.save(poisoned(), tmp_path / "never")
        assert not (tmp_path / "never").exists()


def half(family: str) -> Any:
    """A model in float16 with one neuron that is beyond it for every token."""
    model = build_model(family).half()
    view = layer_views(model)[1]
    linear = view.linear(view.architecture.feed_forward.inputs[0])
    if linear.bias is not None:
        linear.bias.data[4] = 6e4
    view.feed_forward_output.weight.data[:, 4] = 60.0
    return model


class TestActivations:
    def test_block_layer_example_and_token_are_named(self) -> None:
        fault = locate_fault(half("opt"), BATCHES)
        assert fault is not None
        assert "activations are NaN or infinity: inf in the output of model.decoder.layers.1.fc2 (layer 1)" in fault
        assert f"first for example 0, token 0 (id {int(BATCHES[0]['input_ids'][0, 0])})" in fault
        assert "overflows in float16: run it in float32 (--dtype float32)" in fault

    def test_the_first_example_and_token(self) -> None:
        model = build_model("bert")
        model.get_input_embeddings().weight.data[39] = torch.inf
        batches = [{name: value.clone() for name, value in batch.items()} for batch in BATCHES]
        for batch in batches:
            batch["input_ids"][batch["input_ids"] == 39] = 38
        assert locate_fault(model, batches) is None
        batches[2]["input_ids"][5, 2] = 39
        batches[2]["input_ids"][6, 1] = 39
        fault = locate_fault(model, batches)
        assert fault is not None
        assert "nan in the output of the embeddings, first for example 21, token 2 (id 39)" in fault
        assert "look at that example" in fault

    def test_padding_is_not_looked_at(self) -> None:
        """Rows that may look at nothing are NaN in some kinds of attention, and nobody sees them."""
        model = build_model("bert")

        def spoil(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
            return output.masked_fill(padding[..., None], torch.nan)

        layer_views(model)[-1].block.output.register_forward_hook(spoil)
        padding = BATCHES[0]["attention_mask"] == 0
        assert padding.any()
        assert locate_fault(model, BATCHES[:1]) is None
        padding = BATCHES[0]["input_ids"] == BATCHES[0]["input_ids"][3, 1]
        assert locate_fault(model, BATCHES[:1]) is not None

    @pytest.mark.parametrize("method", METHOD_NAMES)
    def test_every_method_stops(self, method: str) -> None:
        with pytest.raises(
            NumericalError, match=r"NaN or infinity: inf in the .*layers\.1\.fc2 \(layer 1\), first for"
        ):
            prune(half("opt"), method)

    @pytest.mark.parametrize("quantizer", ["rtn", "gptq", "shrink"])
    def test_every_quantizer_stops(self, quantizer: str) -> None:
        with pytest.raises(NumericalError, match=r"layers\.1\.fc2 \(layer 1\), first for example 0, token 0"):
            quantize_(half("opt"), BATCHES, QuantizeConfig(group_size=16, quantizer=quantizer))

    def test_a_head_that_overflows(self) -> None:
        model = build_model("bert", "ForSequenceClassification")
        model.classifier.weight.data[:] = 3e38
        with pytest.raises(NumericalError, match="in the output of the model, behind its blocks, first for example"):
            prune(model, "shrink")

    def test_no_rest_of_the_search_is_left_behind(self) -> None:
        model = half("opt")
        blocks = [view.block for view in layer_views(model)]
        with pytest.raises(NumericalError):
            prune(model, "stat")
        assert [view.block for view in layer_views(model)] == blocks
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())

    def test_what_is_not_finite_is_never_the_best(self) -> None:
        """``max(0.0, nan)`` is 0: such a model was judged to be the dense one itself."""
        logs = torch.log_softmax(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), -1)
        targets = Targets([Predictions((logs,), distribution=True)], torch.device("cpu"), ALONE)
        assert targets.mean_divergence([Predictions((logs,), distribution=True)]) == 0
        assert targets.mean_divergence([Predictions((logs * torch.nan,), distribution=True)]) == torch.inf
        with pytest.raises(NumericalError, match="of the dense model"):
            Target(Predictions((logs * torch.nan,), distribution=True))

    def test_a_smaller_model_that_overflows_is_not_handed_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = build_model("bert")
        learnt = calibrate(model, BATCHES, method="magnitude")

        def broken(self: Any, budget: Budget) -> Any:
            made = prune_whole(self, budget)
            layer_views(made.model)[0].feed_forward_output.weight.data[0, 0] = 3e38
            layer_views(made.model)[0].feed_forward_output.weight.data[1, 0] = -3e38
            layer_views(made.model)[0].feed_forward_output.bias.data[:] = 3e38
            return made

        prune_whole = type(learnt)._prune  # type: ignore[attr-defined]
        monkeypatch.setattr(type(learnt), "_prune", broken)
        with pytest.raises(NumericalError, match=r"the smaller model, which was not saved: activations .*\(layer 0\)"):
            learnt.prune(Budget(0.5, 12))


class Faulty:
    """Models and examples with a fault in the inputs of the layers that are fitted."""

    def __init__(self, family: str, fault: str) -> None:
        self.model, self.batches = build_model(family, **SMALL), BATCHES
        if fault == "few tokens":
            self.batches = make_batches([4, 5], batch_size=2)
            return
        for view in layer_views(self.model):
            output = view.feed_forward_output
            makers = [view.linear(path) for path in view.architecture.feed_forward.inputs]
            for maker in makers:
                self._spoil(
                    fault, maker.weight.data, None if maker.bias is None else maker.bias.data, maker is makers[0]
                )
            if fault == "huge":
                output.weight.data[:, 0] *= 1e-8  # so that the model still computes

    @staticmethod
    def _spoil(fault: str, weight: torch.Tensor, bias: torch.Tensor | None, first: bool) -> None:
        bias = torch.zeros(len(weight)) if bias is None else bias
        if fault == "dead":
            weight[:18], bias[:18] = 0, 0
        elif fault == "constant":
            weight[:6], bias[:6] = 0, 1
        elif fault == "duplicated":
            weight[12:], bias[12:] = weight[:12].clone(), bias[:12].clone()
        elif fault == "low rank":  # three different neurons, 24 are there
            weight[:], bias[:] = weight[:3].repeat(8, 1), bias[:3].repeat(8)
        elif fault == "huge" and first:
            weight[0], bias[0] = weight[0] * 1e8, bias[0] * 1e8


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DampingWarning)
        yield


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("fault", FAULTS)
class TestColumns:
    """The bound: what an examples' fit gives is not worse than the choice of the same method without any fit."""

    @pytest.mark.parametrize("method", METHOD_NAMES)
    def test_pruning(self, family: str, fault: str, method: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ShrinkformerWarning)
            found, chance = Faulty(family, fault), Faulty(family, fault)
            made = prune(found.model, method, found.batches, mu=0.6)
            judge = Judge(found.model, found.batches, objective_of(found.model))
            worst = judge.of(prune(chance.model, "random", chance.batches, mu=0.6).model)
        require_finite_outputs(made.model, found.batches)
        assert made.plan.ratio <= 0.6
        if method not in {"random", "magnitude", "wanda", "kwon"}:  # these fit nothing
            assert judge.of(made.model) <= 1.5 * worst + 1e-6

    @pytest.mark.parametrize("quantizer", ["rtn", "gptq", "shrink"])
    def test_quantizing(self, family: str, fault: str, quantizer: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ShrinkformerWarning)
            made = Faulty(family, fault)
            found = quantize_(
                made.model, made.batches, QuantizeConfig(4, 8, quantizer=quantizer, scale_dtype=torch.bfloat16)
            )
        require_finite_outputs(made.model, made.batches)
        assert all(torch.isfinite(weight.decode()).all() for weight in found.weights.values())
        assert all(layer.error <= 1.05 * max(layer.nearest_error, 1e-6) or layer.error < 0.2 for layer in found.layers)


class TestWarnings:
    def test_few_tokens(self) -> None:
        few = make_batches([9, 8], batch_size=2)
        with pytest.warns(
            ShrinkformerWarning, match=r"17 calibration tokens are fewer than the 64 inputs.*3 of 3 blocks"
        ):
            calibrate(build_model(), few, method="stat")
        with pytest.warns(ShrinkformerWarning, match="17 calibration tokens"):
            quantize_(build_model(), few, QuantizeConfig(group_size=16))
        with warnings.catch_warnings():
            warnings.simplefilter("error", ShrinkformerWarning)
            calibrate(build_model(), few, method="magnitude")  # fits nothing

    def test_dead_and_huge_columns(self) -> None:
        dead = r"18 of 24 inputs of output\.dense of layer 0 are zero .* \(and many of 1 other layers\)"
        with pytest.warns(ShrinkformerWarning, match=dead):
            calibrate(dead_model(), BATCHES, method="stat")
        with pytest.warns(
            ShrinkformerWarning, match=r"1 of 24 inputs of output\.dense of layer \d are up to \de\+0[78] t"
        ):
            calibrate(Faulty("bert", "huge").model, BATCHES, method="stat")
        with pytest.warns(ShrinkformerWarning, match=r"1 of 24 inputs of fc2 of layer \d are up to"):
            quantize_(Faulty("opt", "huge").model, BATCHES, QuantizeConfig(group_size=8, scale_dtype=torch.bfloat16))

    def test_a_sound_model_is_passed_over_in_silence(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ShrinkformerWarning)
            prune(build_model(), "stat")
            quantize_(build_model(), BATCHES, QuantizeConfig(group_size=16))


def dead_model() -> Any:
    return Faulty("bert", "dead").model


class TestTypes:
    def test_weights_that_overflow_in_the_file(self) -> None:
        model = build_model()
        layer_views(model)[2].feed_forward_output.weight.data[0, 1] = -7e4
        match = r"bert\.encoder\.layer\.2\.output\.dense\.weight: its largest value, 7e\+04, overflows in float16"
        with pytest.raises(NumericalError, match=match):
            round_weights(model, torch.float16, but=())
        with pytest.raises(NumericalError, match=match):
            cast_weights(model, torch.float16)
        round_weights(model, torch.bfloat16, but=())

    def test_what_rounds_to_the_largest_number_does_not_overflow(self) -> None:
        model = build_model()
        layer_views(model)[2].feed_forward_output.weight.data[0, 1] = 65510.0
        cast_weights(model, torch.float16)
        assert layer_views(model)[2].feed_forward_output.weight[0, 1] == 65504

    def test_scales(self) -> None:
        scheme, weight = Scheme(4, 8), torch.ones(4, 16)
        require_scales("fc1", weight, scheme, torch.float16)
        with pytest.raises(NumericalError, match=r"fc1: its largest weight, 1e\+05, overflows in float16"):
            require_scales("fc1", 1e5 * weight, scheme, torch.float16)
        require_scales("fc1", 1e5 * weight, scheme, torch.bfloat16)
        weight[1] = 1e-6
        with pytest.warns(
            ShrinkformerWarning, match="2 of 8 groups of fc1 hold weights too small for scales in float16"
        ):
            require_scales("fc1", weight, scheme, torch.float16)

    def test_a_layer_of_zeros_stays_one(self) -> None:
        model = build_model(**SMALL)
        linear = layer_views(model)[0].feed_forward_output
        linear.weight.data.zero_()
        found = quantize_(model, BATCHES, QuantizeConfig(group_size=8, quantizer="rtn"))
        assert torch.count_nonzero(linear.weight) == 0
        assert all(torch.isfinite(weight.grid.scale).all() for weight in found.weights.values())


class TestPrediction:
    def test_shrink_says_what_it_predicted_and_measured(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ShrinkformerWarning)
            plan = prune(build_model(), "shrink").plan
        assert plan.prediction["measured"] == min(plan.divergences.values())
        assert plan.prediction["predicted"] > 0
        assert Plan.from_json(plan.to_json()) == plan

    @pytest.mark.parametrize(("measured", "surprising"), [(0.9, False), (1.1, True)])
    def test_a_surprise_is_told_with_both_numbers(self, measured: float, surprising: bool) -> None:
        prediction = {"predicted": 0.01, "measured": measured * SURPRISE * 0.01}
        plan = Plan("shrink", 0.5, 0, 12, 2, 1, (LayerPlan((0,), (0,)),), prediction=prediction)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            warn_of_surprise(plan)
        assert len(found) == surprising
        if surprising:
            text = str(found[0].message)
            assert f"{prediction['measured']:.5f}" in text
            assert "0.01000" in text


class TestCommands:
    @pytest.mark.parametrize("memory", [(), ("--max_memory", "0.00001")], ids=["in memory", "block by block"])
    def test_broken_weights_end_before_anything_is_computed(
        self, memory: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        poisoned("opt").save_pretrained(tmp_path / "mine")
        build_tokenizer().save_pretrained(tmp_path / "mine")
        data = write_corpora(tmp_path / "data")
        places = ("--model_name", str(tmp_path / "mine"), "--output_dir", str(tmp_path / "output"))
        assert call(prune_opt.main, data, *places, *memory) == 1
        shown = capsys.readouterr()
        line = shown.err.splitlines()[-1]
        assert line.startswith("prune_opt.py: error: model.decoder.layers.1.fc2.weight")
        assert "nan at [3, 5]" in line
        assert "calibrating" not in shown.out
        assert not list((tmp_path / "output").rglob("*.safetensors"))

    def test_few_tokens_and_predictions_are_told_once(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        build_model("opt").save_pretrained(tmp_path / "mine")
        build_tokenizer().save_pretrained(tmp_path / "mine")
        data = write_corpora(tmp_path / "data")
        flags = ("--model_name", str(tmp_path / "mine"), "--output_dir", str(tmp_path / "output"), "--mu", "0.7", "0.5")
        more = ("--method", "shrink", "--search_seconds", "0", "--sample_batch_size", "2")
        assert call(prune_opt.main, data, *flags, *more) == 0
        shown = capsys.readouterr()
        told = [line for line in shown.err.splitlines() if "calibration tokens are fewer than" in line]
        assert len(told) == 1
        assert told[0].startswith("prune_opt.py: warning: ")
        records = read_records(tmp_path / "output")
        for record in records:
            assert record["divergence"]["measured"] == min(record["held_out_divergence"].values())
            measured, predicted = (record["divergence"][name] for name in ("measured", "predicted"))
            assert f"divergence on examples set aside {measured:.5f}; predicted {predicted:.5f}" in shown.out
