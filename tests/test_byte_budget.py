"""A budget in bytes: counted as on disk, never exceeded, met by the best of what can be chosen."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shrinkformer.architectures import layer_views
from shrinkformer.efficiency.size import checkpoint_bytes, folder_bytes
from shrinkformer.errors import BudgetError, InputError
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.checkpoint import describe_sizes
from shrinkformer.prune.knapsack import choose, frontier
from shrinkformer.prune.shrink_config import ShrinkConfig
from shrinkformer.quantize.byte_budget import Compressor, learn_bytes, require_bytes
from shrinkformer.quantize.byte_costs import FLOAT, ByteCosts
from shrinkformer.quantize.byte_search import ByteSearch, Mixture
from shrinkformer.quantize.checkpoint import load, save
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.drafts import Choice, Drafts, untouched
from shrinkformer.quantize.tempering import errors_left
from tests.conftest import FAMILIES, build_model, make_batches

BATCHES = make_batches([3 + index % 18 for index in range(48)], batch_size=16)
CONFIG = QuantizeConfig(group_size=8, scale_dtype=torch.float32)
LIMITS = Budget(1.0, 11.0, round_to=8)
IDS = torch.arange(5, 15)[None]


@pytest.fixture(scope="module", params=["bert", "opt"])
def learnt(request: pytest.FixtureRequest) -> Compressor:
    return learn_bytes(build_model(request.param), BATCHES, CONFIG, LIMITS, ShrinkConfig(search_seconds=0))


def written(learnt: Compressor, mixture: Mixture, folder: Path) -> Path:
    found = learnt.carry_out(mixture)
    plan = None if found.pruned is None else found.pruned.plan
    if plan is not None:
        describe_sizes(found.model, plan)
    save(found.model, found.quantized.weights, folder, dtype=torch.float32, plan=plan, tied_once=True)
    again = load(folder)
    assert torch.equal(again(input_ids=IDS)[0], found.model(input_ids=IDS)[0])
    return folder


class TestBytes:
    @pytest.mark.parametrize("ratio", [0.6, 0.3])
    def test_the_file_is_what_was_counted_and_no_more(self, learnt: Compressor, ratio: float, tmp_path: Path) -> None:
        allowed = int(ratio * checkpoint_bytes(learnt.shrinker.model))
        mixture = learnt.plans(allowed)[0]
        size = folder_bytes(written(learnt, mixture, tmp_path / "small"))
        assert size <= mixture.bytes <= allowed
        names = 12 * len(list(learnt.shrinker.model.parameters()))
        assert mixture.bytes - size <= 2 * names  # digits of offsets

    @pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
    def test_nothing_chosen_is_the_dense_file(self, family: str, tmp_path: Path) -> None:
        model = build_model(family)
        costs = ByteCosts(model, CONFIG)
        total = costs.rest + sum(costs.matrix(names, FLOAT) or 0 for names in costs.outside)
        for view in layer_views(model):
            for sublayer, units in (("attention", view.heads), ("ffn", view.neurons)):
                total += costs.sublayer(view.index, sublayer, units, (FLOAT, FLOAT)) or 0
        model.save_pretrained(tmp_path)
        assert 0 <= total - folder_bytes(tmp_path) <= 20 * len(model.state_dict())

    def test_groups_have_to_divide(self) -> None:
        costs = ByteCosts(build_model("bert"), QuantizeConfig(group_size=16))
        assert costs.sublayer(0, "ffn", 24, (4, FLOAT)) is not None
        assert costs.sublayer(0, "ffn", 24, (4, 4)) is None


class TestSearch:
    def test_no_other_plan_that_fits_promises_less_damage(self, learnt: Compressor) -> None:
        options, generator = learnt.searches[0].options, np.random.default_rng(0)
        groups = [frontier(list(options.of(part))) for part in options.parts]
        for _ in range(3):
            some = [[group[index] for index in generator.integers(len(group), size=500)] for group in groups]
            plans = list(zip(*some, strict=True))
            spare = float(np.median([sum(one.cost for one in plan) for plan in plans]))
            fitting = [plan for plan in plans if sum(one.cost for one in plan) <= spare]
            _, expected = choose(groups, spare)
            assert len(fitting) > 100
            assert expected <= min(sum(one.damage for one in plan) for plan in fitting)

    def test_more_bytes_do_less_damage(self, learnt: Compressor) -> None:
        dense = checkpoint_bytes(learnt.shrinker.model)
        damages = [learnt.plans(int(ratio * dense))[0].damage for ratio in (0.8, 0.4, 0.25)]
        assert damages == sorted(damages)

    def test_improvement_helps_and_is_the_same_twice(self) -> None:
        model = build_model("opt", num_hidden_layers=1)
        found = learn_bytes(model, BATCHES, CONFIG, LIMITS, ShrinkConfig(search_seconds=0))
        options, damage, allowed = found.searches[0].options, found.shrinker.damage, int(0.5 * checkpoint_bytes(model))
        better, again = (ByteSearch(options, damage, seconds=60.0).run(allowed) for _ in range(2))
        assert better.damage <= found.plans(allowed)[0].damage
        assert better.choices == again.choices
        assert better.bytes <= allowed

    def test_the_dense_model_is_left_alone(self) -> None:
        model = build_model("opt", num_hidden_layers=1)
        before = copy.deepcopy(model.state_dict())
        random = torch.random.get_rng_state()
        found = learn_bytes(model, BATCHES, CONFIG, LIMITS, ShrinkConfig(search_seconds=1))
        found.best(found.plans(int(0.5 * checkpoint_bytes(model))))
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
        assert torch.equal(random, torch.random.get_rng_state())


class TestTempering:
    def test_drafts_hold_what_is_left_of_rounding_errors(self, learnt: Compressor) -> None:
        drafts, level = Drafts(learnt.shrinker, learnt.costs, CONFIG), learnt.shrinker.levels[0]
        state = {name: Choice(one.units, (2, 4)) for name, one in untouched(level.view).items()}
        dense, coarse = state_of(level.view.block), state_of(drafts.block(0, state))
        tempered = state_of(drafts.tempered({2: 0.0, 3: 0.5}).block(0, state))
        attention = level.view.architecture.attention
        assert torch.equal(tempered[f"{attention.query}.weight"], dense[f"{attention.query}.weight"])
        name = f"{attention.output}.weight"  # in 4 bits, of which the errors are those of 3
        assert not torch.equal(coarse[name], dense[name])
        assert torch.allclose(tempered[name], (dense[name] + coarse[name]) / 2, atol=1e-6)

    def test_they_are_measured(self, learnt: Compressor) -> None:
        options, random = learnt.searches[0].options, torch.random.get_rng_state()
        left = errors_left(learnt.shrinker, options, learnt.costs, CONFIG)
        assert left.keys() == {2, 3}
        assert all(0 < share <= 1 for share in left.values())
        assert left[2] < 1
        assert left == errors_left(learnt.shrinker, options, learnt.costs, CONFIG)
        assert torch.equal(random, torch.random.get_rng_state())

    def test_the_plan_that_is_better_on_examples_set_aside_is_taken(self, learnt: Compressor) -> None:
        mixtures = [learnt.plans(int(ratio * checkpoint_bytes(learnt.shrinker.model)))[0] for ratio in (0.3, 0.7)]
        each = [learnt.shrinker.judge.of(learnt.carry_out(mixture).model) for mixture in mixtures]
        best = learnt.best(mixtures)
        assert learnt.shrinker.judge.of(best.model) == min(each) < max(each)
        assert best.quantized.seconds["safety"] > 0

    def test_nothing_that_groups_divide_is_nothing_to_temper(self) -> None:
        model = build_model("bert", hidden_size=36, intermediate_size=60)
        learnt = learn_bytes(model, BATCHES, replace(CONFIG, group_size=16), LIMITS, ShrinkConfig(search_seconds=0))
        options = learnt.searches[0].options
        assert errors_left(learnt.shrinker, options, learnt.costs, learnt.config) == {2: 1.0, 3: 1.0}


def state_of(block: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(block.state_dict())


class TestLimits:
    def test_too_few_bytes(self, learnt: Compressor) -> None:
        dense = checkpoint_bytes(learnt.shrinker.model)
        with pytest.raises(BudgetError, match=r"--target_ratio: .* bytes are fewer than"):
            learnt.plans(int(0.01 * dense))
        with pytest.raises(BudgetError, match=r"--target_ratio 0.01: the smallest model takes 0\."):
            require_bytes(learnt.shrinker.model, CONFIG, LIMITS, 0.01, dense)
        require_bytes(learnt.shrinker.model, CONFIG, LIMITS, 0.5, dense)

    def test_conv1d(self) -> None:
        with pytest.raises(InputError, match="is a Conv1D"):
            learn_bytes(build_model("gpt2"), BATCHES, CONFIG, LIMITS)
