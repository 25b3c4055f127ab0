"""Machines that others use as well: how many threads there are, how they wait, and whose time a search takes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shrinkformer.commands import verbs
from shrinkformer.commands.main import main
from shrinkformer.utils import work_time
from shrinkformer.utils.threads import cpu_quota, threads_of, usable_threads, wait_passively
from shrinkformer.utils.work_time import Allowance, waited_seconds
from tests.conftest import ROOT


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "sys/fs/cgroup/cpu"
GROUPS: dict[str, tuple[dict[str, str], float | None]] = {
    "no groups": ({}, None),
    "v2, none set": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
    "v2, one and a half": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
    "v2, without a period": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000\n"}, 2.0),
    "v2, a group above sets less": (
        {
            "proc/self/cgroup": "0::/a.slice/b.scope\n",
            "sys/fs/cgroup/a.slice/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/a.slice/b.scope/cpu.max": "400000 100000\n",
        },
        3.0,
    ),
    "v2, a container sees its own group as the root": (
        {"proc/self/cgroup": "0::/docker/0123\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"},
        0.5,
    ),
    "v1": (
        {
            "proc/self/cgroup": "9:memory:/other\n4:cpu,cpuacct:/jobs\n",
            f"{V1}/jobs/cpu.cfs_quota_us": "250000\n",
            f"{V1}/jobs/cpu.cfs_period_us": "100000\n",
        },
        2.5,
    ),
    "v1, none set": (
        {
            "proc/self/cgroup": "1:cpu:/\n",
            f"{V1}/cpu.cfs_quota_us": "-1\n",
            f"{V1}/cpu.cfs_period_us": "100000\n",
        },
        None,
    ),
    "both, v1 has the controller": (
        {
            "proc/self/cgroup": "1:cpu:/\n0::/\n",
            f"{V1}/cpu.cfs_quota_us": "100000\n",
            f"{V1}/cpu.cfs_period_us": "50000\n",
        },
        2.0,
    ),
    "nonsense": ({"proc/self/cgroup": "what\n0::/\n", "sys/fs/cgroup/cpu.max": "many few\n"}, None),
}


class TestThreads:
    @pytest.mark.parametrize("name", GROUPS)
    def test_quotas(self, name: str, tmp_path: Path) -> None:
        files, expected = GROUPS[name]
        assert cpu_quota(write(tmp_path, files)) == expected

    @pytest.mark.parametrize(
        ("cores", "quota", "variables", "expected"),
        [
            (8, None, {}, 8),
            (8, "150000 100000", {}, 2),
            (2, "600000 100000", {}, 2),
            (8, "50000 100000", {}, 1),
            (8, None, {"LOCAL_WORLD_SIZE": "3"}, 2),
            (2, None, {"LOCAL_WORLD_SIZE": "4"}, 1),
            (8, "150000 100000", {"OMP_NUM_THREADS": "5"}, 5),
            (8, None, {"OMP_NUM_THREADS": "3,2"}, 3),
            (8, None, {"OMP_NUM_THREADS": "all", "LOCAL_WORLD_SIZE": "x"}, 8),
        ],
    )
    def test_what_may_be_used(
        self,
        cores: int,
        quota: str | None,
        variables: dict[str, str],
        expected: int,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        if quota:
            write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": quota})
        assert usable_threads(tmp_path, variables) == expected

    def test_afterwards_as_before(self) -> None:
        before = torch.get_num_threads()
        with threads_of(before + 2) as chosen:
            assert chosen == torch.get_num_threads() == before + 2
        with threads_of() as chosen:
            assert chosen <= before
        assert torch.get_num_threads() == before

    @pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
    def test_the_users_choice_stays(self, name: str) -> None:
        mine = {name: "mine"}
        wait_passively(mine)
        assert mine == {name: "mine"}

    def test_commands_set_both(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        monkeypatch.setattr(
            verbs, "work_of", lambda _: lambda options: seen.append((torch.get_num_threads(), options.threads))
        )
        before = torch.get_num_threads()
        for name in ("prune", "quantize", "evaluate"):
            assert main([name, "--task", "sst2", "--model_name", "x", "--threads", str(before + 1)]) == 0
        assert seen == [(before + 1, before + 1)] * 3
        assert os.environ["OMP_WAIT_POLICY"] == "passive"
        assert torch.get_num_threads() == before

    def test_times_are_those_of_a_process_as_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        monkeypatch.setattr(verbs, "work_of", lambda _: lambda options: None)
        assert main(["latency", "all-MiniLM-L6-v2"]) == 0
        assert "OMP_WAIT_POLICY" not in os.environ

    @pytest.mark.parametrize("name", ["prune", "quantize", "evaluate", "latency", "export"])
    def test_no_threads(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([name, "all-MiniLM-L6-v2", "--threads", "0"]) == 2
        assert "--threads 0: must be at least 1" in capsys.readouterr().err

    def test_scripts_choose_before_torch_is_there(self) -> None:
        """In a process of its own: nothing that a command imports on the way to its flags may load torch."""
        code = """
import os, sys, json
from shrinkformer.commands import verbs
verbs.work_of = lambda _: lambda options: None
real = verbs.wait_passively
verbs.wait_passively = lambda: (seen.append("torch" in sys.modules), real())
seen = []
from shrinkformer.commands.main import prune_bert
assert prune_bert(["--task_name", "sst2", "--threads", "1"]) == 0
print(json.dumps([seen, os.environ["OMP_WAIT_POLICY"]]))
"""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP")}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT, check=True
        )
        assert json.loads(done.stdout.splitlines()[-1]) == [[False], "passive"]


class Clock:
    """Time on the clock, and how much of it other processes had."""

    def __init__(self) -> None:
        self.wall = self.waited = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setattr(work_time, "perf_counter", lambda: made.wall)
    monkeypatch.setattr(work_time, "waited_seconds", lambda: made.waited)
    return made


class TestAllowance:
    def test_time_of_others_does_not_count(self, clock: Clock) -> None:
        time = Allowance(10.0)
        clock.wall, clock.waited = 25.0, 16.0
        assert not time.is_used()
        assert str(time) == "9 s of work, while other processes had the processor for 16 s more"
        clock.wall = 26.0
        assert time.is_used()

    def test_on_a_quiet_machine_nothing_is_said(self, clock: Clock) -> None:
        time = Allowance(10.0)
        clock.wall, clock.waited = 12.0, 0.5
        assert time.is_used()
        assert str(time) == "12 s"

    def test_what_an_earlier_run_did_counts(self, clock: Clock) -> None:
        spared = [100.0]
        time = Allowance(10.0, lambda: spared[0])
        assert not time.is_used()
        spared[0], clock.wall = 108.0, 3.0
        assert time.is_used()
        assert time.worked == 11.0

    @pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not count it")
    def test_the_system_counts(self) -> None:
        before = waited_seconds()
        sum(range(10**6))
        assert waited_seconds() >= before >= 0.0

    def test_a_system_that_does_not_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(OSError))
        assert waited_seconds() == 0.0
