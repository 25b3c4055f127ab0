"""Processes that share one job: real ones, talking through gloo."""

import os
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shrinkformer.errors import InputError
from shrinkformer.prune.moments import Moments
from shrinkformer.utils.parallel import ALONE, Workers, local_device, start_workers, workers_of


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def as_torchrun_does(rank: int, size: int, port: int) -> None:
    """The environment that torchrun gives to a process."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def talk(rank: int, size: int, port: int, folder: Path) -> None:
    """What each of the processes does; an assertion that fails here fails the test."""
    as_torchrun_does(rank, size, port)
    with workers_of("cpu") as workers:
        assert workers == Workers(rank, size)
        for total in range(5):  # also fewer items than processes, and none
            items = [f"item {index}" for index in range(total)]
            assert workers.gather(workers.share(items)) == items
        assert workers.gather([None] * (2 - rank)) == [None] * 3  # None is an item like any other

        numbers = torch.arange(10, dtype=torch.float64).reshape(5, 2)
        single, double = workers.share_rows(numbers).sum(0), torch.tensor(rank + 1)
        workers.sum_(single, double)
        assert single.equal(numbers.sum(0))
        assert double == 3

        moments, everything = Moments.zeros(2), Moments.zeros(2)
        moments.update(workers.share_rows(numbers))
        moments.all_reduce()
        everything.update(numbers)
        assert moments.second.equal(everything.second)
        assert moments.count == 5

        assert workers.broadcast({"from": rank} if workers.is_main else None) == {"from": 0}

        if workers.is_main:
            time.sleep(0.3)
            (folder / "written").touch()
        workers.barrier()
        assert (folder / "written").exists()
    assert not dist.is_initialized()


def test_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(talk, (2, free_port(), tmp_path), nprocs=2)


class TestAlone:
    def test_without_torchrun(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        assert start_workers("cpu") is ALONE
        assert local_device("cuda") == "cuda"
        with workers_of("cpu") as workers:
            assert workers is ALONE

    def test_torchrun_with_one_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "1")
        assert start_workers("cuda") is ALONE
        assert not dist.is_initialized()

    def test_nothing_is_shared(self) -> None:
        assert ALONE.is_main
        assert ALONE.share("abc") == ALONE.gather("abc") == ["a", "b", "c"]
        assert ALONE.broadcast("value") == "value"
        numbers = torch.ones(3)
        ALONE.sum_(numbers)
        ALONE.barrier()
        assert numbers.equal(torch.ones(3))
        assert ALONE.share_rows(numbers).equal(numbers)


class TestDevices:
    def test_each_process_has_its_own_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOCAL_RANK", "3")
        assert [local_device(name) for name in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]

    @pytest.mark.parametrize(
        ("device", "message"),
        [
            ("cuda", r"more processes than there are GPUs \(1\); pass it --nproc_per_node 1"),
            ("cuda:0", "pass --device cuda:"),
        ],
    )
    def test_processes_do_not_share_a_gpu(self, device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(InputError, match=message):
            start_workers(device)


def test_shares_are_a_partition() -> None:
    shares = [Workers(rank, 3).share(range(8)) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]
