"""Files and folders that are either whole or not there."""

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from shrinkformer.utils.locks import folder_locked, try_lock

_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE of linux/fs.h and AT_FDCWD of fcntl.h


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, so that a reader, or a crash, never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path))
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def append_atomically(path: Path, text: str) -> None:
    """Append to a text file; all of ``text`` arrives or none of it, and no line of another process is lost."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with folder_locked(path.parent):
        before = path.read_bytes() if path.exists() else b""
        write_atomically(path, before + text.encode())


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A new folder beside the target, which takes its place when everything went well, and otherwise disappears.

    The target is there at every moment: the old one, then the new one. What a killed process left is swept away.
    """
    with scratch_beside(target) as scratch:
        folder = scratch / target.name
        folder.mkdir()
        yield folder
        _sync(folder)
        if not target.exists():
            os.replace(folder, target)
        elif not _exchange(folder, target):  # a moment without a target
            os.replace(target, scratch / "replaced")
            os.replace(folder, target)


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A folder for what becomes a file or folder of some name; it disappears, if not now then in the next run."""
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=_prefix(target)))
    descriptor = os.open(scratch, os.O_RDONLY)
    try_lock(descriptor)
    try:
        yield scratch
    finally:
        os.close(descriptor)
        shutil.rmtree(scratch, ignore_errors=True)


def sweep(path: Path) -> None:
    """Delete what processes that were killed left beside a path that they were about to write."""
    for left in path.parent.glob(f".{escape(path.name)}.*.part-*"):
        if _is_orphan(left):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _prefix(path: Path) -> str:
    return f".{path.name}.{os.getpid()}.part-"


def _is_orphan(left: Path) -> bool:
    process = left.name.removesuffix(left.suffix).rpartition(".")[2]
    if not process.isdigit() or int(process) == os.getpid() or _is_alive(int(process)):
        return False
    try:
        descriptor = os.open(left, os.O_RDONLY)
    except OSError:  # another process was faster
        return False
    try:
        return try_lock(descriptor)  # a process of this number may live on another machine
    finally:
        os.close(descriptor)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(folder: Path) -> None:
    """Wait until the files of a folder are on the disk: a power cut after the renaming must not empty them."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places at once; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
