"""Perplexity, against the recipes that it has to agree with."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel, OPTConfig, OPTForCausalLM

from shrinkformer.errors import CheckpointError, DataError, InputError, NumericalError
from shrinkformer.evaluate import perplexity
from shrinkformer.evaluate.perplexity import accumulate, evaluate_perplexity
from shrinkformer.utils.parallel import workers_of
from tests.test_parallel import as_torchrun_does, free_port

VOCABULARY, LENGTH = 61, 24


def build_decoder(**sizes: Any) -> OPTForCausalLM:
    """A tiny OPT with random weights; large ones, so that its predictions are far from uniform."""
    wanted = {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "vocab_size": VOCABULARY,
    }
    wanted |= {"num_attention_heads": 4, "max_position_embeddings": 64, "init_std": 0.3} | sizes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return OPTForCausalLM(OPTConfig(**wanted)).eval()


@pytest.fixture(scope="module")
def model() -> OPTForCausalLM:
    return build_decoder()


def random_windows(windows: int = 7, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def window_losses(model: OPTForCausalLM, windows: torch.Tensor) -> np.ndarray:
    """Total NLL of each window, all in float64 from the logits on."""
    logits = model(windows).logits.double().numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(logs[:, :-1], windows[:, 1:, None].numpy(), -1).sum((1, 2))


class TestRecipes:
    def test_it_is_the_direct_float64_figure(self, model):
        windows = random_windows()
        found = evaluate_perplexity(model, windows, batch_size=3)
        nll = window_losses(model, windows).sum() / (7 * (LENGTH - 1))
        assert found.nll == pytest.approx(nll, rel=1e-7)
        assert found.value == pytest.approx(math.exp(nll), rel=1e-6)
        assert (found.tokens, found.windows) == (7 * (LENGTH - 1), 7)
        assert found.seconds > 0

    @torch.no_grad()
    def test_it_is_gptqs_figure(self, model):
        windows = random_windows()
        sums = []
        for window in windows:
            logits = model(window[None]).logits[0, :-1]
            sums.append(torch.nn.CrossEntropyLoss()(logits, window[1:]).float() * LENGTH)
        expected = torch.exp(torch.stack(sums).sum() / (len(windows) * LENGTH)).item()
        assert evaluate_perplexity(model, windows, batch_size=4).value == pytest.approx(expected, rel=1e-6)

    @torch.no_grad()
    def test_it_is_the_figure_of_the_transformers_guide(self, model):
        windows = random_windows()
        losses = [model(window[None], labels=window[None]).loss for window in windows]
        expected = torch.exp(torch.stack(losses).mean()).item()
        assert evaluate_perplexity(model, windows, batch_size=4).value == pytest.approx(expected, rel=1e-6)

    def test_every_token_counts_the_same_in_windows_of_unequal_length(self, model):
        parts = [random_windows(3, 20), random_windows(2, 5), random_windows(4, 2)]
        with torch.no_grad():
            found = accumulate((ids, model(ids).logits) for ids in parts)
        total = sum(window_losses(model, ids).sum() for ids in parts)
        assert found.tokens == 3 * 19 + 2 * 4 + 4
        assert found.nll == pytest.approx(total / found.tokens, rel=1e-7)

    def test_what_is_known_by_heart(self):
        ids = random_windows(2)
        assert accumulate([(ids, torch.zeros(2, LENGTH, 50 + VOCABULARY))]).value == pytest.approx(
            50 + VOCABULARY, rel=1e-6
        )
        sure = torch.zeros(2, LENGTH, VOCABULARY)
        sure[:, :-1].scatter_(2, ids[:, 1:, None], 200.0)
        assert accumulate([(ids, sure)]).value == 1.0


class TestInvariance:
    @pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
    def test_the_batch_size_does_not_matter(self, model, batch_size):
        windows = random_windows()
        whole = evaluate_perplexity(model, windows, batch_size=7)
        found = evaluate_perplexity(model, windows, batch_size=batch_size)
        assert found.value == pytest.approx(whole.value, rel=1e-6)
        assert found.stderr == pytest.approx(whole.stderr, rel=1e-4)

    @pytest.mark.parametrize("size", [1, 1000, 5000])
    def test_the_slices_do_not_matter(self, monkeypatch, size):
        ids, logits = random_windows(), torch.randn(7, LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(2))
        whole = accumulate([(ids, logits)])
        monkeypatch.setattr(perplexity, "_SLICE", size)
        assert accumulate([(ids, logits)]).nll == pytest.approx(whole.nll, rel=1e-12)

    def test_half_precision_logits_are_judged_in_float32(self, model):
        windows = random_windows()
        with torch.no_grad():
            logits = model(windows).logits.bfloat16()
        found = accumulate([(windows, logits)])
        assert found.nll == pytest.approx(accumulate([(windows, logits.double().float())]).nll, rel=1e-12)

    def test_no_float32_copy_of_all_logits_is_made(self, monkeypatch):
        class Largest(TorchDispatchMode):
            elements = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                    self.elements = max(self.elements, result.numel())
                return result

        monkeypatch.setattr(perplexity, "_SLICE", 5000)
        ids = random_windows(4, 50)
        logits = torch.zeros(4, 50, 500, dtype=torch.bfloat16)
        with Largest() as largest:
            accumulate([(ids, logits)])
        assert 500 <= largest.elements <= 5000


class TestStandardError:
    def test_equal_windows_give_the_spread_of_their_means(self, model):
        windows = random_windows()
        found = evaluate_perplexity(model, windows, batch_size=7)
        means = window_losses(model, windows) / (LENGTH - 1)
        assert found.stderr == pytest.approx(found.value * means.std(ddof=1) / math.sqrt(7), rel=1e-4)

    def test_it_is_what_other_samples_of_windows_show(self):
        rng = np.random.default_rng(0)
        lengths = rng.integers(2, 40, size=300)
        outputs = []
        for length in lengths:
            logits = torch.from_numpy(rng.normal(scale=rng.uniform(0.5, 3), size=(1, length, VOCABULARY))).float()
            outputs.append((torch.from_numpy(rng.integers(0, VOCABULARY, size=(1, length))), logits))
        found = accumulate(outputs)
        sums = np.array([accumulate([pair]).nll * (pair[0].shape[1] - 1) for pair in outputs])
        draws = rng.integers(300, size=(4000, 300))
        replicates = np.exp(sums[draws].sum(1) / (lengths - 1)[draws].sum(1))
        assert found.stderr == pytest.approx(replicates.std(), rel=0.1)

    def test_one_window_has_none(self, model):
        assert evaluate_perplexity(model, random_windows(1), batch_size=1).stderr == 0.0


class TestModel:
    def test_the_model_is_left_as_it_was(self):
        model = build_decoder(dropout=0.5).train()
        model.model.decoder.layers[0].eval()
        modes = [module.training for module in model.modules()]
        state = torch.get_rng_state()
        first, second = (evaluate_perplexity(model, random_windows(), batch_size=3) for _ in range(2))
        assert first.value == second.value  # no dropout
        assert [module.training for module in model.modules()] == modes
        assert torch.get_rng_state().equal(state)
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_no_cache_of_keys_and_values_is_kept(self, model, monkeypatch):
        outputs = []
        forward = model.forward
        monkeypatch.setattr(model, "forward", lambda **inputs: outputs.append(forward(**inputs)) or outputs[-1])
        evaluate_perplexity(model, random_windows(), batch_size=3)
        assert [output.logits.shape[0] for output in outputs] == [3, 3, 1]
        assert all(output.past_key_values is None for output in outputs)
        assert not any(output.logits.requires_grad for output in outputs)

    def test_progress_is_shown_on_request_only(self, model, capsys):
        evaluate_perplexity(model, random_windows(), batch_size=3)
        assert capsys.readouterr() == ("", "")
        evaluate_perplexity(model, random_windows(), batch_size=3, progress=True)
        assert "perplexity: 7 of 7 windows" in capsys.readouterr().out  # whole lines: this is no terminal


class TestErrors:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("position", [0, 13, LENGTH - 2])
    def test_a_bad_logit_is_an_error_of_one_line(self, value, position):
        logits = torch.zeros(7, LENGTH, VOCABULARY)
        logits[5, position, 0] = value
        with pytest.raises(NumericalError, match="logits of the model are NaN or infinite") as caught:
            accumulate([(random_windows(), logits)])
        assert "\n" not in str(caught.value)

    def test_nothing_is_computed_after_a_bad_batch(self):
        ids, logits = random_windows(1), torch.full((1, LENGTH, VOCABULARY), math.nan)
        batches = iter([(ids, logits), (ids, logits), (ids, logits)])
        with pytest.raises(NumericalError):
            accumulate(batches)
        assert len(list(batches)) == 2

    @pytest.mark.parametrize(("windows", "length"), [(0, LENGTH), (3, 1)])
    def test_nothing_to_predict_is_an_error(self, model, windows, length):
        with pytest.raises(DataError, match="perplexity of nothing"):
            evaluate_perplexity(model, random_windows(windows, length), batch_size=2)

    def test_a_hopeless_model_has_infinite_perplexity_and_no_traceback(self):
        ids, logits = random_windows(2), torch.zeros(2, LENGTH, VOCABULARY)
        logits[:, :, 0] = 1e4  # token 0 never comes
        found = accumulate([(ids, logits)])
        assert found.value == math.inf
        assert found.nll == pytest.approx(1e4)

    def test_windows_that_do_not_fit_the_model(self, model):
        with pytest.raises(InputError, match="65 tokens exceed the model's 64 positions"):
            evaluate_perplexity(model, random_windows(2, 65), batch_size=2)
        with pytest.raises(CheckpointError, match=f"token {VOCABULARY}, the model knows {VOCABULARY}"):
            evaluate_perplexity(model, torch.full((2, LENGTH), VOCABULARY), batch_size=2)
        with pytest.raises(InputError, match="--batch_size 0"):
            evaluate_perplexity(model, random_windows(), batch_size=0)

    def test_a_model_without_logits_is_none(self):
        sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
        encoder = BertModel(BertConfig(vocab_size=VOCABULARY, **sizes))
        with pytest.raises(CheckpointError, match="BertModel gives no logits"):
            evaluate_perplexity(encoder, random_windows(), batch_size=2)

    def test_logits_of_other_tokens_are_refused(self):
        with pytest.raises(CheckpointError, match=r"\(2, 24, 9\) do not fit tokens of \(3, 24\)"):
            accumulate([(random_windows(3), torch.zeros(2, LENGTH, 9))])


def share_work(rank: int, size: int, port: int, folder: Path) -> None:
    """What each of several processes does; an assertion that fails here fails the test."""
    as_torchrun_does(rank, size, port)
    torch.set_num_threads(1)
    with workers_of("cpu") as workers:
        model, windows = build_decoder(), random_windows()
        for count in (7, 1):  # one window leaves a process without work
            found = evaluate_perplexity(model, windows[:count], batch_size=2, workers=workers)
            alone = evaluate_perplexity(model, windows[:count], batch_size=2)
            assert (found.tokens, found.windows) == (alone.tokens, alone.windows)
            assert found.value == pytest.approx(alone.value, rel=1e-6)
            assert found.stderr == pytest.approx(alone.stderr, rel=1e-4)
        assert workers.gather([found.value]) == [found.value] * size
        logits = torch.full((1, LENGTH, VOCABULARY), math.nan if rank == 1 else 0.0)
        with pytest.raises(NumericalError, match="NaN"):  # in all of them, not only where the fault is
            accumulate([(windows[:1], logits)], workers)
        (folder / f"{rank}").touch()


def test_processes_that_share_the_windows_agree_with_one(tmp_path):
    torch.multiprocessing.spawn(share_work, (2, free_port(), tmp_path), nprocs=2)
    assert len(list(tmp_path.iterdir())) == 2
