"""Where config.json and the weight files differ, the files are believed."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import shrinkformer
from shrinkformer.architectures import layer_views
from shrinkformer.commands.locate import Source, class_of, load_model
from shrinkformer.commands.main import main
from shrinkformer.errors import CheckpointError, InputError, ShrinkformerWarning
from shrinkformer.prune.checkpoint import save
from shrinkformer.prune.opening import load_pretrained, open_config
from shrinkformer.prune.pruner import prune_model
from tests.conftest import build_model, make_batches
from tests.test_opening import State, checkpoint


def half(state: State) -> State:
    return {name: tensor.half() for name, tensor in state.items()}


def opened(folder: Path) -> Source:
    return Source(folder.name, str(folder), open_config(folder))


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**make_batches([9, 5], batch_size=2)[0])[0]
    return found


class TestType:
    @pytest.mark.parametrize("as_bin", [False, True])
    @pytest.mark.parametrize("entry", [..., "float32", "bfloat16"])
    def test_it_is_that_of_the_tensors(self, entry: Any, as_bin: bool, tmp_path: Path) -> None:
        folder = checkpoint(tmp_path, change=half, as_bin=as_bin, config={"dtype": entry})
        assert opened(folder).dtype == torch.float16

    def test_load_takes_it_too(self, tmp_path: Path) -> None:
        pruned = prune_model(build_model().half().float(), make_batches([9, 5, 7], batch_size=3), mu=0.8, method="stat")
        save(pruned.model.to(torch.bfloat16), tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
        assert shrinkformer.load(tmp_path).dtype == torch.bfloat16

    def test_the_few_others_are_named(self, tmp_path: Path) -> None:
        def mixed(state: State) -> State:
            return half(state) | {"model.norm.weight": state["model.norm.weight"]}

        folder = checkpoint(tmp_path, "llama", change=mixed)
        with pytest.warns(ShrinkformerWarning, match=r"1 of \d+ tensors, such as model\.norm\.weight, are float32"):
            assert opened(folder).dtype == torch.float16


class TestTying:
    @staticmethod
    def apart(state: State) -> State:
        return state | {"lm_head.weight": torch.randn(46, 32, generator=torch.Generator().manual_seed(1))}

    @pytest.mark.parametrize("as_bin", [False, True])
    @pytest.mark.parametrize(("family", "sizes"), [("opt", {}), ("llama", {"tie_word_embeddings": True})])
    def test_a_head_that_was_trained_apart_is_used_and_kept(
        self, family: str, sizes: dict[str, Any], as_bin: bool, tmp_path: Path
    ) -> None:
        folder = checkpoint(tmp_path / "a", family, change=self.apart, as_bin=as_bin, **sizes)
        source, batches = opened(folder), make_batches([9, 5, 7], batch_size=3)
        assert not source.config.tie_word_embeddings
        model, _ = load_model(source, class_of(source), "cpu", torch.float32)
        assert model.lm_head.weight.equal(self.apart({})["lm_head.weight"])
        lazy, _ = load_model(source, class_of(source), "cpu", torch.float32, lazily=True)
        assert lazy.lm_head.weight.equal(model.lm_head.weight)
        again = save(prune_model(model, batches, mu=0.9, method="stat").model, tmp_path / "b")
        assert shrinkformer.load(again).lm_head.weight.equal(model.lm_head.weight)

    def test_the_same_matrix_twice_stays_tied(self, tmp_path: Path) -> None:
        embeddings = "model.decoder.embed_tokens.weight"
        folder = checkpoint(tmp_path, "opt", change=lambda state: state | {"lm_head.weight": state[embeddings].clone()})
        assert opened(folder).config.tie_word_embeddings

    def test_a_head_that_is_missing_names_the_entry(self, tmp_path: Path) -> None:
        folder = checkpoint(tmp_path, "opt", config={"tie_word_embeddings": False})
        with pytest.raises(CheckpointError, match=r'lack lm_head\.weight.*"tie_word_embeddings": true'):
            load_pretrained(AutoModelForCausalLM, folder)


class TestClass:
    @pytest.mark.parametrize(
        ("family", "head"),
        [
            ("llama", "ForCausalLM"),
            ("opt", "ForCausalLM"),
            ("qwen2", "Model"),
            ("bert", "Model"),
            ("bert", "ForSequenceClassification"),
            ("bert", "ForTokenClassification"),
            ("bert", "ForPreTraining"),
            ("distilbert", "ForMaskedLM"),
            ("roberta", "ForQuestionAnswering"),
            ("roberta", "ForMaskedLM"),
            ("llama", "ForSequenceClassification"),
        ],
    )
    def test_it_is_found_by_the_tensors(self, family: str, head: str, tmp_path: Path) -> None:
        folder = checkpoint(tmp_path, family, head, config={"architectures": ...})
        (found,) = open_config(folder).architectures
        assert found == type(build_model(family, head)).__name__

    def test_a_class_that_transformers_has_not_is_found_too(self, tmp_path: Path) -> None:
        folder = checkpoint(tmp_path, "mistral", config={"architectures": ["MyMistralLM"]})
        assert open_config(folder).architectures == ["MistralForCausalLM"]

    def test_several_that_fit_are_named_and_no_head_falls_off(self, tmp_path: Path) -> None:
        folder = checkpoint(tmp_path, num_labels=1, config={"architectures": ...})
        with pytest.warns(ShrinkformerWarning, match="fit BertForMultipleChoice, BertForSequenceClassification; add"):
            source = opened(folder)
        with pytest.raises(InputError, match=r"names no architectures.*add"):
            class_of(source)


class TestPrunedHeads:
    """``prune_heads`` of transformers 4 took the rows and columns of heads out, and wrote which ones."""

    PATHS = {  # noqa: RUF012
        "bert": ("bert.encoder.layer.{}.attention.", ("self.query", "self.key", "self.value"), "output.dense"),
        "roberta": ("roberta.encoder.layer.{}.attention.", ("self.query", "self.key", "self.value"), "output.dense"),
        "electra": ("electra.encoder.layer.{}.attention.", ("self.query", "self.key", "self.value"), "output.dense"),
        "distilbert": ("distilbert.transformer.layer.{}.attention.", ("q_lin", "k_lin", "v_lin"), "out_lin"),
        "gpt2": ("transformer.h.{}.attn.", ("c_attn",), "c_proj"),
    }

    def cut(self, family: str, state: State, gone: dict[int, list[int]], *, silent: bool) -> State:
        """Take heads of 8 out, or only silence them: both compute the same."""
        state = {name: tensor.clone() for name, tensor in state.items()}
        for block, heads in gone.items():
            path, producers, consumer = self.PATHS[family]
            lost = (torch.tensor(heads)[:, None] * 8 + torch.arange(8)).flatten()
            keep = torch.tensor([column for column in range(32) if column not in lost])
            out = f"{path.format(block)}{consumer}.weight"
            if silent:
                state[out][lost if family == "gpt2" else (slice(None), lost)] = 0
                continue
            state[out] = state[out][keep] if family == "gpt2" else state[out][:, keep]
            rows = torch.cat([keep + 32 * part for part in range(3)]) if family == "gpt2" else keep
            for name in producers:
                for kind in ("weight", "bias"):
                    whole = f"{path.format(block)}{name}.{kind}"
                    state[whole] = state[whole][..., rows] if family == "gpt2" else state[whole][rows]
        return state

    @pytest.mark.parametrize("family", PATHS)
    def test_they_are_read_pruned_on_and_saved(self, family: str, tmp_path: Path) -> None:
        gone = {0: [1], 2: [0, 3]}
        written = {"pruned_heads": {str(block): heads for block, heads in gone.items()}}
        folder = checkpoint(
            tmp_path / "a", family, change=lambda state: self.cut(family, state, gone, silent=False), config=written
        )
        same = checkpoint(tmp_path / "b", family, change=lambda state: self.cut(family, state, gone, silent=True))
        source = opened(folder)
        model, _ = load_model(source, class_of(source), "cpu", torch.float32)
        assert [view.heads for view in layer_views(model)] == [3, 4, 2]
        whole, _ = load_model(opened(same), class_of(opened(same)), "cpu", torch.float32)
        assert torch.allclose(outputs(model), outputs(whole), atol=1e-5)
        lazy, _ = load_model(source, class_of(source), "cpu", torch.float32, lazily=True)
        assert [view.heads for view in layer_views(lazy)] == [3, 4, 2]
        pruned = prune_model(model, make_batches([9, 5, 7], batch_size=3), mu=0.8, method="stat").model
        again = save(pruned, tmp_path / "c")
        assert "pruned_heads" not in json.loads((again / "config.json").read_text())
        assert outputs(shrinkformer.load(again)).equal(outputs(pruned))

    def test_inspect_tells_their_sizes(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        gone = {0: [1]}
        folder = checkpoint(
            tmp_path,
            change=lambda state: self.cut("bert", state, gone, silent=False),
            config={"pruned_heads": {"0": [1]}},
        )
        assert main(["inspect", str(folder), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [layer["heads"] for layer in found["layers"]] == [3, 4, 4]
        assert found["dense"]["macs"] > found["macs"]

    @pytest.mark.parametrize("entry", [{"9": [0]}, {"0": [4]}, {"0": [0, 1, 2, 3]}, ["0"], {"x": [1]}])
    def test_what_cannot_be_is_refused_by_name(self, entry: Any, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"pruned_heads is .* 3 blocks .* 4 heads"):
            open_config(checkpoint(tmp_path, config={"pruned_heads": entry}))

    def test_nothing_pruned_passes_without_a_word(self, tmp_path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ShrinkformerWarning)
            assert not getattr(open_config(checkpoint(tmp_path, config={"pruned_heads": {}})), "shrinkformer", None)
