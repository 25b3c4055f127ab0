"""A run that was interrupted anywhere ends, once it is taken up, bit by bit as if nothing had happened."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shrinkformer.errors import InputError
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.ledger import Ledger
from shrinkformer.prune.pruner import calibrate
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.resume import BlockFiles
from shrinkformer.prune.shrink_config import ShrinkConfig
from shrinkformer.utils.journal import Journal
from tests.conftest import build_model, make_batches

BATCHES = make_batches([5, 9, 7, 12, 3, 8, 6, 11], batch_size=2)
BUDGETS = (Budget(0.6, 8), Budget(0.4, 8))
IDENTITY = {"weights of the model": "abc", "--seed": "0"}


class Kill(BaseException):
    """Stands for one: no code of ours catches it."""


def prune_all(model: Any, method: str, ledger: Ledger) -> list[Any]:
    config = ShrinkConfig(search_seconds=1e6)
    resources = Resources(store=ledger.moments, ledger=ledger)
    calibrated = calibrate(model, BATCHES, method=method, config=config, resources=resources)
    return [calibrated.prune(budget) for budget in BUDGETS]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Kill after so many writes; gives the list of what was written."""
    note, save = Journal.note, BlockFiles._save

    def after(limit: int) -> list[str]:
        written: list[str] = []

        def count(what: str) -> None:
            written.append(what)
            if len(written) == limit:
                raise Kill

        def counting_note(self: Journal, name: str, *more: Any) -> None:
            note(self, name, *more)
            count(name)

        def counting_save(self: BlockFiles, block: int, *more: Any) -> None:
            save(self, block, *more)
            count(f"block {block}")

        monkeypatch.setattr(Journal, "note", counting_note)
        monkeypatch.setattr(BlockFiles, "_save", counting_save)
        return written

    return after


@pytest.mark.parametrize(("family", "method"), [("bert", "shrink"), ("llama", "shrink"), ("opt", "stat")])
def test_interrupted_anywhere(family: str, method: str, tmp_path: Path, counted: Callable[[int], list[str]]) -> None:
    model = build_model(family, num_hidden_layers=2)
    written = counted(0)
    expected = prune_all(model, method, Ledger(tmp_path / "whole", IDENTITY))
    total = len(written)
    assert total > (80 if method == "shrink" else 5)
    for limit in range(1, total, max(1, total // 12)):
        folder = tmp_path / str(limit)
        counted(limit)
        with pytest.raises(Kill):
            prune_all(model, method, Ledger(folder, IDENTITY))
        written = counted(0)
        found = prune_all(model, method, Ledger(folder, IDENTITY, resume=True))
        assert len(written) <= total - limit  # nothing that was kept was found again
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.plan == theirs.plan
            state = theirs.model.state_dict()
            assert all(torch.equal(tensor, state[name]) for name, tensor in ours.model.state_dict().items())


def test_what_differs_is_named(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger", IDENTITY)
    with pytest.raises(InputError, match=r"begun with --seed 0 \(now 1\); repeat the earlier command exactly"):
        Ledger(tmp_path / "ledger", {**IDENTITY, "--seed": "1"}, resume=True)
    with pytest.raises(InputError, match="other weights of the model and --seed 0"):
        Ledger(tmp_path / "ledger", {"weights of the model": "xyz", "--seed": "1"}, resume=True)
    Ledger(tmp_path / "ledger", {**IDENTITY, "--seed": "1"})  # starting anew is always allowed


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_an_identity_that_cannot_be_read_is_refused(text: str, tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger", IDENTITY)
    (tmp_path / "ledger" / "identity.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="leave --resume out to start anew"):
        Ledger(tmp_path / "ledger", IDENTITY, resume=True)


def test_what_nobody_signed_is_not_taken_up(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", IDENTITY)
    ledger.values.note("value", 1.0)
    (tmp_path / "ledger" / "identity.json").unlink()  # a kill in the middle of clearing
    assert Ledger(tmp_path / "ledger", IDENTITY, resume=True).values.known("value") is None


def test_finished_budgets_outlive_the_run(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", IDENTITY, data=tmp_path / "spill" / "data")
    prune_all(build_model("bert"), "stat", ledger)
    assert list((tmp_path / "spill" / "data").iterdir())
    ledger.finish(BUDGETS[0], {"folder": "here"})
    ledger.settle()
    assert not (tmp_path / "spill" / "data").exists()
    again = Ledger(tmp_path / "ledger", IDENTITY, data=tmp_path / "spill" / "data", resume=True)
    assert again.finished(BUDGETS[0]) == {"folder": "here"}
    assert again.finished(BUDGETS[1]) is None
    assert len(again.values.names) == 1
