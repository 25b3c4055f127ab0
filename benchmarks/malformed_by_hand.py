"""Hostile inputs written by hand, each with the reason why nobody should accept it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.malformed_runner import Case
from benchmarks.malformed_tools import DEEP, Row, change_json, link, moved, write
from benchmarks.malformed_weights_by_hand import weight_rows

_NESTED = '{"a":' * 400 + "1" + "}" * 400


def _parquet(folder: Path, rows: Any, name: str = "glue/sst2/train") -> None:
    import pyarrow
    import pyarrow.parquet

    (folder / "data" / f"{name}.jsonl").unlink()
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "data" / f"{name}.parquet")


def _cut_parquet(folder: Path) -> None:
    _parquet(folder, {"sentence": ["a cat"] * 9, "label": [0] * 9})
    file = folder / "data" / "glue/sst2/train.parquet"
    content = file.read_bytes()
    file.write_bytes(content[:60] + bytes(40) + content[100:])


def _links() -> Iterator[Row]:
    """Links to elsewhere."""
    kind = "by hand: links"
    yield kind, "weights that are elsewhere", "bert", "prune_bert", moved("model.safetensors"), "reads other files"
    yield (
        kind,
        "a shard that is elsewhere",
        "sharded",
        "opt_eval",
        moved("model-00001-of-*.safetensors"),
        "reads other files",
    )
    yield (
        kind,
        "config.json is /etc/passwd",
        "bert",
        "inspect",
        link("model/config.json", "/etc/passwd"),
        "an error could show what is in it",
    )
    yield kind, "a tokenizer that is elsewhere", "opt", "prune_opt", moved("tokenizer.json"), "copies other files"
    yield kind, "pooling that is elsewhere", "encoder", "export", moved("1_Pooling/config.json"), "copies other files"
    yield kind, "a link to itself", "bert", "prune_bert", link("model/tokenizer.json", "tokenizer.json"), "no end"


def _json_files() -> Iterator[Row]:
    """JSON files."""
    kind = "by hand: JSON"
    yield kind, "100,000 brackets", "bert", "prune_bert", write("model/config.json", DEEP), "would exhaust the stack"
    yield kind, "400 levels", "opt", "opt_eval", write("model/config.json", _NESTED), "copies would exhaust the stack"
    yield (
        kind,
        "20 MB of configuration",
        "llama",
        "inspect",
        change_json("config.json", x="a" * 20_000_000),
        "too large",
    )
    yield (
        kind,
        "a number of 100,000 digits",
        "bert",
        "inspect",
        write("model/config.json", '{"model_type": "bert", "vocab_size": ' + "9" * 100_000 + "}"),
        "quadratic time",
    )
    yield kind, "UTF-16", "bert", "prune_bert", write("model/config.json", '{"a": 1}'.encode("utf-16")), "not UTF-8"
    yield (
        kind,
        "rules for a terminal",
        "bert",
        "prune_bert",
        change_json("config.json", model_type="\x1b[2J\x1b[31mall is well"),
        "a message must not rule the terminal",
    )
    yield (
        kind,
        "a million labels",
        "bert",
        "prune_bert",
        change_json("config.json", num_labels=10**9),
        "would take all memory",
    )
    yield kind, "a deep tokenizer", "bert", "prune_bert", write("model/tokenizer.json", DEEP), "stack"
    yield kind, "a plan 100,000 deep", "pruned", "inspect", write("model/shrinkformer_plan.json", DEEP), "stack"
    yield (
        kind,
        "modules in other folders",
        "encoder",
        "export",
        write("model/modules.json", '[{"path": "../../home", "type": "x"}]'),
        "copies files from elsewhere",
    )
    yield (
        kind,
        "modules in the folder itself",
        "encoder",
        "prune_bert",
        write("model/modules.json", '[{"path": ".", "type": "x"}]'),
        "the dense weights would replace the pruned ones",
    )
    yield kind, "tokens beyond the embeddings", "bert", "prune_bert", _foreign_words, "there is no embedding for them"
    yield kind, "a report 100,000 deep", "bert", "inspect", write("model.jsonl", DEEP), "stack"


def _foreign_words(folder: Path) -> None:
    file = folder / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {w: n if w.startswith("[") else n + 900 for w, n in vocabulary.items()}
    file.write_text(json.dumps(content))


def _data() -> Iterator[Row]:
    kind, train = "by hand: data", "data/glue/sst2/train.jsonl"
    yield (
        kind,
        "labels out of range",
        "bert",
        "evaluate",
        write("data/glue/sst2/validation.jsonl", '{"sentence": "a", "label": 2}\n'),
        "the task has labels 0 and 1",
    )
    yield (
        kind,
        "labels of a test split",
        "bert",
        "evaluate",
        write("data/glue/sst2/validation.jsonl", '{"sentence": "a", "label": -1}\n'),
        "there are no labels to judge by",
    )
    yield kind, "a list of numbers", "bert", "prune_bert", write(train, "[1]\n[2]\n"), "no columns"
    yield kind, "half a line", "bert", "prune_bert", write(train, '{"sentence": "a"'), "a download that broke off"
    yield kind, "Latin-1", "bert", "prune_bert", write(train, '{"sentence": "caf\xe9"}'.encode("latin-1")), "not UTF-8"
    yield kind, "deep rows", "bert", "prune_bert", write(train, f'{{"sentence": {DEEP}}}\n'), "stack"
    yield kind, "an empty file", "bert", "prune_bert", write(train, ""), "no examples"
    yield kind, "blank lines", "bert", "prune_bert", write(train, "\n\n  \n"), "no examples"
    other = {"sentence": ["a"], "class": [1]}
    yield kind, "parquet without labels", "bert", "prune_bert", lambda folder: _parquet(folder, other), "a column lacks"
    yield kind, "parquet with zeros inside", "bert", "prune_bert", _cut_parquet, "damaged pages"
    parquet = write("data/glue/sst2/train.parquet", b"PAR1" + bytes(64) + b"PAR1")
    yield kind, "parquet of zeros", "bert", "prune_bert", parquet, "no footer"
    yield (
        kind,
        "text called parquet",
        "bert",
        "prune_bert",
        write("data/glue/sst2/train.parquet", "a,b\n"),
        "no parquet",
    )
    yield (
        kind,
        "answers that are texts",
        "squad",
        "evaluate",
        write("data/squad/validation.jsonl", '{"id": "0", "context": "a cat", "question": "who", "answers": "cat"}\n'),
        "no texts with starts",
    )
    yield kind, "a text of nothing", "opt", "opt_eval", write("data/wikitext2/test.txt", " \n \n"), "no tokens"
    yield (
        kind,
        "a picture called text",
        "opt",
        "prune_opt",
        write("data/wikitext2/train.txt", b"\x89PNG\r\n\x1a\n" + bytes(range(256))),
        "not UTF-8",
    )
    yield kind, "a folder called text", "llama", "opt_eval", _folder_as_text, "no file"


def _folder_as_text(folder: Path) -> None:
    (folder / "data" / "wikitext2" / "test.txt").unlink()
    (folder / "data" / "wikitext2" / "test.txt").mkdir()


def hand_cases() -> Iterator[Case]:
    """All of them."""
    for kind, name, base, command, change, reason in (*weight_rows(), *_links(), *_json_files(), *_data()):
        arguments = ("model.jsonl",) if name.startswith("a report") else None
        yield Case(name, kind, base, command, change, reason, arguments)
    own = ("--model_name", "model", "--task_name", "sst2", "--data_dir", "data", "--calibration_file")
    for name, text, reason in (
        ("own.csv", "text,label\na,1\n", "no column sentence"),
        ("own.json", '{"sentence": 3}', "no list of texts"),
        ("own.txt", b"\xff\xfe", "not UTF-8"),
        ("own.xlsx", "PK", "no kind of file that is read"),
        ("own.jsonl", '{"sentence": "a"}\n3\n', "a row is a number"),
    ):
        change = write(name, text)
        yield Case(f"--calibration_file {name}", "by hand: data", "bert", "prune_bert", change, reason, (*own, name))
    yield Case(
        "--evaluation_file own.txt",
        "by hand: data",
        "opt",
        "opt_eval",
        write("own.txt", b"a\xff"),
        "not UTF-8",
        ("--model_name", "model", "--data_dir", "data", "--evaluation_file", "own.txt"),
    )
