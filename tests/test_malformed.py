"""Damaged and hostile inputs: a line that says what is wrong, and nothing run, written elsewhere or left hanging."""

import random
from pathlib import Path

import pytest

from benchmarks.malformed_by_hand import hand_cases
from benchmarks.malformed_cases import all_cases
from benchmarks.malformed_runner import Case, Ending, import_all, prepare, run_case

SAMPLE = 60


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("malformed")
    (folder / "scratch").mkdir()
    import_all()
    return prepare(folder)


def run(cases: list[Case], bases: Path) -> list[Ending]:
    return [run_case(case, bases, bases.parent / "scratch") for case in cases]


def wrong(endings: list[Ending]) -> list[str]:
    """Those that did not end as they should, for the message of a failure."""
    return [f"{ending.case.name} [{ending.case.command}]: {ending}" for ending in endings if not ending.right]


@pytest.mark.timeout(600)
def test_what_was_written_by_hand_is_refused_in_one_line(bases: Path) -> None:
    cases = list(hand_cases())
    assert len(cases) >= 40
    endings = run(cases, bases)
    assert not wrong(endings)
    assert [ending.case.name for ending in endings if ending.accepted] == []


@pytest.mark.timeout(600)
def test_a_sample_of_what_generators_damage(bases: Path) -> None:
    cases = [case for case in all_cases(bases) if not case.kind.startswith(("by hand", "valid"))]
    assert len(cases) >= 500
    quick = [case for case in cases if case.command != "export"]  # an export takes ten seconds
    assert not wrong(run(random.Random(1).sample(quick, SAMPLE), bases))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_everything_that_generators_damage(bases: Path) -> None:
    endings = run(all_cases(bases), bases)
    assert not wrong(endings)
    valid = [ending for ending in endings if ending.case.kind == "valid"]
    assert all(ending.accepted for ending in valid)
    assert sum(not ending.accepted for ending in endings) >= 340
