"""Embeddings as sentence-transformers makes them: of any pooling, from files and memory, on either padding side."""

import importlib.util
import json
import os
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import shrinkformer
from shrinkformer.api import evaluate
from shrinkformer.commands.prune_bert import main
from shrinkformer.dataset.encoding import encode
from shrinkformer.dataset.tasks import get_task
from shrinkformer.errors import CheckpointError, ShrinkformerWarning
from shrinkformer.evaluate.evaluation import evaluate_model
from shrinkformer.prune.objective import Objective, objective_of
from shrinkformer.prune.pooling import MEAN, POOLINGS, SentenceHead, head_in_memory, read_head
from shrinkformer.prune.pruner import prune_model
from shrinkformer.prune.sentence_encoder import copy_side_files
from shrinkformer.prune.shrink_config import ShrinkConfig
from shrinkformer.quantize.checkpoint import save as save_quantized
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.quantizer import quantize_
from tests.conftest import WORDS, build_model, build_tokenizer, make_batches

TEXTS = [" ".join(WORDS[start : start + length]) for start, length in ((0, 3), (4, 11), (9, 7), (20, 1), (2, 30))]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed"
)


def encoder(folder: Path, pooling: Any, *behind: Any, family: str = "bert", **settings: Any) -> Any:
    """A tiny ``SentenceTransformer``, saved in a folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    build_model(family, "Model", initializer_range=0.3).save_pretrained(folder / "plain")
    build_tokenizer().save_pretrained(folder / "plain")
    modules = [Transformer(str(folder / "plain")), Pooling(32, pooling), *behind]
    made = SentenceTransformer(modules=modules, device="cpu", **settings)
    made.save(str(folder / "encoder"))
    return made.eval()


def embedded(head: SentenceHead, model: Any, side: str = "right") -> np.ndarray:
    """By our head, all texts in one batch."""
    batch = build_tokenizer(pad_left=side == "left")(TEXTS, padding=True, return_tensors="pt")
    mask = batch["attention_mask"]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": mask}
    with torch.no_grad():
        states = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).last_hidden_state
        return head(states, mask.bool()).numpy()


@pytest.fixture(scope="module")
def dense() -> tuple[Any, Any]:
    """Modules with random weights; the second has a residual path of its own."""
    from sentence_transformers.sentence_transformer.modules import Dense

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Dense(32, 12), Dense(64, 8, bias=False, activation_function=torch.nn.GELU(), use_residual=True)


@pytest.mark.parametrize("pooling", [*POOLINGS, ("cls", "mean"), ("weightedmean", "max")])
def test_every_pooling(pooling: Any, tmp_path: Path) -> None:
    theirs = encoder(tmp_path, pooling)
    wanted = theirs.encode(TEXTS, batch_size=2)
    model = theirs[0].auto_model
    for head in (read_head(tmp_path / "encoder"), head_in_memory(theirs), objective_of(theirs).sentence):
        assert head is not None
        for side in ("right", "left"):
            np.testing.assert_allclose(embedded(head, model, side), wanted, rtol=1e-4, atol=1e-5)


def test_what_stands_behind_the_pooling(dense: tuple[Any, Any], tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import LayerNorm, Normalize

    for place, (pooling, *behind) in {
        "plain": ("mean", dense[0], Normalize()),
        "residual": (("mean", "max"), dense[1]),
        "norm": ("cls", LayerNorm(32), dense[0]),
    }.items():
        theirs = encoder(tmp_path / place, pooling, *behind)
        head = read_head(tmp_path / place / "encoder")
        assert head is not None
        np.testing.assert_allclose(embedded(head, theirs[0].auto_model), theirs.encode(TEXTS), rtol=1e-4, atol=1e-5)
        theirs.truncate_dim = 5
        cut = embedded(head_in_memory(theirs), theirs[0].auto_model)
        np.testing.assert_allclose(cut, theirs.encode(TEXTS), rtol=1e-4, atol=1e-5)


def test_older_files(tmp_path: Path) -> None:
    """Switches instead of names, no folder for Normalize, and weights as a pickle, which new folders get as tensors."""
    files = {
        "modules.json": [
            {"idx": index, "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in enumerate(
                [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Normalize", "Normalize")]
            )
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": 4, "pooling_mode_cls_token": True,
                                  "pooling_mode_mean_tokens": True},
        "2_Dense/config.json": {"in_features": 8, "out_features": 2, "bias": False,
                                "activation_function": "torch.nn.modules.linear.Identity"},
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    weight = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    torch.save({"linear.weight": weight}, tmp_path / "2_Dense/pytorch_model.bin")
    states, mask = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1)), torch.ones(3, 5, dtype=torch.bool)
    wanted = torch.nn.functional.normalize(torch.cat([states[:, 0], states.mean(1)], 1) @ weight.T, dim=1)
    assert copy_side_files(tmp_path, tmp_path / "new")
    for folder in (tmp_path, tmp_path / "new"):
        head = read_head(folder)
        assert head is not None
        torch.testing.assert_close(head(states, mask), wanted)
    assert sorted(file.name for file in (tmp_path / "new/2_Dense").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        (["Transformer", "Pooling", "WordWeights"], {}, "WordWeights is nothing that this package knows"),
        (["Transformer", "Normalize", "Pooling"], {}, "Normalize is nothing that this package knows in this place"),
        (["Transformer"], {}, "names no Pooling"),
        (["Transformer", "Pooling"], {"pooling_mode": "median"}, "pooling_mode 'median' is nothing"),
        (["Transformer", "Pooling", "Dense"], {}, r"Dense cannot be read \(KeyError: 'in_features'\)"),
    ],
)
def test_what_is_not_known_is_named(modules: list[str], pooling: Any, message: str, tmp_path: Path) -> None:
    paths = ["", *(f"{index}_it" for index in range(1, len(modules)))]
    listed = [{"path": path, "type": f"a.{kind}"} for path, kind in zip(paths, modules, strict=True)]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    (tmp_path / "1_it").mkdir()
    (tmp_path / "1_it/config.json").write_text(json.dumps(pooling))
    with pytest.raises(CheckpointError, match=message):
        read_head(tmp_path)


def test_what_configurations_say_of_sizes_allocates_nothing(tmp_path: Path) -> None:
    listed = [{"path": path, "type": f"a.{path or 'Transformer'}"} for path in ("", "Pooling", "Dense")]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    (tmp_path / "Dense").mkdir()
    (tmp_path / "Dense/config.json").write_text(json.dumps({"in_features": 10**7, "out_features": 10**7}))
    with pytest.raises(CheckpointError, match=r"Dense cannot be read"):
        read_head(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps(listed[:2]))
    (tmp_path / "config_sentence_transformers.json").write_text('{"similarity_fn_name": "cosine distance"}')
    with pytest.raises(CheckpointError, match=r"similarity_fn_name is 'cosine distance', none of cosine, dot"):
        read_head(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    assert read_head(tmp_path) is None


@pytest.fixture(scope="module")
def pairs() -> datasets.Dataset:
    generator = np.random.default_rng(0)
    rows = [[" ".join(generator.choice(WORDS, size=generator.integers(1, 12))) for _ in range(24)] for _ in range(2)]
    return datasets.Dataset.from_dict(
        {"sentence1": rows[0], "sentence2": rows[1], "label": generator.uniform(0, 5, 24).tolist()}
    )


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity_is_that_of_the_encoder(similarity: str, pairs: datasets.Dataset, tmp_path: Path) -> None:
    theirs = encoder(tmp_path, "cls", similarity_fn_name=similarity)
    columns = [theirs.encode(list(pairs[name])) for name in ("sentence1", "sentence2")]
    alike = theirs.similarity_pairwise(*columns).numpy()
    task, tokenizer = get_task("similarity"), build_tokenizer()
    model = type(theirs[0].auto_model).from_pretrained(tmp_path / "encoder")  # it remembers where it came from
    data = {"validation": encode(pairs, task, tokenizer)}
    for size, given in ((3, None), (64, objective_of(theirs))):
        found = evaluate_model(model, tokenizer, task, data, batch_size=size, keep_logits=True, objective=given)
        assert found.logits is not None
        np.testing.assert_allclose(found.logits["validation"][:, 0], alike, rtol=1e-4, atol=1e-4)
    assert found.metrics["spearmanr"] == pytest.approx(spearmanr(alike, pairs["label"]).statistic, abs=1e-6)


def test_the_search_looks_at_the_encoders_own_embeddings(tmp_path: Path) -> None:
    theirs = encoder(tmp_path, "cls")
    batches = make_batches([3 + index % 18 for index in range(48)], batch_size=16)
    model = theirs[0].auto_model
    config = ShrinkConfig(search_seconds=0.0)
    plans = [
        prune_model(model, batches, mu=0.5, objective=objective, config=config).plan
        for objective in (Objective(sentence=MEAN), objective_of(theirs))
    ]
    assert plans[0].divergences != plans[1].divergences


def test_embeddings_of_any_length_are_compared_in_units_of_their_spread(tmp_path: Path) -> None:
    theirs = encoder(tmp_path, "mean", similarity_fn_name="dot")
    batches = make_batches([3 + index % 18 for index in range(48)], batch_size=16)
    model = theirs[0].auto_model
    objective = objective_of(theirs).scaled(model, batches)
    with torch.no_grad():
        found = torch.cat([objective.predictions(model(**b), b["attention_mask"].bool()).parts[0] for b in batches])
    assert 0.4 < float(found.var(0, correction=0).sum()) < 2.5
    assert objective_of(encoder(tmp_path / "cosine", "mean")).scaled(model, batches).scale == ()


def test_a_pruned_folder_keeps_the_pooling(pairs: datasets.Dataset, tmp_path: Path, capsys: Any) -> None:
    """By command: the report is about the encoder's own embeddings, and so is the folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    theirs = encoder(tmp_path, "cls", Normalize())
    for split in ("train", "validation"):
        target = tmp_path / "data/glue/stsb" / f"{split}.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        pairs.to_parquet(target)
    output = tmp_path / "output"
    where = ["--data_dir", str(tmp_path / "data"), "--output_dir", str(output), "--save_dir", str(tmp_path / "small")]
    what = ["--task_name", "similarity", "--method", "stat", "--mu", "0.6", "--sample_batch_size", "24"]
    assert main(["--model_name", str(tmp_path / "encoder"), *what, *where]) == 0
    said = "".join(capsys.readouterr())
    assert "sentence embeddings: cls pooling, normalize, compared by cosine" in said
    (report,) = output.rglob("similarity.jsonl")
    found = json.loads(report.read_text())
    small = SentenceTransformer(str(tmp_path / "small"), trust_remote_code=True, device="cpu")
    for side, model in (("dense", theirs), ("pruned", small)):
        columns = [model.encode(list(pairs[name])) for name in ("sentence1", "sentence2")]
        own = spearmanr((columns[0] * columns[1]).sum(1), pairs["label"]).statistic
        assert found[side]["metrics"]["spearmanr"] == pytest.approx(own, abs=2e-3)
    assert small[1].pooling_mode == "cls"
    os.remove(tmp_path / "encoder/modules.json")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert objective_of(type(theirs[0].auto_model).from_pretrained(tmp_path / "encoder")).sentence is MEAN
    assert any(issubclass(one.category, ShrinkformerWarning) for one in caught)


def test_a_model_inside_the_folder(tmp_path: Path, capsys: Any) -> None:
    """As sentence-transformers before 2.0 wrote it."""
    build_model(head="Model").save_pretrained(tmp_path / "old/0_Transformer")
    listed = [{"idx": 0, "path": "0_Transformer", "type": "a.Transformer"}]
    (tmp_path / "old/modules.json").write_text(json.dumps(listed))
    assert main(["--model_name", str(tmp_path / "old"), "--task_name", "similarity", "--dry_run"]) == 2
    assert "its model lies in 0_Transformer" in capsys.readouterr().err


@pytest.mark.parametrize("how", [{"do_lower_case": True}, {"max_seq_length": 7}, {"prompt": "the cat or "}])
def test_texts_are_read_as_the_encoder_reads_them(how: dict[str, Any], pairs: datasets.Dataset, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    encoder(tmp_path, "mean")
    folder = tmp_path / "encoder"
    (folder / "sentence_bert_config.json").write_text(json.dumps({name: how[name] for name in how if name != "prompt"}))
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    settings |= {
        "prompts": {"query": how.get("prompt", "unused")},
        "default_prompt_name": "query" if "prompt" in how else None,
    }
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    target = tmp_path / "data/glue/stsb/validation.parquet"
    target.parent.mkdir(parents=True)
    loud = pairs.map(lambda row: {name: row[name].upper() for name in ("sentence1", "sentence2")})
    loud.to_parquet(target)
    theirs = SentenceTransformer(str(folder), device="cpu")
    columns = [theirs.encode(list(loud[name])) for name in ("sentence1", "sentence2")]
    own = spearmanr(theirs.similarity_pairwise(*columns).numpy(), pairs["label"]).statistic
    model = type(theirs[0].auto_model).from_pretrained(folder)
    for given in (model, theirs):
        found = evaluate(given, build_tokenizer(), "similarity", data_dir=tmp_path / "data")
        assert found["spearmanr"] == pytest.approx(own, abs=1e-6)
    other = read_head(folder)
    assert other is not None
    assert (other.prompt, other.lower, other.longest) == (
        how.get("prompt", ""),
        how.get("do_lower_case", False),
        how.get("max_seq_length"),
    )


def test_a_prompt_that_pooling_leaves_out_is_refused(tmp_path: Path) -> None:
    theirs = encoder(tmp_path, "mean", prompts={"query": "find: "}, default_prompt_name="query")
    assert head_in_memory(theirs).prompt == "find: "
    theirs[1].include_prompt = False
    with pytest.raises(CheckpointError, match=r"names 'find: ' as default prompt, whose tokens Pooling leaves out"):
        head_in_memory(theirs)


def test_saving_from_memory_keeps_the_pooling_too(tmp_path: Path) -> None:
    """A model remembers the folder that it was read from, through pruning and saving, once and again."""
    theirs = encoder(tmp_path, "lasttoken")
    model = type(theirs[0].auto_model).from_pretrained(tmp_path / "encoder")
    batches = make_batches([3 + index % 18 for index in range(16)], batch_size=16)
    found = prune_model(model, batches, mu=0.5, method="stat")
    for place, flag in (("asked", True), ("not asked", False)):
        shrinkformer.save(found.model, tmp_path / place, tokenizer=build_tokenizer(), sentence_encoder=flag)
        again = shrinkformer.load(tmp_path / place)
        head = objective_of(again).sentence
        assert head.poolings == ("lasttoken",)
        np.testing.assert_array_equal(embedded(head, again), embedded(head, found.model))
    plain = prune_model(build_model(head="Model"), batches, mu=0.5, method="stat").model
    shrinkformer.save(plain, tmp_path / "plain model")
    assert not (tmp_path / "plain model/modules.json").exists()


def test_a_quantized_folder_keeps_the_pooling(tmp_path: Path) -> None:
    theirs = encoder(tmp_path, ("cls", "max"))
    model = type(theirs[0].auto_model).from_pretrained(tmp_path / "encoder")
    batches = make_batches([3 + index % 18 for index in range(16)], batch_size=16)
    found = quantize_(model, batches, QuantizeConfig(bits=4, group_size=16, quantizer="rtn"))
    for kind in ("compressed-tensors", "float"):
        save_quantized(model, found.weights, tmp_path / kind, format=kind, tokenizer=build_tokenizer())
        assert objective_of(shrinkformer.load(tmp_path / kind)).sentence.poolings == ("cls", "max")
