"""What this package hands out or changes in place is saved by the tools of others, and opens without this package."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import prune as masks
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

import shrinkformer
from shrinkformer.architectures import layer_views
from shrinkformer.errors import UnsupportedModelError
from shrinkformer.prune.checkpoint import describe_sizes
from shrinkformer.prune.plan import Plan
from shrinkformer.prune.refit import slice_consumer
from shrinkformer.prune.surgery import remove_neurons
from shrinkformer.quantize.checkpoint import save as save_quantized
from tests.conftest import WITHOUT_US, build_model, build_tokenizer, make_batches

BATCHES = make_batches([3 + index % 18 for index in range(32)], batch_size=8)
FAST = shrinkformer.PruneConfig(mu=0.5, method="stat")

OPENS = (
    WITHOUT_US
    + """
import json
for folder, auto in json.loads(sys.argv[1]):
    batch, expected = torch.load(folder + "/expected.pt", weights_only=True)
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    found = model(**batch)[0]
    assert torch.equal(found, expected), folder
    found.float().square().sum().backward()  # someone trains it further, and saves it again
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    trained = model(**batch)[0]
    assert not torch.equal(trained, expected), folder
    model.save_pretrained(folder + "/again")
    again = getattr(transformers, auto).from_pretrained(folder + "/again", trust_remote_code=True).eval()
    assert torch.equal(again(**batch)[0], trained), folder
"""
)


def pruned(family: str = "bert", head: str | None = None) -> shrinkformer.Pruned:
    return shrinkformer.prune_model(build_model(family, head), BATCHES, mu=0.5, method="stat")


def loaded(folder: Path, family: str = "bert", head: str | None = None) -> Any:
    """A model that this package wrote and read."""
    result = pruned(family, head)
    shrinkformer.save(result.model, folder, plan=result.plan)
    return shrinkformer.load(folder)


def in_place(family: str = "bert", head: str | None = None) -> Any:
    model = build_model(family, head)
    shrinkformer.prune_(model, BATCHES, FAST)
    return model


def by_trainer(target: Path) -> Any:
    """A Trainer prunes when it has trained, then saves."""
    data = [{"input_ids": row[:3], "labels": index % 2} for index, row in enumerate(BATCHES[0]["input_ids"])]
    arguments = TrainingArguments(
        str(target.parent / "run"), max_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(
        build_model(), arguments, train_dataset=data, callbacks=[shrinkformer.PruneCallback(FAST, calibration=BATCHES)]
    )
    trainer.train()
    trainer.save_model(str(target))
    return trainer.model


def by_peft(target: Path) -> Any:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        loaded(target.parent / "for-peft", "opt"),
        peft.LoraConfig(r=2, target_modules=["v_proj", "fc1"], init_lora_weights=False),
    )
    merged = adapted.merge_and_unload()
    merged.save_pretrained(target)
    return merged


def around(target: Path) -> Any:
    """The base model inside a stock model is pruned; whoever holds the stock model saves that."""
    outer = build_model("roberta", "ForQuestionAnswering")
    shrinkformer.prune_(outer.roberta, BATCHES, FAST)
    outer.save_pretrained(target)
    return outer


class MyBert(BertForSequenceClassification):
    """A class that others do not have."""


def of_ones_own_class(target: Path) -> Any:
    model = build_model()
    model.__class__ = MyBert
    plan = shrinkformer.prune_(model, BATCHES, FAST)
    assert type(model) is MyBert
    shrinkformer.save(model, target, plan=plan)
    return model


def from_integers(folder: Path) -> Any:
    """A folder with integers, decoded when it is read."""
    result = shrinkformer.prune_model(build_model(), BATCHES, mu=0.5, method="stat")
    found = shrinkformer.quantize_(result.model, BATCHES, shrinkformer.QuantizeConfig(bits=8, group_size=-1))
    save_quantized(result.model, found.weights, folder, plan=result.plan)
    return shrinkformer.load(folder)


def quantized(target: Path) -> Any:
    model = loaded(target.parent / "for-quantize", "llama")
    shrinkformer.quantize_(model, BATCHES, shrinkformer.QuantizeConfig(bits=4, group_size=-1))
    model.save_pretrained(target)
    return model


def simply(model: Any) -> Any:
    """Of what makes a model: the function that also saves it."""

    def way(target: Path) -> Any:
        made = model(target.parent / f"before-{target.name}")
        made.save_pretrained(target)
        return made

    return way


CLASSIFIER, LANGUAGE = "AutoModelForSequenceClassification", "AutoModelForCausalLM"

WAYS: dict[str, tuple[str, Any]] = {
    "load": (CLASSIFIER, simply(loaded)),
    "load in bfloat16": (CLASSIFIER, simply(lambda folder: loaded(folder).bfloat16())),
    "prune_model": (LANGUAGE, simply(lambda _: pruned("llama").model)),
    "prune_": ("AutoModelForQuestionAnswering", simply(lambda _: in_place("distilbert", "ForQuestionAnswering"))),
    "prune_, twice": (LANGUAGE, simply(lambda _: shrinkformer.prune_model(in_place("gpt2"), BATCHES, mu=0.7).model)),
    "prune_, masked language model": ("AutoModelForMaskedLM", simply(lambda _: in_place("bert", "ForMaskedLM"))),
    "prune_, heads that transformers cannot count": (LANGUAGE, simply(lambda _: in_place("gpt_neox"))),
    "a copy": (CLASSIFIER, simply(lambda _: copy.deepcopy(in_place("electra")))),
    "a pickle": (CLASSIFIER, simply(lambda folder: pickle.loads(pickle.dumps(loaded(folder))))),
    "the base model": ("AutoModel", simply(lambda folder: loaded(folder).bert)),
    "the base model of a model in memory": ("AutoModel", simply(lambda _: in_place("qwen2").model)),
    "a stock model around it": ("AutoModelForQuestionAnswering", around),
    "one's own class": (CLASSIFIER, of_ones_own_class),
    "Trainer": (CLASSIFIER, by_trainer),
    "peft": (LANGUAGE, by_peft),
    "quantize_": (LANGUAGE, quantized),
    "load of integers": (CLASSIFIER, simply(from_integers)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All folders, after another process without this package has opened them, trained and saved again."""
    root, folders, jobs = tmp_path_factory.mktemp("saved"), {}, []
    for index, (name, (auto, way)) in enumerate(WAYS.items()):
        folder = folders[name] = root / f"way{index}"
        model = way(folder).eval()
        with torch.no_grad():
            torch.save((BATCHES[1], model(**BATCHES[1])[0]), folder / "expected.pt")
        jobs.append((str(folder), auto))
    done = subprocess.run(
        [sys.executable, "-c", OPENS, json.dumps(jobs)], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folders


@pytest.mark.parametrize("again", ["", "again"])
@pytest.mark.parametrize("way", WAYS)
def test_the_folder_is_whole(way: str, again: str, saved: dict[str, Path]) -> None:
    folder, auto = saved[way] / again, WAYS[way][0]
    config = json.loads((folder / "config.json").read_text())
    (name,) = config["architectures"]
    assert config["auto_map"]["AutoModel"].endswith("Model")
    assert config["auto_map"][CLASSIFIER].endswith("ForSequenceClassification")  # of any folder a new head can be made
    assert config["auto_map"][auto] == f"pruned_modeling.{name}"
    assert "plan_text" not in config
    assert {"format", "architecture", "layers", "plan"} <= set(config["shrinkformer"])
    assert (folder / "pruned_modeling.py").is_file()
    plan = Plan.from_json((folder / "shrinkformer_plan.json").read_text())
    assert plan.heads == [layer["heads"] for layer in config["shrinkformer"]["layers"]]
    batch, expected = torch.load(saved[way] / "expected.pt", weights_only=True)
    if not again:
        assert torch.equal(shrinkformer.load(folder).eval()(**batch)[0], expected)


def test_results_of_stock_shape_are_saved_as_stock(tmp_path: Path) -> None:
    model = loaded(tmp_path / "free", "mistral")
    uniform = shrinkformer.prune_model(model, BATCHES, mu=0.6, method="stat", uniform=True).model
    assert type(uniform).__module__.startswith("transformers.")
    assert type(uniform.model).__module__.startswith("transformers.")
    uniform.save_pretrained(tmp_path / "uniform")
    assert {path.name for path in (tmp_path / "uniform").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert not {"auto_map", "shrinkformer", "per_layer_config"} & set(
        json.loads((tmp_path / "uniform" / "config.json").read_text())
    )
    again = type(uniform).from_pretrained(tmp_path / "uniform").eval()
    assert torch.equal(again(**BATCHES[0])[0], uniform(**BATCHES[0])[0])


def test_the_class_of_a_model_loads_it(tmp_path: Path) -> None:
    """As trainers do that know nothing but the model."""
    model = in_place()
    model.save_pretrained(tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small").eval()
    assert torch.equal(again(**BATCHES[0])[0], model(**BATCHES[0])[0])


@pytest.mark.parametrize(
    ("architecture", "auto"),
    [("bert", "AutoModelForTokenClassification"), ("gpt2", CLASSIFIER), ("opt", CLASSIFIER)],
)
def test_pruned_base_models_take_any_head(architecture: str, auto: str, tmp_path: Path) -> None:
    base = in_place(architecture).base_model
    base.save_pretrained(tmp_path)
    model = getattr(transformers, auto).from_pretrained(tmp_path, trust_remote_code=True, num_labels=5)
    assert model.num_labels == 5
    assert type(model).__name__ == auto.replace("AutoModel", type(base).__name__.removesuffix("Model"))
    before = base.state_dict()  # a pooler that the head does not use is left out
    assert all(torch.equal(before[name], tensor) for name, tensor in model.base_model.state_dict().items())


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_pruned_models_from_a_configuration_are_initialised(architecture: str, tmp_path: Path) -> None:
    pruned = in_place(architecture)
    pruned.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    fresh = transformers.AutoModel.from_config(config, trust_remote_code=True)
    sizes = {name: tensor.shape for name, tensor in pruned.base_model.named_parameters()}
    for name, tensor in fresh.named_parameters():
        assert tensor.shape == sizes[name]
        if tensor.ndim == 2:
            assert 0 < tensor.std() < 2 * config.initializer_range
        else:
            assert bool(((tensor == 0) | (tensor == 1)).all())


@pytest.mark.parametrize(("architecture", "name"), [("bert", "weight"), ("gpt2", "weight"), ("bert", "bias")])
def test_layers_masked_by_torch_are_refused_before_anything_changes(architecture: str, name: str) -> None:
    model = build_model(architecture)
    masked = layer_views(model)[-1].feed_forward_output.module
    masks.l1_unstructured(masked, name, amount=0.3)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=rf"layer 2: .*torch.nn.utils.prune.remove\(module, '{name}'\)"):
        shrinkformer.prune_(model, BATCHES, FAST)
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    masks.remove(masked, name)
    shrinkformer.prune_(model, BATCHES, FAST)


@pytest.mark.parametrize("method", ["shrink", "stat", "kwon", "kprune"])
def test_in_place_replaces_blocks_and_nothing_else(method: str) -> None:
    model = build_model()
    around, hooked = {name: value for name, value in vars(model).items() if name != "config"}, []
    embeddings, classifier, config = model.bert.embeddings, model.classifier, model.config
    model.classifier.register_forward_hook(lambda *_: hooked.append(True))
    same = build_model()
    few = shrinkformer.ShrinkConfig(search_seconds=0)
    shrinkformer.prune_(model, BATCHES, shrinkformer.PruneConfig(mu=0.5, method=method, shrink=few))
    wanted = shrinkformer.prune_model(same, BATCHES, mu=0.5, method=method, config=few).model
    assert torch.equal(model(**BATCHES[0])[0], wanted(**BATCHES[0])[0])
    assert hooked
    assert (model.bert.embeddings, model.classifier, model.config) == (embeddings, classifier, config)
    assert all(vars(model)[name] is value for name, value in around.items() if isinstance(value, nn.Module | dict))
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    assert all(one is config for one in configs)


def test_a_plan_of_other_sizes_is_not_kept(tmp_path: Path) -> None:
    model = loaded(tmp_path / "first")
    remove_neurons(
        layer_views(model)[1],
        torch.arange(3),
        slice_consumer(layer_views(model)[1].feed_forward_output, torch.arange(3)),
    )
    describe_sizes(model)
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    model.save_pretrained(tmp_path / "second")
    assert "plan" not in json.loads((tmp_path / "second" / "config.json").read_text())["shrinkformer"]
    assert not (tmp_path / "second" / "shrinkformer_plan.json").exists()
    assert torch.equal(shrinkformer.load(tmp_path / "second").eval()(**BATCHES[0])[0], model.eval()(**BATCHES[0])[0])


def test_sentence_transformers_save(tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    base = tmp_path / "encoder"
    result = pruned("bert", "Model")
    shrinkformer.save(result.model, base, plan=result.plan, tokenizer=build_tokenizer(), sentence_encoder=True)
    encoder = st.SentenceTransformer(str(base), trust_remote_code=True, device="cpu")
    encoder.save(str(tmp_path / "encoder-again"))
    texts = ["the cat sees a bird", "a dog runs"]
    again = st.SentenceTransformer(str(tmp_path / "encoder-again"), trust_remote_code=True, device="cpu")
    assert (again.encode(texts) == encoder.encode(texts)).all()

    build_model(num_labels=1).save_pretrained(tmp_path / "dense")
    build_tokenizer().save_pretrained(tmp_path / "dense")
    judge = st.CrossEncoder(str(tmp_path / "dense"), device="cpu")
    shrinkformer.prune_(judge, BATCHES, FAST)
    judge.save_pretrained(str(tmp_path / "judge"))
    again = st.CrossEncoder(str(tmp_path / "judge"), trust_remote_code=True, device="cpu")
    pairs = [(texts[0], texts[1]), (texts[1], texts[1])]
    assert (again.predict(pairs) == judge.predict(pairs)).all()
    for name in ("encoder-again", "judge"):
        assert (tmp_path / name / "shrinkformer_plan.json").stat().st_size > 100
