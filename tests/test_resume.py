"""A crash or a kill costs one block at most, and nothing foreign is taken up."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shrinkformer.architectures import layer_views
from shrinkformer.errors import InputError
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.pruner import calibrate
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.resume import BlockStore, examples_digest, fingerprint
from tests.conftest import ROOT, build_model, make_batches


def test_resuming_gives_the_same_plan_and_repeats_only_one_block(batches: list[dict[str, Any]], tmp_path: Path) -> None:
    model = build_model()
    expected = calibrate(model, batches, method="stat-bias").prune(Budget(0.5, 16)).plan
    key = fingerprint(model) + examples_digest(batches)

    broken = layer_views(model)[2].feed_forward_output.module.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrate(model, batches, resources=Resources(store=BlockStore(tmp_path, key)), method="stat-bias")
    broken.remove()
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["block0000.safetensors", "block0001.safetensors"]

    written = []
    store = BlockStore(tmp_path, key)
    write = store.write
    store.write = lambda block, moments: (written.append(block), write(block, moments))[1]  # type: ignore[method-assign]
    assert (
        calibrate(model, batches, resources=Resources(store=store), method="stat-bias").prune(Budget(0.5, 16)).plan
        == expected
    )
    assert written == [2]


def test_other_weights_or_examples_are_refused(batches: list[dict[str, Any]], tmp_path: Path) -> None:
    model = build_model()
    store = BlockStore(tmp_path, fingerprint(model) + examples_digest(batches))
    calibrate(model, batches, resources=Resources(store=store), method="stat-bias")
    others = [
        fingerprint(build_model(seed=1)) + examples_digest(batches),
        fingerprint(model) + examples_digest(make_batches([5, 6], batch_size=2)),
    ]
    for key in others:
        with pytest.raises(InputError, match=r"--resume: .* other weights, calibration examples or options"):
            BlockStore(tmp_path, key)
    store.clear()
    assert not tmp_path.exists()
    BlockStore(tmp_path, others[0])  # where nothing is left, anything may begin


def test_how_examples_are_batched_does_not_enter_their_digest() -> None:
    lengths = [5, 9, 7, 12, 3, 8]
    few, many = (make_batches(lengths, batch_size=size) for size in (2, 3))
    assert examples_digest(few) == examples_digest(many) != examples_digest(make_batches(lengths[:-1], batch_size=2))


def test_files_of_the_same_size_and_time_are_told_apart_by_what_is_in_them(tmp_path: Path) -> None:
    model, found = build_model(), []
    for number, sign in enumerate((b"a", b"b")):
        file = tmp_path / "model.safetensors"
        file.write_bytes(b"-" * 20_000_000 + sign + b"-" * (20_000_000 if number < 2 else 0))
        os.utime(file, ns=(0, 0))
        found.append(fingerprint(model, [file]))
    assert found[0] == found[1]  # one byte of many is not seen,
    file.write_bytes(b"-" * 10_000_000 + b"x" * 20_000_001 + b"-" * 10_000_000)
    os.utime(file, ns=(0, 0))
    assert fingerprint(model, [file]) != found[0]  # other weights are


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "block0000.safetensors").write_bytes(b"half a fi")
    with pytest.raises(InputError, match="--resume"):
        BlockStore(tmp_path, "key")


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from shrinkformer.prune.pruner import calibrate
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.resume import BlockStore, examples_digest, fingerprint
from tests.conftest import build_model, make_batches
model, batches = build_model(), make_batches([5, 9, 7], batch_size=3)
store = BlockStore(Path(sys.argv[1]), fingerprint(model) + examples_digest(batches))
write = store.write
def write_then_die(block, moments):
    write(block, moments)
    if block == 1:
        os.kill(os.getpid(), signal.SIGKILL)
store.write = write_then_die
calibrate(model, batches, resources=Resources(store=store), method="stat-bias")
"""


def test_a_killed_process_leaves_whole_blocks(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED.format(root=str(ROOT)), str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    model, batches = build_model(), make_batches([5, 9, 7], batch_size=3)
    store = BlockStore(tmp_path, fingerprint(model) + examples_digest(batches))
    assert [store.read(block, model.device) is not None for block in range(3)] == [True, True, False]
    assert (
        calibrate(model, batches, resources=Resources(store=store), method="stat-bias").prune(Budget(0.5, 9)).plan.ratio
        <= 0.5
    )
