"""What a run has finished, on disk: nothing of it is computed twice, and nothing foreign is taken up."""

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

import shrinkformer
from shrinkformer.errors import InputError
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.dependencies import (
    ALL_STORED,
    BLOCKS,
    FINISHED,
    MOMENTS,
    QUANTIZED,
    RUN,
    Stored,
    fatal,
    useless,
)
from shrinkformer.prune.resume import BlockFiles, BlockStore, WeightFiles
from shrinkformer.utils.files import write_atomically
from shrinkformer.utils.journal import Journal

IDENTITY_FILE, VALUES_FILE = "identity.json", "values.jsonl"
_MOMENTS, _QUANTIZED = "moments", "quantized"
"""Below the folder for data, and there below that of a budget; all other folders of a budget hold refitted blocks."""

Files = TypeVar("Files", bound=BlockFiles)


class Ledger:
    """A folder with what a run has found so far.

    Args:
        folder: Where it is; None keeps nothing.
        data: Where weights and moments go, in a folder of their own that disappears in the end; by default there too.
        identity: All that the results depend on, each with a name that a user knows.
        resume: Take up what is there and does not depend on facts that changed
            (:mod:`~shrinkformer.prune.dependencies`); otherwise it is deleted.
        writes: Whether this process writes; of several processes one does.

    Attributes:
        earlier: Facts of the run that was there before, whether or not it is taken up.
        news: What differs from the interrupted run, and what is therefore found again, in one line; "" if nothing.

    Raises:
        InputError: What is there belongs to something else.
    """

    def __init__(
        self,
        folder: Path | None = None,
        identity: Mapping[str, str] | None = None,
        *,
        data: Path | None = None,
        resume: bool = False,
        writes: bool = True,
    ) -> None:
        self.folder = folder
        self.data = folder / "blocks" if folder is not None and data is None else data
        self.news = ""
        self.earlier: Mapping[str, str] = {}
        self._identity = dict(identity or {})
        self._writes = writes
        if folder is not None and writes:
            self._begin(folder, resume)
        self.values = Journal(None if folder is None else folder / VALUES_FILE, writes=writes)

    def key(self, stored: Stored) -> str:
        """Digest of all that something depends on."""
        facts = {name: fact for name, fact in self._identity.items() if name in stored.facts or fatal([name])}
        text = json.dumps(facts, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def moments(self) -> BlockStore | None:
        """The second moments of finished blocks."""
        return None if self.data is None else BlockStore(self.data / _MOMENTS, self.key(MOMENTS))

    def blocks(self, budget: Budget, model: str) -> WeightFiles | None:
        """The weights of finished blocks of one of the models that are made for a budget."""
        folder = self._of(budget)
        return None if folder is None else WeightFiles(folder / _as_file_name(model), self.key(BLOCKS))

    def quantized(self, kind: Callable[..., Files], budget: Budget, asked: str = "") -> Files | None:
        """Files of quantized blocks.

        Args:
            kind: A kind of :class:`~shrinkformer.prune.resume.BlockFiles`.
            budget: What the blocks are for.
            asked: What they depend on beside all that the ledger knows.

        Raises:
            InputError: What is there depends on something else.
        """
        folder = self._of(budget)
        return None if folder is None else kind(folder / _QUANTIZED, self.key(QUANTIZED) + asked)

    def forget(self, budget: Budget) -> None:
        """Delete the blocks of a budget whose result is saved."""
        folder = self._of(budget)
        if folder is not None and self._writes:
            shutil.rmtree(folder, ignore_errors=True)

    def finished(self, budget: Budget) -> Any:
        """What :meth:`finish` was told of a budget, by an interrupted run; None if it is not finished."""
        return self.values.known(f"{FINISHED.names}{name_of(budget)}")

    def finish(self, budget: Budget, result: Mapping[str, str]) -> None:
        """Note that the result of a budget is saved and reported; its blocks are deleted."""
        self.values.note(f"{FINISHED.names}{name_of(budget)}", dict(result))
        self.forget(budget)

    def settle(self) -> None:
        """At the end of a run: keep only which budgets are finished, and the name of the run that reported them."""
        if self.data is not None and self._writes:
            shutil.rmtree(self.data, ignore_errors=True)
            self.values.keep_only(FINISHED.names, RUN.names)

    def clear(self) -> None:
        """Delete everything; what says whose it is goes first, so that the rest is never taken up."""
        if self.folder is not None and self.data is not None and self._writes:
            (self.folder / IDENTITY_FILE).unlink(missing_ok=True)
            shutil.rmtree(self.data, ignore_errors=True)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _of(self, budget: Budget) -> Path | None:
        return None if self.data is None else self.data / name_of(budget)

    def _folders(self, stored: Stored) -> list[Path]:
        """Where things are that are kept in files, those of all budgets."""
        assert self.data is not None
        if stored is MOMENTS:
            return [self.data / _MOMENTS]
        of_budgets = [path for path in self.data.glob("mu*/*") if stored in (BLOCKS, QUANTIZED)]
        return [path for path in of_budgets if (path.name == _QUANTIZED) == (stored is QUANTIZED)]

    def _begin(self, folder: Path, resume: bool) -> None:
        file = folder / IDENTITY_FILE
        if not resume:
            self.earlier = self._earlier(file) if _is_readable(file) else {}
            self.clear()
        if not file.exists():  # nothing is there, or something whose origin nobody knows
            self.clear()
        else:
            self._drop(folder, self._earlier(file))
        write_atomically(file, json.dumps(self._identity, indent=2) + "\n")

    def _earlier(self, file: Path) -> dict[str, str]:
        """The identity of the interrupted run."""
        try:
            return {str(name): str(fact) for name, fact in dict(json.loads(file.read_bytes())).items()}
        except (ValueError, TypeError):
            raise InputError(f"--resume: {file} cannot be read; leave --resume out to start anew.") from None

    def _drop(self, folder: Path, earlier: Mapping[str, str]) -> None:
        """Delete what depends on facts that changed, before the new facts are written."""
        changed = [name for name in {**earlier, **self._identity} if earlier.get(name) != self._identity.get(name)]
        if not changed:
            return
        strange = fatal(changed)
        if strange:
            shown = " and ".join(_difference(name, earlier, self._identity) for name in strange)
            raise InputError(
                f"--resume: {folder} was begun with {shown}; "
                "repeat the earlier command exactly, or leave --resume out to start anew."
            )
        gone = useless(changed)
        for stored in gone:
            for path in self._folders(stored):
                shutil.rmtree(path, ignore_errors=True)
        Journal(folder / VALUES_FILE).drop(*(stored.names for stored in gone if stored.names))
        shown = " and ".join(_difference(name, earlier, self._identity) for name in changed)
        again = ", ".join(stored.words for stored in gone if stored is not RUN)
        rest = "" if len(gone) == len(ALL_STORED) else "; the rest is taken up"
        self.news = f"--resume: begun with {shown}, so these are found anew: {again}{rest}"


def _is_readable(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_bytes()), dict)
    except (OSError, ValueError, RecursionError):
        return False


def _difference(name: str, earlier: Mapping[str, str], now: Mapping[str, str]) -> str:
    if name.startswith("--") or name in _PACKAGES:
        return f"{name} {earlier.get(name)} (now {now.get(name)})"
    return f"other {name}"


def name_of(budget: Budget) -> str:
    """A short name of a budget that no other has."""
    return f"mu{budget.amount}-{hashlib.blake2b(repr(budget).encode(), digest_size=4).hexdigest()}"


def _as_file_name(name: str) -> str:
    return "".join(character if character.isalnum() or character in "-." else "-" for character in name)


_PACKAGES = ("torch", "transformers")


@cache
def code_identity() -> dict[str, str]:
    """Versions of what computes: other code may give other bits."""
    digest = hashlib.blake2b(digest_size=16)
    folder = Path(shrinkformer.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return {
        f"code of shrinkformer {importlib.metadata.version('shrinkformer')}": digest.hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
