"""Small changes that hostile inputs are made of."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = tuple[str, str, str, str, Callable[[Path], object], str]
"""Kind, name, base, command, change and reason of a case."""

DEEP = "[" * 100_000 + "]" * 100_000


def change_json(name: str, **changes: Any) -> Callable[[Path], None]:
    """Other values of some keys of a JSON file of the model."""

    def change(folder: Path) -> None:
        file = folder / "model" / name
        old = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(old | changes))

    return change


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    """A file with other content."""

    def change(folder: Path) -> None:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def all_of(*changes: Callable[[Path], object]) -> Callable[[Path], None]:
    """Several changes."""

    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def link(name: str, target: str) -> Callable[[Path], None]:
    """A link in the place of a file."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def moved(pattern: str) -> Callable[[Path], None]:
    """A file of the model lies outside of it, and a link leads there."""

    def change(folder: Path) -> None:
        (folder / "secret").mkdir()
        name = next((folder / "model").glob(pattern)).relative_to(folder / "model").as_posix()
        shutil.move(folder / "model" / name, folder / "secret" / Path(name).name)
        (folder / "model" / name).symlink_to(folder / "secret" / Path(name).name)

    return change
