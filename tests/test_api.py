"""The public surface, and what README says about it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import shrinkformer
from shrinkformer.commands.main import main
from shrinkformer.commands.verbs import COMMANDS
from shrinkformer.dataset.tasks import TASKS
from shrinkformer.prune.names import METHOD_NAMES
from tests.conftest import ROOT, build_model

README = (ROOT / "README.md").read_text()


def test_readmes_four_lines(batches: list[dict[str, Any]], tmp_path: Path) -> None:
    model = build_model()
    pruned = shrinkformer.prune_model(model, batches, mu=0.5)
    shrinkformer.save(pruned.model, tmp_path / "smaller", plan=pruned.plan)
    again = shrinkformer.load(tmp_path / "smaller").eval()
    assert torch.equal(again(**batches[0]).logits, pruned.model(**batches[0]).logits)
    assert shrinkformer.calibrate(model, batches).prune(shrinkformer.Budget(0.3, 16)).plan.ratio <= 0.3


def test_every_exported_name_is_there() -> None:
    assert all(getattr(shrinkformer, name) is not None for name in shrinkformer.__all__)
    with pytest.raises(AttributeError, match="no attribute 'prune_everything'"):
        _ = shrinkformer.prune_everything


def test_readme_names_flags_tasks_and_methods_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        main([command, "--help-all"])
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert set(re.findall(r"`?(--\w+)", README)) - {"--strict", "--nproc_per_node", "--help", "--no"} <= known
    assert all(task in README for task in TASKS)
    assert all(method.removesuffix("-refit") in README for method in METHOD_NAMES)


def test_readme_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
