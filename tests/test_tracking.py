"""``--report_to``: what trackers get, and what is said when one is missing or fails."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from shrinkformer.commands import tracking
from shrinkformer.commands.options import EncoderOptions
from shrinkformer.commands.report import Measured, Run
from shrinkformer.commands.tracking import require_trackers, scalars, track
from shrinkformer.errors import InputError, ShrinkformerError

DENSE = Measured({"accuracy": 0.9, "accuracy_stderr": 0.01}, 100.0, 50, 200, {"8x128": 4.0})
PRUNED = Measured({"accuracy": 0.8, "accuracy_stderr": 0.02}, 50.0, 30, 120, {"8x128": 3.0})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(
        task_name="sst2",
        model_name="mine",
        method="stat",
        mu=0.5,
        seed=0,
        sample_batch_size=8,
        calibration_tokens=99,
        device="cpu",
        dense=DENSE,
        pruned=PRUNED,
        plan=None,
        save_dir=tmp_path,
        seconds={"total": 2.0},
        peak_memory_bytes=1,
    )


def test_scalars(run: Run) -> None:
    found = scalars(run)
    assert found["dense/accuracy"] == 0.9
    assert found["pruned/accuracy_stderr"] == 0.02
    assert (found["dense/macs"], found["pruned/bytes"], found["pruned/latency_ms_8x128"]) == (100, 120, 3)
    assert found["seconds/total"] == 2
    assert all(isinstance(value, int | float) for value in found.values())


def test_tensorboard(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None:
            written.append(("open", log_dir))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value))

        def add_text(self, name: str, text: str, step: int) -> None:
            written.append((name, text))

        def close(self) -> None:
            written.append(("close",))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    track(run, ["tensorboard"], tmp_path / "sst2-mu0.5")
    assert written[0][1].startswith(str(tmp_path / "sst2-mu0.5-20"))
    assert {("pruned/accuracy", 0.8), ("dense/macs", 100.0), ("method", "stat")} <= set(written)
    assert written[-1] == ("close",)


def test_wandb(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, Any] = {}

    class Opened:
        def log(self, found: dict[str, float]) -> None:
            calls["log"] = found

        def finish(self) -> None:
            calls["finished"] = True

    def init(**given: Any) -> Opened:
        calls["init"] = given
        return Opened()

    module = types.ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    track(run, ["wandb"], tmp_path / "sst2-mu0.5")
    assert calls["init"]["project"] == "shrinkformer"
    assert calls["init"]["config"]["mu"] == 0.5
    assert Path(calls["init"]["dir"]).is_dir()
    assert calls["log"]["pruned/macs"] == 50
    assert calls["finished"]

    def fail(**_: Any) -> Opened:
        raise RuntimeError("not signed in\nrun wandb login")

    module.init = fail  # type: ignore[attr-defined]
    with pytest.raises(ShrinkformerError, match=r"^--report_to wandb: not signed in$"):
        track(run, ["wandb"], tmp_path / "sst2-mu0.5")


def test_a_missing_package_is_found_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    for name in ("wandb", "tensorboard"):
        with pytest.raises(InputError, match=rf"--report_to {name}: it is not installed; pip install .*\[{name}\]"):
            EncoderOptions(report_to=(name,))
    with pytest.raises(InputError, match="--report_to 'mlflow': choose among tensorboard, wandb"):
        require_trackers(["mlflow"])
    require_trackers([])
