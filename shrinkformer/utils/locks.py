"""One process at a time; a lock ends with the process that holds it, however that ends."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shrinkformer.errors import InputError

try:
    import fcntl
except ImportError:  # not POSIX: nothing is locked
    fcntl = None  # type: ignore[assignment]

_HELD_ELSEWHERE = (errno.EACCES, errno.EAGAIN)


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder; False where another process holds it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _HELD_ELSEWHERE  # a file system without locks: as before there were any
    return True


@contextmanager
def folder_locked(folder: Path) -> Iterator[None]:
    """Wait until no other process changes a folder in this way."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno == errno.EINTR:
                raise
        yield
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(file: Path, flag: str) -> Iterator[None]:
    """Be the only process that holds a lock file, which disappears afterwards.

    Args:
        file: The lock file.
        flag: How the user can get out of the way, with its value.

    Raises:
        InputError: Another process holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _take(file, flag)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _take(file: Path, flag: str) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        if not try_lock(descriptor):
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise InputError(
                f"{flag}: another run (process {holder}) is writing there ({file}); wait until it is over or choose "
                "another folder."
            )
        if file.exists() and os.stat(file).st_ino == os.fstat(descriptor).st_ino:
            return descriptor
        os.close(descriptor)  # the run that held it has just removed it
