"""What is said about a package that is not there: this one is on no index."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest

from shrinkformer.utils import installation
from shrinkformer.utils.installation import how_to_install
from tests.conftest import ROOT

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_from_a_clone() -> None:
    assert how_to_install("export") == f'pip install -e "{ROOT}[export]"'


@pytest.mark.parametrize("extra", ["export", "lm-eval", "figures", "wandb"])
def test_from_a_wheel(extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pip leaves it: the package, its metadata, and no pyproject.toml."""
    lines = [f'Requires-Dist: {one}; extra == "{name}"' for name, every in EXTRAS.items() for one in every]
    folder = tmp_path / "shrinkformer-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "\n".join(["Metadata-Version: 2.4", "Name: shrinkformer", "Version: 0.1.0", *lines])
    )
    monkeypatch.setattr(installation, "_ROOT", tmp_path)
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: importlib.metadata.PathDistribution(folder).requires
    )
    assert how_to_install(extra) == "pip install " + " ".join(f'"{package}"' for package in EXTRAS[extra])


def test_of_a_package_without_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installation, "_ROOT", tmp_path)
    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert how_to_install("export") == 'pip install "shrinkformer[export]"'
