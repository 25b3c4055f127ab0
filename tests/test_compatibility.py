"""The jobs with other versions of the libraries."""

import subprocess
import tomllib

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / ".ci" / "compatibility"


def printed(*arguments: str) -> list[str]:
    command = ["bash", str(SCRIPT), *arguments, "--print"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = dict(line.split("==") for line in printed("oldest"))
    for line in project["dependencies"]:
        name, _, version = line.partition(">=")
        assert oldest[name] == version
    for extra in ("export", "figures", "finetune", "sentence-transformers", "compressed-tensors", "tensorboard"):
        for line in project["optional-dependencies"][extra]:
            name, _, version = line.partition(">=")
            assert oldest[name] == version
    assert (oldest["torch"], oldest["transformers"]) == ("2.11", "5.14")


def test_a_pair_replaces_two_pins() -> None:
    pair = printed("2.12.0", "5.20.0")
    assert {"torch==2.12.0", "transformers==5.20.0"} <= set(pair)
    names = [line.partition("==")[0] for line in pair]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("arguments", [[], ["latest"]])
def test_other_words_show_the_usage(arguments: list[str]) -> None:
    done = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert ".ci/compatibility oldest" in done.stdout
