"""A run that was interrupted anywhere ends, once it is taken up, bit by bit as if nothing had happened."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shrinkformer.errors import InputError
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.dependencies import ALL_STORED, EVALUATION_EXAMPLES, RUN
from shrinkformer.prune.ledger import Ledger
from shrinkformer.prune.plan import Plan
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


def prune_all(model: Any, method: str, ledger: Ledger, search_seconds: float = 1e6) -> list[Any]:
    config = ShrinkConfig(search_seconds=search_seconds)
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
        assert_equal(found, expected)


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.plan == theirs.plan
        state = theirs.model.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in ours.model.state_dict().items())


@pytest.mark.parametrize(("before", "now"), [(1e6, 0.0), (0.0, 1e6)])
def test_another_search_takes_up_what_was_measured(
    before: float, now: float, tmp_path: Path, counted: Callable[[int], list[str]]
) -> None:
    def facts(seconds: float) -> dict[str, str]:
        return {**IDENTITY, "--search_seconds": str(seconds)}

    model = build_model("bert", num_hidden_layers=2)
    expected = prune_all(model, "shrink", Ledger(tmp_path / "fresh", facts(now)), now)
    prune_all(model, "shrink", Ledger(tmp_path / "ledger", facts(before)), before)
    written = counted(0)
    ledger = Ledger(tmp_path / "ledger", facts(now), resume=True)
    assert ledger.news.startswith(
        f"--resume: begun with --search_seconds {before} (now {now}), so these are found anew: "
    )
    assert "refitted blocks" in ledger.news
    assert "curves" not in ledger.news
    assert_equal(prune_all(model, "shrink", ledger, now), expected)
    assert not [name for name in written if name.startswith("curve")]
    moments = len(list((tmp_path / "ledger/blocks/moments").iterdir()))
    assert moments == 2  # those of the first run: their key did not change


def everything(ledger: Ledger) -> None:
    """One of each kind of thing."""
    for stored in ALL_STORED:
        if stored.names:
            ledger.values.note(f"{stored.names}x", 1.0)
    for folder in ("moments", "mu0.5-x/shrink", "mu0.5-x/quantized"):
        assert ledger.data is not None
        (ledger.data / folder).mkdir(parents=True)


LEFT = {
    "--report_words": None,
    EVALUATION_EXAMPLES: {"moments", "curve of block ", "search, ", "set aside, ", "refitted", "quantized"},
    "--evaluation_windows": {"moments", "curve of block ", "search, ", "set aside, ", "refitted", "quantized"},
    "--search_seconds": {"moments", "curve of block ", "search, ", "metrics of the dense model"},
    "--latency_shape": {"moments", "curve of block ", "search, ", "metrics of the dense model"},
    "--bits": {"moments", "curve of block ", "search, ", "set aside, ", "refitted", "metrics of the dense model"},
    "--format": {
        "moments",
        "curve of block ",
        "search, ",
        "set aside, ",
        "refitted",
        "quantized",
        "metrics of the dense model",
    },
    "--method": {"metrics of the dense model"},
    "--batch_size": set(),
}


@pytest.mark.parametrize("fact", LEFT)
def test_a_changed_fact_drops_exactly_what_depends_on_it(fact: str, tmp_path: Path) -> None:
    everything(Ledger(tmp_path / "ledger", {**IDENTITY, fact: "1"}))
    left = LEFT[fact]
    if left is None:
        with pytest.raises(InputError, match=rf"begun with {fact} 1 \(now 2\)"):
            Ledger(tmp_path / "ledger", {**IDENTITY, fact: "2"}, resume=True)
        return
    ledger = Ledger(tmp_path / "ledger", {**IDENTITY, fact: "2"}, resume=True)
    places = {"moments": "moments", "refitted": "mu0.5-x/shrink", "quantized": "mu0.5-x/quantized"}
    folders = {name for name, place in places.items() if (tmp_path / "ledger/blocks" / place).exists()}
    assert folders | {name.removesuffix("x") for name in ledger.values.names} == left
    assert ledger.news.endswith("the rest is taken up") == bool(left)
    again = Ledger(tmp_path / "ledger", {**IDENTITY, fact: "2"}, resume=True)
    assert (again.news, again.values.names) == ("", ledger.values.names)


def test_keys_follow_what_things_depend_on(tmp_path: Path) -> None:
    before, after = (Ledger(tmp_path / name, {**IDENTITY, "--bits": name}) for name in ("4", "8"))
    same = {stored.words for stored in ALL_STORED if before.key(stored) == after.key(stored)}
    assert same == {stored.words for stored in ALL_STORED} - {"quantized blocks", "finished budgets", RUN.words}
    others = Ledger(tmp_path / "other", {**IDENTITY, "weights of the model": "xyz", "--bits": "4"})
    assert all(before.key(stored) != others.key(stored) for stored in ALL_STORED)


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


def test_what_another_model_left_is_known_when_beginning_anew(tmp_path: Path) -> None:
    assert Ledger(tmp_path / "ledger", IDENTITY).earlier == {}
    assert Ledger(tmp_path / "ledger", {**IDENTITY, "weights of the model": "xyz"}).earlier == IDENTITY
    (tmp_path / "ledger" / "identity.json").write_text("[1]")
    assert Ledger(tmp_path / "ledger", IDENTITY).earlier == {}


def test_budgets_that_differ_in_late_digits_have_names_of_their_own() -> None:
    assert Budget(0.5, 8).amount == "0.5"
    assert Budget(1.0, 8).amount == "1"
    assert Budget(0.5000001, 8).amount == "0.5000001"


def test_a_search_that_ran_out_of_time_says_so() -> None:
    model = build_model("bert", num_hidden_layers=2)
    said: list[str] = []
    plans = []
    for seconds in (1e-9, 0.0, 1e6):
        config = ShrinkConfig(search_seconds=seconds, say=said.append)
        plans.append(calibrate(model, BATCHES, method="shrink", config=config).prune(BUDGETS[0]).plan)
    assert [plan.search for plan in plans] == [{"cut_short": 1.0}, {}, {}]
    assert sum(line.startswith("search cut short after ") for line in said) == 1
    assert Plan.from_json(plans[0].to_json()) == plans[0]
