"""Values that took long to find, on disk as soon as they are found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from shrinkformer.utils.files import write_atomically
from shrinkformer.utils.work_time import work_seconds

Value = TypeVar("Value")


class Journal:
    """Values by name, one JSON line each. What an interrupted run found is taken up instead of found again.

    Floats keep every bit. A line that a kill or a full disk tore is forgotten, with all behind it.

    Args:
        file: Where the lines are; None keeps nothing.
        writes: Whether this process writes new ones; of several processes one does.
    """

    def __init__(self, file: Path | None = None, *, writes: bool = True) -> None:
        self._file, self._writes = file, writes
        self._known: dict[str, tuple[Any, float]] = {}
        self.spared = 0.0
        """Seconds of work that it took to find what was taken up: limits in time hold for both runs together."""
        if file is not None and file.exists():
            self._read(file)

    @property
    def names(self) -> list[str]:
        """Of what an earlier run left."""
        return list(self._known)

    def value(self, name: str, find: Callable[[], Value]) -> Value:
        """A value that is known, or found now.

        Args:
            name: Of the value; the same name stands for the same value.
            find: Finds it: a number, or what else JSON holds.
        """
        if name in self._known:
            value, seconds = self._known[name]
            self.spared += seconds
            known: Value = value
            return known
        began = work_seconds()
        found = find()
        self.note(name, found, work_seconds() - began)
        return found

    def known(self, name: str) -> Any:
        """What an earlier run noted under a name, or None."""
        return self._known[name][0] if name in self._known else None

    def note(self, name: str, value: Any, seconds: float = 0.0) -> None:
        """Keep a value for later runs, and how long it took to find it."""
        if self._file is None or not self._writes:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "value": value, "seconds": round(seconds, 3)}) + "\n")

    def keep_only(self, *prefixes: str) -> None:
        """Forget all values but those whose names begin with one of some prefixes."""
        self._keep(lambda name: name.startswith(prefixes))

    def drop(self, *prefixes: str) -> None:
        """Forget all values whose names begin with one of some prefixes."""
        self._keep(lambda name: not name.startswith(prefixes))

    def _keep(self, wanted: Callable[[str], bool]) -> None:
        self._known = {name: entry for name, entry in self._known.items() if wanted(name)}
        if self._file is not None and self._writes and self._file.exists():
            lines = self._file.read_text(encoding="utf-8").splitlines(keepends=True)
            write_atomically(self._file, "".join(line for line in lines if wanted(json.loads(line)["name"])))

    def _read(self, path: Path) -> None:
        whole = []
        for line in path.read_bytes().split(b"\n")[:-1]:  # what no line end follows was torn
            try:
                entry = json.loads(line)
                name, seconds = _checked(entry["name"], str), _checked(entry["seconds"], int | float)
                self._known[name] = entry["value"], float(seconds)
            except (ValueError, TypeError, KeyError):
                break
            whole.append(line + b"\n")
        if self._writes and sum(map(len, whole)) < path.stat().st_size:
            write_atomically(path, b"".join(whole))


def _checked(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is not what a journal holds")
    return value
