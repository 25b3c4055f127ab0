"""Models inside what others put around them: pruned inside, in place, or one line says what to pass."""

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import nn
from transformers import AutoModel, TextClassificationPipeline

import shrinkformer
from shrinkformer.architectures.wrapped import unwrap
from shrinkformer.errors import InputError
from tests.conftest import WORDS, build_model, build_tokenizer

TEXTS = [" ".join(WORDS[(5 * index + k) % len(WORDS)] for k in range(2 + index % 7)) for index in range(32)]
STAT = shrinkformer.PruneConfig(method="stat")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    for head in ("Model", "ForSequenceClassification"):
        folder = tmp_path_factory.mktemp(head)
        build_model("bert", head).save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        found[head] = str(folder)
    return found


def parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_sentence_transformer(folders: dict[str, str]) -> None:
    """It brings its tokenizer and its pooling, and encodes with the smaller model afterwards."""
    encoder = SentenceTransformer(modules=[Transformer(folders["Model"]), Pooling(32, pooling_mode="cls")])
    before, dense = parameters(encoder), encoder.encode(TEXTS)
    plan = shrinkformer.prune_(
        encoder, TEXTS, shrinkformer.PruneConfig(mu=0.7, shrink=shrinkformer.ShrinkConfig(search_seconds=0))
    )
    assert plan.ratio <= 0.7
    assert parameters(encoder) < before
    after = encoder.encode(TEXTS)
    cosines = nn.functional.cosine_similarity(torch.tensor(dense), torch.tensor(after))
    assert float(cosines.mean()) > 0.9
    shrinkformer.quantize_(encoder, TEXTS, shrinkformer.QuantizeConfig(bits=4, group_size=8))
    assert not (encoder.encode(TEXTS) == after).all()


def test_cross_encoder(folders: dict[str, str]) -> None:
    encoder = CrossEncoder(folders["ForSequenceClassification"])
    before = parameters(encoder)
    pairs = list(zip(TEXTS, reversed(TEXTS), strict=True))
    dense = encoder.predict(pairs)
    assert shrinkformer.prune_(encoder, pairs, STAT).ratio <= 0.5
    assert parameters(encoder) < before
    assert not (encoder.predict(pairs) == dense).all()


def test_pipeline() -> None:
    pipeline = TextClassificationPipeline(model=build_model(), tokenizer=build_tokenizer())
    before = parameters(pipeline.model)
    shrinkformer.prune_(pipeline, TEXTS, STAT)
    assert parameters(pipeline.model) < before
    assert pipeline("the cat sees a bird")[0]["label"].startswith("LABEL_")


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: torch.compile(nn.DataParallel(m))])
def test_what_torch_puts_around_a_model(wrap: Any, batches: list[dict[str, Any]]) -> None:
    model = build_model()
    wrapped, before = wrap(model), parameters(model)
    plan = shrinkformer.prune_(wrapped, batches, STAT)
    assert parameters(wrapped) == parameters(model) < before
    assert plan.heads == shrinkformer.prune_model(wrap(build_model()), batches, mu=0.5, method="stat").plan.heads


def test_compiled_in_place(batches: list[dict[str, Any]]) -> None:
    """What was compiled before it was pruned computes with the smaller blocks afterwards."""
    model = build_model()
    compiled: Any = torch.compile(model, backend="eager")
    compiled(**batches[0])
    shrinkformer.prune_(compiled, batches, STAT)
    assert torch.allclose(compiled(**batches[0]).logits, model(**batches[0]).logits, atol=1e-6)


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = build_model("bert", "Model")
        self.head = nn.Linear(32, 3)


def with_adapters() -> Any:
    return peft.get_peft_model(build_model(), peft.LoraConfig(target_modules=["query", "value"]))


REFUSED: dict[str, tuple[Any, str]] = {
    "adapters": (
        with_adapters,
        "a PeftModel, whose adapters are not merged into its weights; pass model.",
    ),
    "its model": (lambda: with_adapters().base_model.model, "an adapter that is not merged into its weight; merge"),
    "a module of one's own": (
        Mine,
        "a Mine, which is none of transformers; pass the one inside: encoder.",
    ),
    "a linear layer": (lambda: nn.Linear(2, 2), "the model is a Linear, which is none of transformers; pass what"),
    "a name": (lambda: "bert-base-uncased", "AutoModel.from_pretrained('bert-base-uncased')"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str, batches: list[dict[str, Any]]) -> None:
    make, message = REFUSED[case]
    for door in (shrinkformer.prune_, shrinkformer.calibrate, shrinkformer.quantize_):
        with pytest.raises(InputError, match=re.escape(message)):
            door(make(), batches)


def test_merged_adapters(batches: list[dict[str, Any]]) -> None:
    merged = with_adapters().merge_and_unload()
    assert unwrap(merged).model is merged
    assert shrinkformer.prune_(merged, batches, STAT).ratio <= 0.5


def test_evaluate_unwraps(folders: dict[str, str], tmp_path: Path) -> None:
    from shrinkformer.api import evaluate

    encoder = SentenceTransformer(modules=[Transformer(folders["Model"]), Pooling(32)])
    assert "spearmanr" in evaluate(encoder, encoder.tokenizer, "similarity", bundled_data=True)


@pytest.mark.parametrize("mode", ["cls", "max"])
def test_save_a_sentence_transformer(folders: dict[str, str], tmp_path: Path, mode: str) -> None:
    """The modules in memory are saved; those of the folder that its model came from are not taken for them."""
    source = tmp_path / "source"
    SentenceTransformer(modules=[Transformer(folders["Model"]), Pooling(32, "mean"), Normalize()]).save(str(source))
    encoder = SentenceTransformer(modules=[Transformer(str(source), max_seq_length=6), Pooling(32, mode)], device="cpu")
    plan = shrinkformer.prune_(encoder, TEXTS, STAT)
    inner, small = encoder[0].auto_model, tmp_path / "small"
    for settings in ({}, {"sentence_encoder": True}, {"extras_from": str(source)}):
        with pytest.raises(InputError, match=rf"{mode} pooling.*mean pooling, normalize.*save\(encoder"):
            shrinkformer.save(inner, small, plan=plan, tokenizer=encoder.tokenizer, **settings)
    assert not small.exists()
    (source / "LICENSE").write_text("free")
    shrinkformer.save(encoder, small, plan=plan, card="# ours", extras_from=str(source))
    again = SentenceTransformer(str(small), trust_remote_code=True, device="cpu")
    assert (again.encode(TEXTS) == encoder.encode(TEXTS)).all()
    assert again.max_seq_length == 6
    assert len(again) == 2
    assert [(small / name).read_text() for name in ("LICENSE", "README.md")] == ["free", "# ours"]
    assert (small / "shrinkformer_plan.json").read_text() == plan.to_json()
    assert parameters(shrinkformer.load(small)) == parameters(inner)
    shrinkformer.save(again, small)  # of ours, so it is replaced


def test_save_the_model_of_an_encoder_that_is_its_folder(folders: dict[str, str], tmp_path: Path) -> None:
    source, small = tmp_path / "source", tmp_path / "small"
    SentenceTransformer(modules=[Transformer(folders["Model"]), Pooling(32, "cls")]).save(str(source))
    encoder = SentenceTransformer(str(source), device="cpu")
    plan = shrinkformer.prune_(encoder, TEXTS, STAT)
    shrinkformer.save(encoder[0].auto_model, small, plan=plan, tokenizer=encoder.tokenizer)
    again = SentenceTransformer(str(small), trust_remote_code=True, device="cpu")
    assert (again.encode(TEXTS) == encoder.encode(TEXTS)).all()


def test_save_a_quantized_sentence_transformer(folders: dict[str, str], tmp_path: Path) -> None:
    from shrinkformer.quantize.checkpoint import save

    encoder = SentenceTransformer(modules=[Transformer(folders["Model"]), Pooling(32, "cls")], device="cpu")
    found = shrinkformer.quantize_(encoder, TEXTS, shrinkformer.QuantizeConfig(bits=4, group_size=8))
    save(encoder, found.weights, tmp_path / "small", format="float", dtype=torch.float32)
    again = SentenceTransformer(str(tmp_path / "small"), device="cpu")
    assert again[1].pooling_mode == "cls"
    assert torch.tensor(again.encode(TEXTS)).allclose(torch.tensor(encoder.encode(TEXTS)), atol=1e-5)


def test_save_other_wrappers(folders: dict[str, str], tmp_path: Path) -> None:
    encoder = CrossEncoder(folders["ForSequenceClassification"], device="cpu")
    pairs = list(zip(TEXTS, reversed(TEXTS), strict=True))
    plan = shrinkformer.prune_(encoder, pairs, STAT)
    shrinkformer.save(encoder, tmp_path / "cross", plan=plan)
    again = CrossEncoder(str(tmp_path / "cross"), trust_remote_code=True, device="cpu")
    assert (again.predict(pairs) == encoder.predict(pairs)).all()
    pipeline = TextClassificationPipeline(model=again.model, tokenizer=build_tokenizer(), device="cpu")
    for name, wrapper in (("pipeline", pipeline), ("parallel", nn.DataParallel(again.model))):
        shrinkformer.save(wrapper, tmp_path / name, plan=plan)
        assert parameters(shrinkformer.load(tmp_path / name)) == parameters(again.model)
    assert (tmp_path / "pipeline/tokenizer.json").is_file()
    adapted = peft.get_peft_model(
        AutoModel.from_pretrained(folders["Model"]), peft.LoraConfig(target_modules=["query"])
    )
    with pytest.raises(InputError, match="merge_and_unload"):
        shrinkformer.save(adapted, tmp_path / "adapted")
    with pytest.raises(InputError, match="folder is a SentenceTransformer; save it first"):
        shrinkformer.push_to_hub(SentenceTransformer(folders["Model"]), "user/smaller")
