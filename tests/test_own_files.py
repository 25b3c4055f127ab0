"""The user's own files: every type that the documents promise gives the same texts, for both kinds of models."""

import csv
import json
from pathlib import Path
from typing import Any

import pandas
import pytest

from shrinkformer.commands import prune_opt
from shrinkformer.dataset.corpora import read_own_text
from shrinkformer.dataset.files import read_texts
from shrinkformer.dataset.loading import load_examples
from shrinkformer.dataset.tasks import get_task
from shrinkformer.errors import DataError
from tests.test_prune_opt import call, checkpoint, write_corpora

TEXTS = ['The cat, "old" and red,\nsleeps.', "Ein großer Vogel", "12"]
PLAIN = ["the cat sees a dog", "Ein großer Vogel"]  # no quotation marks and no newlines: also for .tsv and .txt


def write(folder: Path, suffix: str, texts: list[str], column: str = "text") -> Path:
    path, rows = folder / f"own{suffix}", [{"id": number, column: text} for number, text in enumerate(texts)]
    match suffix.lower():
        case ".jsonl":
            path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
        case ".json":
            path.write_text(json.dumps(rows))
        case ".csv":
            with path.open("w", newline="", encoding="utf-8-sig") as file:
                writer = csv.DictWriter(file, ["id", column])
                writer.writeheader()
                writer.writerows(rows)
        case ".tsv":
            path.write_text("\n".join([f"id\t{column}", *(f"{row['id']}\t{row[column]}" for row in rows)]))
        case ".parquet":
            pandas.DataFrame(rows).to_parquet(path)
        case _:
            path.write_text("\n".join(texts))
    return path


@pytest.mark.parametrize("column", ["text", "Content", "article"])
@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".json", ".csv", ".tsv", ".parquet"])
def test_every_type_gives_the_same_texts(tmp_path: Path, suffix: str, column: str) -> None:
    texts = PLAIN if suffix == ".tsv" else TEXTS
    path = write(tmp_path, suffix, [texts[0], "  ", *texts[1:]], column)
    assert read_texts(path) == texts
    assert read_own_text(path) == "\n\n".join(texts)
    examples = load_examples(write(tmp_path, suffix, PLAIN, "sentence"), get_task("sst2"))
    assert examples["sentence"][:] == PLAIN


@pytest.mark.parametrize("suffix", [".txt", ".md", ""])
def test_anything_else_is_one_text(tmp_path: Path, suffix: str) -> None:
    assert read_own_text(write(tmp_path, suffix, PLAIN)) == "\n".join(PLAIN)
    assert load_examples(write(tmp_path, ".txt", PLAIN), get_task("sst2"))["sentence"][:] == PLAIN


def test_other_forms_of_json(tmp_path: Path) -> None:
    for content in (TEXTS, {"text": TEXTS}, {"text": TEXTS[0]}):
        (tmp_path / "own.json").write_text(json.dumps(content))
        wanted = TEXTS[:1] if content == {"text": TEXTS[0]} else TEXTS
        assert read_texts(tmp_path / "own.json") == wanted
    (tmp_path / "one.csv").write_text("anything\nthe only column\n")  # of texts, whatever it is called
    assert read_texts(tmp_path / "one.csv") == ["the only column"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "a", "answer": "b"}', r"no column of texts \(found: prompt, answer\); name it text or"),
        ("a.csv", "title,label\nx,1\n", r"no column of texts \(found: title, label\)"),
        ("a.jsonl", '{"text": "a"}\n{"text": ["b"]}', r"line 2: column text holds \['b'\], which is not a text"),
        ("a.jsonl", '{"text": "a"}\n{"id": 1}', r"row 1: column text holds None, which is not a text"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', r"a.jsonl, line 2"),
        ("a.jsonl", "", r"is empty"),
        ("a.csv", "text\n", r"is empty; it should hold a text"),
        ("a.json", "[]", r"no column of texts \(found: no columns\)"),
        ("a.tsv", "text\tid\n \t1\n", r"is empty; it should hold a text"),
        ("a.csv", b"text\n\xff\xfe\n", r"is not UTF-8 text"),
        ("a.txt", "größer".encode("utf-16"), r"is not UTF-8 text"),
        ("a.parquet", b"text", r"cannot be read as parquet"),
        ("a.bin", b"a\0b", r"zero byte"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_own_text(path)


def test_by_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpora(tmp_path / "data")
    checkpoint(tmp_path / "mine")
    own = write(tmp_path, ".jsonl", ["the cat sees a dog"] * 60)
    other = write(tmp_path, ".tsv", ["a bird finds the red house"] * 60, "content")
    common = ("--model_name", "mine", "--sample_batch_size", "4", "--evaluation_windows", "2", "--dry_run")
    files = ("--calibration_file", str(own), "--evaluation_file", str(other))
    assert call(prune_opt.main, tmp_path / "data", *common, *files) == 0
    capsys.readouterr()
    short = write(tmp_path, ".parquet", ["the cat"])
    assert call(prune_opt.main, tmp_path / "data", *common, "--calibration_file", str(short)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"--calibration_file {short} has no text of more than" in line
