"""Reading one file of examples into an in-memory data set, whatever its format."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shrinkformer.errors import CheckpointError, DataError
from shrinkformer.trust.foreign import foreign_errors, shortened
from shrinkformer.trust.json_files import parse_json

if TYPE_CHECKING:
    import datasets  # takes a second to import: the functions that read do it
    import pyarrow

_MOST_BYTES, _PIECE = 16 * 2**30, 1024
"""Bytes of a file of examples in memory, and rows of a piece that is unpacked at once."""

SUFFIXES = (".parquet", ".json", ".jsonl", ".csv")
"""File types with named columns, in the order in which they are looked for."""

_WITH_COLUMNS = (*SUFFIXES, ".tsv")
"""The same and those that are read where they are named."""

TEXT_COLUMNS = ("text", "content", "sentence", "document", "article", "body", "raw_content")
"""Names of a column of texts, in the order in which they are looked for; large and small letters are the same."""


def read_file(path: Path, *, text_columns: Sequence[str]) -> "datasets.Dataset":
    """Read a file with named columns.

    Args:
        path: a .parquet, .json (a list of objects, an object of columns, or SQuAD's own nested form), .jsonl, .csv
            file (comma separated, with a header) or .tsv file (the same with tabs, without quotes).
        text_columns: columns that stay texts even if every value looks like a number (csv, tsv).

    Returns:
        The rows, in the file's order.

    Raises:
        DataError: the file is empty, cannot be read, or is of another type.
    """
    suffix = path.suffix.lower()
    if suffix not in _WITH_COLUMNS:
        raise DataError(
            f"{path}: files of type {suffix or 'none'!r} are not read; use {', '.join(_WITH_COLUMNS)} or .txt"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; it should hold one example per row")
    with foreign_errors(DataError, f"{path} cannot be read as {suffix[1:]}", "check the file"):
        return _read(path, suffix, text_columns)


def read_texts(path: Path) -> list[str]:
    """Read the texts of the user's own file, whatever its type.

    Args:
        path: of a type that :func:`read_file` takes: the texts of its text column, see :func:`text_column`, or a .json
            file with a list of texts. Anything else is one text in UTF-8.

    Returns:
        The texts that are not blank, in the file's order.

    Raises:
        DataError: the file is empty, cannot be read, has no text column, or holds something else than texts in it.
    """
    if path.suffix.lower() not in _WITH_COLUMNS:
        texts = [read_text(path)]
    else:
        rows = read_file(path, text_columns=TEXT_COLUMNS)
        name = text_column(rows)
        if name is None:
            found = shortened(", ".join(rows.column_names)) or "no columns"
            raise DataError(f"{path} has no column of texts (found: {found}); name it {' or '.join(TEXT_COLUMNS[:2])}")
        texts = rows[name][:]
        bad = next((row for row, text in enumerate(texts) if not isinstance(text, str)), None)
        if bad is not None:
            held = shortened(repr(texts[bad]))
            raise DataError(f"{path}, row {bad}: column {name} holds {held}, which is not a text")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError(f"{path} is empty; it should hold a text")
    return texts


def text_column(rows: "datasets.Dataset") -> str | None:
    """The column that holds texts: the first of the usual names, or the only one; None where there is none."""
    found = rows.column_names
    by_name = {name.lower(): name for name in reversed(found)}
    for name in TEXT_COLUMNS:
        if name in by_name:
            return str(by_name[name])
    if len(found) == 1 and len(rows) and isinstance(rows[0][found[0]], str):
        return str(found[0])
    return None


def read_lines(path: Path, columns: Sequence[str]) -> "datasets.Dataset":
    """Read a text file: one example per line, its texts separated by tabs; blank lines are skipped.

    Args:
        path: a UTF-8 text file.
        columns: the names of the texts of a line.

    Returns:
        The examples.

    Raises:
        DataError: the file is not UTF-8, holds no example, or a line does not have one text per column.
    """
    import datasets

    rows: list[dict[str, str]] = []
    lines = read_text(path).split("\n")
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


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        DataError: It is missing, too large, not UTF-8, or no text at all.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(f"{path} has {path.stat().st_size:,} bytes; give at most {_MOST_BYTES:,}")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give a UTF-8 text file") from error
    if "\0" in text:
        raise DataError(f"{path} holds a zero byte at character {text.index(chr(0))}; it is no text, check the file")
    return text


def _read(path: Path, suffix: str, text_columns: Sequence[str]) -> "datasets.Dataset":
    import datasets

    if suffix == ".parquet":
        return datasets.Dataset(_read_parquet(path))
    if suffix in {".csv", ".tsv"}:
        return datasets.Dataset(_read_delimited(path, suffix, text_columns))
    text = read_text(path)
    if suffix == ".json":
        return _read_json(text, str(path), text_columns)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return datasets.Dataset.from_list([_object(line, f"{path}, line {number}", text_columns) for number, line in lines])


def _read_delimited(path: Path, suffix: str, text_columns: Sequence[str]) -> "pyarrow.Table":
    import pyarrow.csv

    as_text = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(text_columns, pyarrow.string()))
    form = pyarrow.csv.ParseOptions(newlines_in_values=True)
    if suffix == ".tsv":  # as GLUE and others publish them: a quotation mark is one
        form = pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False)
    read_text(path)  # its own messages are better than pyarrow's
    return pyarrow.csv.read_csv(path, convert_options=as_text, parse_options=form)


def _read_json(text: str, where: str, text_columns: Sequence[str]) -> "datasets.Dataset":
    import datasets

    content = _parsed(text, where)
    if isinstance(content, list):
        if content and all(isinstance(row, str) for row in content):
            return datasets.Dataset.from_dict({TEXT_COLUMNS[0]: content})
        for number, row in enumerate(content):
            _require_object(row, f"{where}, row {number}", text_columns)
        return datasets.Dataset.from_list(content)
    _require_object(content, where, ())
    if isinstance(content.get("data"), list):
        return datasets.Dataset.from_list(_flatten_squad(content["data"]))
    if content and not any(isinstance(column, list) for column in content.values()):
        _require_object(content, where, text_columns)
        return datasets.Dataset.from_list([content])  # one row
    return datasets.Dataset.from_dict(content)


def _read_parquet(path: Path) -> "pyarrow.Table":
    """A table, read piece by piece, so that a file which unpacks to more than memory holds is noticed in time.

    What it says about features of ``datasets`` is dropped: a column could claim to be of pictures at other places.
    """
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        pieces, total = [], 0
        for piece in file.iter_batches(batch_size=_PIECE):
            total += piece.nbytes
            if total > _MOST_BYTES:
                raise DataError(f"{path} unpacks to more than {_MOST_BYTES:,} bytes; give fewer examples")
            pieces.append(piece)
        table = pyarrow.Table.from_batches(pieces, schema=file.schema_arrow)
    return table.replace_schema_metadata(None).combine_chunks()


def _object(line: str, where: str, text_columns: Sequence[str]) -> dict[str, Any]:
    row = _parsed(line, where)
    _require_object(row, where, text_columns)
    return row  # type: ignore[no-any-return]


def _parsed(text: str, where: str) -> Any:
    try:
        return parse_json(text.encode(), where)
    except CheckpointError as error:  # the same checks, but of the user's data
        raise DataError(str(error).replace("download the file again", "check the file")) from None


def _require_object(row: Any, where: str, text_columns: Sequence[str]) -> None:
    if not isinstance(row, dict):
        raise DataError(f"{where}: {type(row).__name__} where an object {{column: value}} is needed; check the file")
    for name in text_columns:
        if name in row and not isinstance(row[name], str):
            raise DataError(f"{where}: column {name} holds {shortened(repr(row[name]))}, which is not a text")


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
