"""Progress in lines: one for every tenth with the time left, and nothing that overwrites itself."""

import doctest
import io
import sys

import pytest

from shrinkformer.utils import progress


class Clock:
    """Seconds that pass with every look."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    said = capsys.readouterr()
    assert "\r" not in said.out + said.err
    assert not said.err
    return said.out.splitlines()


def test_a_line_for_every_tenth(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "perf_counter", Clock(1.0))
    assert list(progress.each(range(1000), "evaluation", "example")) == list(range(1000))
    said = lines_of(capsys)
    assert len(said) == 10
    assert said[4] == "  evaluation: 500 of 1,000 examples 8:20 so far, about 8:20 left"
    assert said[-1] == "  evaluation: 1,000 of 1,000 examples in 16:40"


def test_a_line_for_each_of_a_few(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "perf_counter", Clock(60.0))
    with progress.counted(3, "calibrating", "block") as bar:
        for _ in range(3):
            bar.update(1)
    assert [line.split()[1] for line in lines_of(capsys)] == ["1", "2", "3"]


def test_a_moment_is_worth_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "perf_counter", Clock(0.001))
    list(progress.each([1], "saving", "file"))
    list(progress.each(range(50), "saving", "file"))
    assert lines_of(capsys) == ["  saving: 1 of 1 file in 0:00", "  saving: 50 of 50 files in 0:00"]


def test_nothing_is_shown_where_nobody_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.counted(5, "x", "y", shown=False) as bar:
        bar.update(5)
    assert list(progress.each([], "x", "y")) == []
    assert lines_of(capsys) == []


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    list(progress.each(range(3), "calibrating", "block"))
    assert "3/3" in terminal.getvalue()
    assert not capsys.readouterr().out


def test_the_example_in_the_docstring() -> None:
    assert not doctest.testmod(progress).failed
