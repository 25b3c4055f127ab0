"""The layout rules of the project: links, names, which way imports point, file sizes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "shrinkformer"
LINKS = ("prune", "quantize", "evaluate", "efficiency", "dataset", "utils")
SCRIPTS = ("prune_bert.py", "prune_opt.py", "quantize_bert.py", "quantize_opt.py", "opt_eval.py")

RANKS = {
    "errors": 0,
    "architectures": 1,
    "trust": 1,
    "utils": 2,
    "pictures": 3,
    "dataset": 3,
    "efficiency": 3,
    "export": 3,
    "prune": 4,
    "quantize": 5,
    "evaluate": 6,
    "commands": 7,
    "api": 8,
    "__main__": 8,
}
"""A module may import from its own part of the package and from parts of a lower rank."""

MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [
    path
    for folder in ("shrinkformer", "tests", "benchmarks", "prerequisites", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
] + sorted(ROOT.glob("*.py"))


def name_of(path):
    return str(path.relative_to(ROOT))


def imports(path):
    """Dotted name and ``as`` name of everything that a file imports; for ``from a import b`` both ``a`` and ``a.b``."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, alias.asname) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.module, None))
            found += [(f"{node.module}.{alias.name}", None) for alias in node.names]
    return found


def part_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_evaluate_is_a_namespace():
    assert not list((PACKAGE / "evaluate").rglob("__init__.py"))


@pytest.mark.parametrize("name", LINKS)
def test_the_asked_for_names_are_links_into_the_package(name):
    link = ROOT / name
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == PACKAGE / name


def test_import_evaluate_at_the_root_is_hugging_faces():
    program = "import evaluate; print(evaluate.__file__); evaluate.EvaluationModule"
    command = [sys.executable, "-c", program]  # -c puts the working directory first on sys.path
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert "site-packages" in result.stdout
    assert str(PACKAGE) not in result.stdout


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path):
    if path == PACKAGE / "__init__.py":
        return
    part = part_of(path)
    assert part in RANKS, f"a new part of the package, {part}: give it a rank in this test"
    for name, _ in imports(path):
        pieces = name.split(".")
        if pieces[0] == "shrinkformer" and len(pieces) > 1 and pieces[1] in RANKS and pieces[1] != part:
            assert RANKS[pieces[1]] < RANKS[part], f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_part_is_imported_by_its_short_name(path):
    for name, alias in imports(path):
        top = name.partition(".")[0]
        if name == "evaluate" and alias == "hf_evaluate":
            continue
        assert top not in LINKS, (
            f"{name_of(path)} imports {name}; write shrinkformer.{name} (or evaluate as hf_evaluate)"
        )


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_are_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    limit = 500  # 300 is usual; a file reads as one thing
    assert lines < limit, f"{name_of(path)} has {lines} lines, the limit is {limit}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_entry_scripts_are_thin(name):
    script = ROOT / name
    if not script.exists():
        pytest.skip(f"{name} is not there yet")
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 8
