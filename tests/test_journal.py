"""Values on disk keep every bit, and what a kill tore is forgotten."""

import math
from pathlib import Path

import pytest

from shrinkformer.utils.journal import Journal


def refuse() -> float:
    raise AssertionError("found again")


def test_values_come_back_to_the_last_bit(tmp_path: Path) -> None:
    values = {"third": 1 / 3, "tiny": 5e-324, "infinite": math.inf, "metrics": {"pearson": 0.1 + 0.2}, "run": "abc"}
    journal = Journal(tmp_path / "values.jsonl")
    for name, value in values.items():
        assert journal.value(name, lambda value=value: value) == value
    again = Journal(tmp_path / "values.jsonl")
    assert {name: again.value(name, refuse) for name in values} == values


def test_what_took_time_counts_for_limits(tmp_path: Path) -> None:
    Journal(tmp_path / "values.jsonl").note("slow", 1.0, seconds=30.0)
    again = Journal(tmp_path / "values.jsonl")
    assert again.spared == 0
    again.value("slow", refuse)
    assert again.spared == 30.0


@pytest.mark.parametrize("torn", [1, 20, 45])
def test_a_torn_line_is_forgotten(torn: int, tmp_path: Path) -> None:
    file = tmp_path / "values.jsonl"
    journal = Journal(file)
    journal.note("whole", 1.0)
    before = file.read_bytes()
    journal.note("torn", 2.0)
    file.write_bytes(file.read_bytes()[: len(before) + torn])
    again = Journal(file)
    assert again.known("whole") == 1.0
    assert again.known("torn") is None
    assert file.read_bytes() == before
    again.note("torn", 3.0)  # a new line, not the rest of a torn one
    assert Journal(file).known("torn") == 3.0


def test_nothing_is_kept_without_a_file_or_by_one_who_only_reads(tmp_path: Path) -> None:
    assert Journal().value("name", lambda: 1.0) == 1.0
    Journal(tmp_path / "values.jsonl", writes=False).note("name", 1.0)
    assert list(tmp_path.iterdir()) == []


def test_keep_only(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "values.jsonl")
    for name in ("finished, a", "curve", "finished, b"):
        journal.note(name, 1.0)
    journal.keep_only("finished, ")
    assert Journal(tmp_path / "values.jsonl").names == ["finished, a", "finished, b"]
