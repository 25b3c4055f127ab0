"""Pruned sentence encoders in sentence-transformers, where this package is not installed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import shrinkformer
from shrinkformer.errors import CheckpointError
from shrinkformer.prune.sentence_encoder import copy_side_files
from tests.conftest import ENCODERS, WORDS, build_model, build_tokenizer, make_batches

needs_sentence_transformers = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed"
)

TEXTS = [" ".join(WORDS[start : start + length]) for start, length in ((0, 3), (4, 11), (9, 7), (20, 1), (2, 30))]
TEXTS.append(" ".join(WORDS * 3))  # longer than the model takes

ENCODE = """
import sys
sys.modules["shrinkformer"] = None
import json
import numpy
from sentence_transformers import SentenceTransformer
texts = json.load(open("texts.json"))
for folder in sys.argv[1:]:
    model = SentenceTransformer(folder, trust_remote_code=True)
    numpy.save(f"{folder}.npy", model.encode(texts))
    assert model.similarity_fn_name == "cosine"
"""


def save(folder: Path, family: str = "bert", **where: Path) -> Path:
    pruned = shrinkformer.prune_model(
        build_model(family, "Model"), make_batches([9] * 16, batch_size=8), mu=0.5, method="stat"
    )
    return shrinkformer.save(
        pruned.model, folder, plan=pruned.plan, tokenizer=build_tokenizer(), sentence_encoder=True, **where
    )


def our_embeddings(folder: Path) -> torch.Tensor:
    """As ``--task_name similarity`` reads a model: mean over the tokens, length 1."""
    model = shrinkformer.load(folder)
    longest = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    batch = build_tokenizer()(TEXTS, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    weights = inputs["attention_mask"][..., None]
    return normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


@needs_sentence_transformers
def test_equal_embeddings_without_this_package(tmp_path: Path) -> None:
    folders = [save(tmp_path / family, family) for family in ENCODERS]
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    names = [folder.name for folder in folders]
    command = [sys.executable, "-c", ENCODE, *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    for folder in folders:
        found = torch.from_numpy(np.load(tmp_path / f"{folder.name}.npy"))
        assert found.shape == (len(TEXTS), 32)
        assert torch.allclose(found, our_embeddings(folder), rtol=0, atol=1e-6), folder.name


def test_longest_input(tmp_path: Path) -> None:
    build_tokenizer()  # takes 64 tokens
    config = json.loads((save(tmp_path / "bert") / "sentence_bert_config.json").read_text())
    assert config == {"max_seq_length": 64, "do_lower_case": False}
    model = build_model("roberta", "Model", max_position_embeddings=40)
    pruned = shrinkformer.prune_model(model, make_batches([9] * 16, batch_size=8), mu=0.5, method="stat")
    folder = shrinkformer.save(pruned.model, tmp_path / "roberta", sentence_encoder=True)
    found = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    assert found == 40 - model.config.pad_token_id - 1


def test_what_the_dense_model_says_is_kept(tmp_path: Path) -> None:
    source = tmp_path / "source"
    files = {
        "modules.json": json.dumps([{"path": path, "type": "any"} for path in ("", "1_Pooling", "2_Dense")]),
        "1_Pooling/config.json": '{"pooling_mode": "cls"}',
        "2_Dense/config.json": "{}",
        "2_Dense/model.safetensors": "weights",
        "2_Dense/pytorch_model.bin": "pickles stay behind",
    }
    for name, text in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    folder = save(tmp_path / "small", extras_from=source)
    for name in list(files)[:4]:
        assert (folder / name).read_text() == files[name]
    assert not (folder / "2_Dense/pytorch_model.bin").exists()
    assert not (folder / "sentence_bert_config.json").exists()  # nothing is added to what it says
    assert not copy_side_files(tmp_path / "nowhere", tmp_path / "small")
    (source / "modules.json").write_text(json.dumps([{"path": "../outside", "type": "any"}]))
    with pytest.raises(CheckpointError, match="outside"):
        copy_side_files(source, tmp_path / "small")


def test_other_models_get_nothing(tmp_path: Path) -> None:
    pruned = shrinkformer.prune_model(build_model(), make_batches([9] * 16, batch_size=8), mu=0.5, method="stat")
    folder = shrinkformer.save(pruned.model, tmp_path / "classifier", plan=pruned.plan)
    assert not (folder / "modules.json").exists()
