"""The benchmarks that disturb runs, briefly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("line", ["kills --kills 7", "failing_writes --runs 7"])
def test_nothing_is_lost(line: str, tmp_path: Path) -> None:
    module, *rest = line.split()
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", "--work_dir", str(tmp_path / "work"), *rest],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was lost" in done.stdout
