"""Reading one file of examples into an in-memory data set, whatever its format."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.csv
import pyarrow.parquet

from shrinkformer.errors import DataError

SUFFIXES = (".parquet", ".json", ".jsonl", ".csv")
"""File types with named columns, in the order in which they are looked for."""


def read_file(path: Path, *, text_columns: Sequence[str]) -> datasets.Dataset:
    """Read a file with named columns.

    Args:
        path: a .parquet, .json (a list of objects, an object of columns, or SQuAD's own nested form), .jsonl or .csv
            file (comma separated, with a header).
        text_columns: columns that stay texts even if every value looks like a number (csv).

    Returns:
        The rows, in the file's order.

    Raises:
        DataError: the file is empty, cannot be read, or is of another type.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: files of type {suffix or 'none'!r} are not read; use {', '.join(SUFFIXES)} or .txt")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; it should hold one example per row")
    try:
        return _read(path, suffix, text_columns)
    except (pyarrow.ArrowException, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise DataError(f"{path} cannot be read as {suffix[1:]} ({reason}); check the file") from error


def read_lines(path: Path, columns: Sequence[str]) -> datasets.Dataset:
    """Read a text file: one example per line, its texts separated by tabs; blank lines are skipped.

    Args:
        path: a UTF-8 text file.
        columns: the names of the texts of a line.

    Returns:
        The examples.

    Raises:
        DataError: the file is not UTF-8, holds no example, or a line does not have one text per column.
    """
    rows: list[dict[str, str]] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        parts = line.rstrip("\r").split("\t") if len(columns) > 1 else [line.strip()]
        if len(parts) != len(columns):
            raise DataError(
                f"{path}, line {number}: {len(parts)} tab-separated texts where {len(columns)} are needed "
                f"({', '.join(columns)})"
            )
        rows.append(dict(zip(columns, parts, strict=True)))
    if not rows:
        raise DataError(f"{path} is empty; it should hold one example per line")
    return datasets.Dataset.from_list(rows)


def _read(path: Path, suffix: str, text_columns: Sequence[str]) -> datasets.Dataset:
    if suffix == ".parquet":
        return datasets.Dataset(pyarrow.parquet.read_table(path))
    if suffix == ".csv":
        as_text = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(text_columns, pyarrow.string()))
        multiline = pyarrow.csv.ParseOptions(newlines_in_values=True)
        return datasets.Dataset(pyarrow.csv.read_csv(path, convert_options=as_text, parse_options=multiline))
    text = path.read_text(encoding="utf-8-sig")
    if suffix == ".jsonl":
        return datasets.Dataset.from_list([json.loads(line) for line in text.split("\n") if line.strip()])
    content = json.loads(text)
    if isinstance(content, list):
        return datasets.Dataset.from_list(content)
    if isinstance(content.get("data"), list):
        return datasets.Dataset.from_list(_flatten_squad(content["data"]))
    return datasets.Dataset.from_dict(content)


def _flatten_squad(articles: list[Any]) -> list[dict[str, Any]]:
    """Turn SQuAD's published nesting (article, paragraph, question) into the hub's rows."""
    return [
        {
            "id": question["id"],
            "title": article.get("title", ""),
            "context": paragraph["context"],
            "question": question["question"],
            "answers": {
                "text": [answer["text"] for answer in question.get("answers", [])],
                "answer_start": [answer["answer_start"] for answer in question.get("answers", [])],
            },
        }
        for article in articles
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
