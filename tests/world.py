"""A small world in which the commands of README and docs run as they stand: tiny models and data under their names.

The current folder is ``<world>/work``; ``../shared`` and ``models``, ``data``, ``path/to`` lie where the documents say.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerFast

from tests import dataset_fixtures as made
from tests.conftest import ROOT, WORDS, build_model, build_tokenizer

TRAIN, VALIDATION = 520, 40

_SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}  # groups of 128 inputs divide them

_HEADS = {"squad": "ForQuestionAnswering", "similarity": "Model"}


def code_blocks(path: Path, language: str) -> list[str]:
    """Fenced blocks of a language, as they stand."""
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```", path.read_text(encoding="utf-8"), re.S | re.M)
    return list(found)


def commands(path: Path) -> Iterator[list[str]]:
    """Command lines of a document, without comments, continued lines joined."""
    for block in code_blocks(path, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def build(world: Path) -> Path:
    """Make the world.

    Returns:
        The folder to run commands in.
    """
    work = world / "work"
    write_data(work / "data")
    (world / "shared").mkdir()
    (world / "shared" / "data").symlink_to(work / "data")
    for task in ("qqp", "sst2", "squad", "similarity"):
        encoder(work / "models" / "bert-base-uncased" / task, task)
        encoder(work / "path" / "to" / task, task)
    for task in ("similarity", "squad", "qqp"):
        encoder(work / "models" / "all-MiniLM-L6-v2" / task, task)
    for task in ("qqp", "sst2"):
        encoder(world / "shared" / "models" / f"minilm-{task}", task)
    for name in ("babyllama-tok105", "stories260K"):
        decoder(world / "shared" / "models" / name / "hf_converted", "llama")
    decoder(work / "models" / "opt-mini", "opt")
    decoder(work / "models" / "opt-125M", "opt")
    decoder(work / "path" / "to" / "llama", "llama")
    for script in ("prune_bert", "prune_opt", "quantize_bert", "quantize_opt", "opt_eval"):
        (work / f"{script}.py").symlink_to(ROOT / f"{script}.py")
    (work / "prerequisites").symlink_to(ROOT / "prerequisites")
    (work / "texts.txt").write_text(text(1_000, 7))
    return work


def encoder(folder: Path, task: str) -> None:
    """A tiny BERT with the head of a task, and its tokenizer."""
    head = _HEADS.get(task, "ForSequenceClassification")
    build_model("bert", head, **_SIZES, max_position_embeddings=512).save_pretrained(folder)
    _tokenizer(512).save_pretrained(folder)


def decoder(folder: Path, family: str) -> None:
    """A tiny language model and its tokenizer."""
    own = {
        "llama": {"hidden_size": 256},  # heads of 64, so that groups of 64 divide every layer
        "opt": {"word_embed_proj_dim": _SIZES["hidden_size"]},
    }
    build_model(family, **{**_SIZES, **own[family]}, max_position_embeddings=160).save_pretrained(folder)
    _tokenizer(128).save_pretrained(folder)


def _tokenizer(longest: int) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = longest
    return tokenizer


def write_data(folder: Path) -> None:
    """Tasks and corpora in the layout of a real data folder."""
    for name, make in (("train", TRAIN), ("validation", VALIDATION)):
        pairs = made.pairs(make)
        binary = [row % 2 for row in range(make)]
        _write(pairs, folder / "glue" / "stsb" / f"{name}.parquet")
        questions = pairs.rename_columns({"sentence1": "question1", "sentence2": "question2"}).remove_columns("label")
        _write(questions.add_column("label", binary), folder / "glue" / "qqp" / f"{name}.parquet")
        _write(made.sentiment(make), folder / "glue" / "sst2" / f"{name}.parquet")
        short = made.questions(5 * make).filter(lambda row: row["answers"]["text"] and len(row["context"]) < 300)
        _write(short, folder / "squad" / f"{name}.parquet")
    for seed, name in enumerate(("wikitext2/train", "wikitext2/validation", "wikitext2/test", "ptb/train", "ptb/test")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(text(3_000, seed))
    for seed, split in enumerate(("train", "validation")):
        rows = [text(150, 100 * seed + number) for number in range(160)]
        _write(datasets.Dataset.from_dict({"text": rows}), folder / "c4" / f"{split}.parquet")


def text(words: int, seed: int) -> str:
    """Lines of 3 to 12 words."""
    rng = np.random.default_rng(seed)
    return "\n".join(" ".join(rng.choice(WORDS, size=rng.integers(3, 13))) for _ in range(words // 8)) + "\n"


def hub(data: Path) -> Any:
    """``datasets.load_dataset`` for what the hub would have, from the world's own data."""

    def load_dataset(name: str, config: str | None = None, *, split: str, **files: Any) -> datasets.Dataset:
        found = next(iter(files.get("data_files", {}).values()), "") if files else ""
        folder = {"nyu-mll/glue": f"glue/{config}", "rajpurkar/squad": "squad"}.get(name)
        if folder is None:
            corpus = next(key for key in ("wikitext", "ptb", "c4") if key in f"{name} {config} {found}".lower())
            folder = {"wikitext": "wikitext2"}.get(corpus, corpus)
        path = next((data / folder).glob(f"{split}.*"))
        if path.suffix == ".parquet":
            return datasets.Dataset.from_parquet(str(path))
        lines = path.read_text().splitlines()
        return datasets.Dataset.from_dict({"text": lines, "sentence": lines})

    return load_dataset


def _write(examples: datasets.Dataset, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    examples.to_parquet(path)
