"""What to type for a missing package: this one is on no index, so that its extras are named by where it came from."""

import importlib.metadata
import re
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def how_to_install(extra: str) -> str:
    """The command that installs what an extra needs, for how this package is installed.

    From a clone that is the extra of the clone. A wheel is not there any more once it is installed, so then the
    packages of the extra are named one by one.

    Args:
        extra: Of pyproject.toml, such as ``export``.

    >>> how_to_install("export")   # doctest: +SKIP
    'pip install -e "/home/me/shrinkformer[export]"'
    """
    if (_ROOT / "pyproject.toml").is_file():
        return f'pip install -e "{_ROOT}[{extra}]"'
    return "pip install " + " ".join(f'"{package}"' for package in packages_of(extra))


def packages_of(extra: str) -> list[str]:
    """Packages of an extra, from the metadata of what is installed; the extra itself where there is none."""
    try:
        every = importlib.metadata.requires("shrinkformer") or []
    except importlib.metadata.PackageNotFoundError:
        every = []
    wanted = re.compile(rf"""extra *== *['"]{re.escape(extra)}['"]""")
    found = [line.partition(";")[0].strip() for line in every if wanted.search(line)]
    return found or [f"shrinkformer[{extra}]"]
