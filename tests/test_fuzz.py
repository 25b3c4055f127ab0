"""A few of the examples that `python -m benchmarks.fuzz` tries by the thousand, always the same ones."""

import warnings
from collections.abc import Iterator

import pytest
import transformers

from benchmarks import fuzz
from shrinkformer.prune.cholesky import DampingWarning
from tests.conftest import FAMILIES


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DampingWarning)
        yield
    transformers.utils.logging.enable_progress_bar()


def test_every_family_is_drawn() -> None:
    assert set(fuzz.FAMILIES) == set(FAMILIES)


@pytest.mark.parametrize("family", fuzz.FAMILIES)
def test_plans_survive_surgery_save_and_load(family: str) -> None:
    assert sum(fuzz.fuzz("plans", family, 8, seed=1).values()) >= 8


@pytest.mark.parametrize("family", fuzz.FAMILIES)
def test_budgets_are_met_or_rightly_refused(family: str) -> None:
    assert sum(fuzz.fuzz("budgets", family, 4, seed=1).values()) >= 4


@pytest.mark.parametrize("name", ["sizes", "texts"])
def test_what_needs_no_model(name: str) -> None:
    assert sum(fuzz.fuzz(name, "bert", 300, seed=1).values()) >= 300


def test_a_failure_is_one_line_of_the_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(data: object, family: str) -> str:
        raise ZeroDivisionError(family)

    monkeypatch.setitem(fuzz.PROPERTIES, "plans", fails)
    assert fuzz.main(["--examples", "3", "--families", "opt", "--properties", "plans"]) == 1
    said = capsys.readouterr().out
    assert "ZeroDivisionError: opt" in said
    assert "1 failures" in said
