"""The script that trained the bundled language model, on a corpus of a few sentences."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import WORDS, load_script


@pytest.fixture(scope="module")
def script() -> Any:
    module = load_script("prerequisites/train_opt.py")
    yield module
    del sys.modules[module.__name__]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=60)) for _ in range(40)]
    (tmp_path / "lm_corpus").mkdir()
    for name in ("reviews", "novels"):
        datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "lm_corpus" / f"{name}.parquet")
    for folder in ("ptb", "wikitext2", "c4"):
        (tmp_path / folder).mkdir()
        for split in ("train", "validation", "test"):
            (tmp_path / folder / f"{split}.txt").write_text("\n".join(texts))
    return tmp_path


def arguments(data_dir: Path, *more: str) -> list[str]:
    sizes = {"vocabulary": 300, "layers": 1, "hidden": 16, "heads": 2, "length": 16, "sequences": 4, "minutes": 0.001}
    flags = {"data_dir": data_dir, "output": data_dir / "model", "work_dir": data_dir / "work", **sizes}
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))] + list(more)


def test_it_trains_exports_and_describes_a_model(
    script: ModuleType, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)  # a compiler's minute teaches nothing here
    with torch.random.fork_rng(devices=[]):
        script.main(arguments(data_dir))
    model = AutoModelForCausalLM.from_pretrained(data_dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "model")
    assert (model.config.model_type, model.dtype) == ("opt", torch.float16)
    assert tokenizer.decode(tokenizer("the small cat <unk> sees")["input_ids"]) == "the small cat <unk> sees"
    record = json.loads((data_dir / "model" / "training_record.json").read_text())
    assert record["training_tokens"] == record["steps"] * 4 * 16 > 0
    card = (data_dir / "model" / "README.md").read_text()
    assert all(f"| {name} |" in card for name in ("wikitext2", "ptb-new", "c4-new"))

    before = (data_dir / "model" / "model.safetensors").read_bytes()
    with torch.random.fork_rng(devices=[]):
        script.main(arguments(data_dir, "--resume"))  # the time is over: it only exports again
    assert (data_dir / "model" / "model.safetensors").read_bytes() == before


def test_documents_are_separated_and_every_window_is_full(script: ModuleType, data_dir: Path) -> None:
    options = script.parse(arguments(data_dir))
    script.prepare(options)
    counts = json.loads((options.work_dir / "tokens.json").read_text())
    assert set(counts) == {"reviews", "novels", "ptb"}
    reviews = np.fromfile(options.work_dir / "reviews.bin", dtype=np.uint16)
    assert (reviews == 0).sum() == 40  # one end token for each document
    stream = iter(script.Windows(options, rank=0))
    assert {len(next(stream)) for _ in range(50)} == {16}
