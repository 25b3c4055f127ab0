"""Files and folders are whole or not there, whatever ends the process that writes them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shrinkformer.errors import InputError
from shrinkformer.utils import files
from shrinkformer.utils.files import append_atomically, new_folder, scratch_beside, write_atomically
from shrinkformer.utils.locks import exclusive
from tests.conftest import ROOT

GONE = 2**22 + 1
"""No process has this number: it is beyond the largest that Linux gives."""


def folder(path: Path, text: str) -> Path:
    path.mkdir(parents=True)
    (path / "weights").write_text(text)
    return path


def test_a_folder_is_replaced_without_a_moment_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = folder(tmp_path / "model", "old")
    real = files._exchange

    def exchange(one: Path, other: Path) -> bool:
        assert (one / "weights").read_text() == "new"
        assert (other / "weights").read_text() == "old"
        return real(one, other)

    monkeypatch.setattr(files, "_exchange", exchange)
    with new_folder(target) as made:
        (made / "weights").write_text("new")
        assert (target / "weights").read_text() == "old"
    assert (target / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_file_systems_that_cannot_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = folder(tmp_path / "model", "old")
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    with new_folder(target) as made:
        (made / "weights").write_text("new")
    assert (target / "weights").read_text() == "new"


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    target = folder(tmp_path / "model", "old")

    def fail(made: Path) -> None:
        (made / "weights").write_text("half")
        raise OSError("full")

    with pytest.raises(OSError, match="full"), new_folder(target) as made:
        fail(made)
    assert (target / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_left_is_swept_away(tmp_path: Path) -> None:
    left = folder(tmp_path / f".model.{GONE}.part-abc", "half")
    mine = folder(tmp_path / f".model.{os.getpid()}.part-abc", "of another thread")
    alive = folder(tmp_path / f".model.{os.getppid()}.part-abc", "of a living process")
    other = folder(tmp_path / f".other.{GONE}.part-abc", "of another target")
    half = tmp_path / f".model.{GONE}.part-file"
    half.write_text("half")
    with scratch_beside(tmp_path / "model"):
        assert not left.exists()
        assert not half.exists()
    assert all(path.exists() for path in (mine, alive, other))


def test_names_that_look_like_patterns(tmp_path: Path) -> None:
    other = folder(tmp_path / f".a.{GONE}.part-abc", "of another target")
    write_atomically(tmp_path / "[a-z]", "text")
    assert other.exists()
    assert (tmp_path / "[a-z]").read_text() == "text"


def test_processes_append_at_the_same_time(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from shrinkformer.utils.files import append_atomically\n"
    code += "for n in range(20): append_atomically(Path(sys.argv[1]), f'{sys.argv[2]} {n}\\n')"
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "log"), str(writer)], cwd=ROOT)
        for writer in range(3)
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    append_atomically(tmp_path / "log", "the last\n")
    lines = (tmp_path / "log").read_text().splitlines()
    assert sorted(lines[:-1]) == sorted(f"{writer} {number}" for writer in range(3) for number in range(20))
    assert lines[-1] == "the last"


HOLDER = """
import sys, time
from pathlib import Path
from shrinkformer.utils.locks import exclusive
with exclusive(Path(sys.argv[1]), "--output_dir x"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_process_at_a_time_and_a_kill_frees_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / ".mine.lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], cwd=ROOT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(InputError, match=rf"--output_dir output: another run \(process {holder.pid}\)"),
            exclusive(lock, "--output_dir output"),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
    assert lock.exists()
    with exclusive(lock, "--output_dir output"):
        assert lock.exists()
    assert not lock.exists()
