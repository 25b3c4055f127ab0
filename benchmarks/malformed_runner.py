"""Run damaged inputs, each in a process of its own, and see how they end."""

import importlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

GIB = 2**30
MEMORY, SECONDS = 12 * GIB, 60
"""Address space (torch and its libraries alone take 4 GiB of it) and time of a case."""

CANARY = "canary"
"""File that code in an input writes, in the folder of its case."""

_TRACEBACK = 70


@dataclass(frozen=True)
class Case:
    """One damaged input.

    Attributes:
        name: Says what was changed.
        kind: Row of the table.
        base: Valid input that is damaged.
        command: That gets it.
        change: Damages the copy of the base in a folder.
        reason: Why it is malformed, or why a command may accept it.
        arguments: Of the command, in place of the usual ones.
    """

    name: str
    kind: str
    base: str
    command: str
    change: Callable[[Path], object]
    reason: str = ""
    arguments: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Ending:
    """How a case ended.

    Attributes:
        case: The case.
        code: Exit code; 0 where the command accepted the input.
        said: What it wrote to standard error.
        executed: Whether code of the input ran.
        touched: Files that changed outside of ``output``.
        seconds: It took.
        memory: Bytes at most.
    """

    case: Case
    code: int
    said: str
    executed: bool
    touched: list[str] = field(default_factory=list)
    seconds: float = 0.0
    memory: int = 0

    @property
    def accepted(self) -> bool:
        """Whether the change made no difference."""
        offline = self.case.command == "push" and "HF_HUB_OFFLINE" in self.said  # all files were checked before that
        return self.code == 0 or offline

    @property
    def traceback(self) -> bool:
        """Whether an error came through as it was."""
        return "Traceback" in self.said or self.code == _TRACEBACK

    @property
    def one_line(self) -> bool:
        """Whether it said what is wrong in one line."""
        return len([line for line in self.said.splitlines() if line.strip()]) == 1

    @property
    def unforeseen(self) -> bool:
        """Whether it reached the last resort."""
        return ": error: unforeseen " in self.said

    @property
    def killed(self) -> bool:
        """Whether it crashed or ran out of time."""
        return self.code < 0

    @property
    def right(self) -> bool:
        """Whether it is as it should be."""
        clean = not (self.executed or self.touched or self.traceback or self.killed or self.unforeseen)
        return clean and (self.accepted or (self.code in {1, 2} and self.one_line))


def run_case(case: Case, bases: Path, scratch: Path) -> Ending:
    """Run one case in a process of its own."""
    folder = Path(tempfile.mkdtemp(dir=scratch, prefix="case-"))
    shutil.copytree(bases / case.base, folder, dirs_exist_ok=True)
    for name in ("output", "home", "tmp"):
        (folder / name).mkdir()
    case.change(folder)
    before, began = _snapshot(folder), time.perf_counter()
    child = os.fork()
    if child == 0:
        _run_here(case, folder)
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - began
    said = (folder / "stderr").read_text(encoding="utf-8", errors="replace")
    executed = any((folder / name).exists() for name in (CANARY, f"model/{CANARY}"))
    after = _snapshot(folder)
    touched = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    shutil.rmtree(folder, ignore_errors=True)
    code = os.waitstatus_to_exitcode(status)
    return Ending(case, code, said, executed, touched, seconds, usage.ru_maxrss * 1024)


def _run_here(case: Case, folder: Path) -> None:
    """Become the command; never returns."""
    code = _TRACEBACK
    try:
        with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as errors:
            os.dup2(out.fileno(), 1)
            os.dup2(errors.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", errors="backslashreplace")  # a test has others
        os.chdir(folder)
        os.environ.update(HOME=str(folder / "home"), TMPDIR=str(folder / "tmp"))
        tempfile.tempdir = None
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        code = _call(case)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _call(case: Case) -> int:
    """What the user would have typed."""
    from benchmarks.malformed_bases import arguments_of
    from shrinkformer.commands import main, opt_eval, prune_bert, prune_opt, quantize_bert, quantize_opt

    arguments = list(case.arguments) if case.arguments is not None else arguments_of(case.base, case.command)
    scripts = {
        "prune_bert": prune_bert,
        "prune_opt": prune_opt,
        "opt_eval": opt_eval,
        "quantize_bert": quantize_bert,
        "quantize_opt": quantize_opt,
    }
    if case.command in scripts:
        code: int = scripts[case.command].main(arguments)
        return code
    return _load(arguments[0]) if case.command == "load" else main.main([case.command, *arguments])


def _load(folder: str) -> int:
    """``shrinkformer.load`` as a program would call it; an error of ours is one line."""
    import shrinkformer
    from shrinkformer.errors import ShrinkformerError

    try:
        shrinkformer.load(folder)
    except ShrinkformerError as error:
        print(f"load: error: {error}", file=sys.stderr)
        return 1
    return 0


_CACHES = ("/hub/metrics/", "/hub/modules/", "/home/.cache/Microsoft/", "/tmp/.ses")

_OWN = {"output", "stdout", "stderr", CANARY}


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file of a case, and of what lies beside it, but those that it may write.

    Caches that libraries keep for themselves are left out: those of ``evaluate``, and counters of onnxruntime.
    """
    files = [path for entry in folder.iterdir() if entry.name not in _OWN for path in [entry, *entry.rglob("*")]]
    beside = [path for path in folder.parent.iterdir() if not path.name.startswith("case-")]
    files += [path for entry in beside for path in [entry, *entry.rglob("*")]]
    stats = {str(path): path.lstat() for path in files if path.is_symlink() or not path.is_dir()}
    found = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
    return {name: stat for name, stat in found.items() if not any(cache in name for cache in _CACHES)}


def prepare(folder: Path) -> Path:
    """Make the bases in a process of its own, so that no threads are there when this one forks; their folder."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            from benchmarks.malformed_bases import make_bases

            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            make_bases(folder / "bases")
            code = 0
        finally:
            os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        raise RuntimeError("the valid bases could not be made")
    return folder / "bases"


def import_all() -> None:
    """Import once what every case needs, so that a fork is quick."""
    for name in ("prune_bert", "prune_opt", "opt_eval", "quantize_bert", "quantize_opt", "facts", "latency", "export"):
        importlib.import_module(f"shrinkformer.commands.{name}")
    importlib.import_module("pyarrow.parquet")
    importlib.import_module("pyarrow.csv")
    import transformers

    from benchmarks.malformed_bases import MODELS

    for _, model_class, _ in MODELS.values():
        getattr(transformers, model_class)  # imported when they are asked for


def run_all(
    choose: Callable[[Path], Sequence[Case]], folder: Path, tell: Callable[[Ending], object] = lambda _ending: None
) -> list[Ending]:
    """Run cases one after the other.

    Args:
        choose: The cases, given the folder of the bases.
        folder: Where their folders go; empty.
        tell: Called with every ending.
    """
    (folder / "scratch").mkdir()
    os.environ["HF_HOME"] = str(folder / "scratch" / "hub")  # watched like everything beside a case
    import_all()
    bases = prepare(folder)
    endings = []
    for case in choose(bases):
        endings.append(run_case(case, bases, folder / "scratch"))
        tell(endings[-1])
    return endings
