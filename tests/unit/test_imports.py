"""The house rules, held against every import and every call in the package.

Imports point down: adapters > operations > engine > storage, format > extent, errors. `format` and `storage` do not
know each other. What belongs to one place only is in the tables below.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "qcow2_plugin"
PLUGIN = ROOT / "nbdkit_plugin.py"
MODULES = [*sorted(PACKAGE.rglob("*.py")), PLUGIN]

MAY_IMPORT = {
    "errors": set(),
    "extent": {"errors"},
    "format": {"errors", "extent", "format"},
    "storage": {"errors", "extent", "storage"},
    "engine": {"errors", "extent", "format", "storage", "engine"},
    "operations": {"errors", "extent", "format", "storage", "engine", "operations"},
    "adapters": {"errors", "extent", "format", "storage", "engine", "operations", "adapters", "__init__"},
    "__init__": {"errors", "extent", "format", "storage", "engine", "operations"},
    "__main__": {"adapters"},
    "testing": {"errors", "storage", "adapters"},
}
HOMES_OF_LIBRARIES = {
    "numpy": ("format", "engine"),
    "pluggy": ("adapters/backup",),
    "nbdkit": ("nbdkit_plugin.py",),
    "guestfs": ("adapters/guestfs",),
    "isal": ("engine",),
    "blake3": ("engine", "operations"),
    "zstandard": ("engine",),
    "obstore": ("adapters/backup/targets",),
    "argparse": ("adapters/cli", "__main__.py"),
    "fcntl": ("storage",),
    "hypothesis": (),
    "pytest": (),
}
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "sys.argv"}
DATA_CALLS = {"open", "io.open", "mmap.mmap"} | {
    f"os.{name}"
    for name in [
        *("open", "openat", "close", "read", "write", "pread", "pwrite", "preadv", "pwritev", "readv", "writev"),
        *("lseek", "fstat", "ftruncate", "truncate", "fsync", "fdatasync", "posix_fadvise", "posix_fallocate"),
        *("copy_file_range", "sendfile", "dup", "dup2", "lockf", "fdopen", "memfd_create"),
    ]
}
PATH_CALLS = {"read_bytes", "read_text", "write_bytes", "write_text"}


def place(path: Path) -> str:
    """The module by its path inside the package, or inside the project."""
    return str(path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT))


def layer(path: Path) -> str:
    return Path(place(path)).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of the modules (and what is taken from them) that a module imports anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def used(tree: ast.AST) -> set[str]:
    """Dotted names that a module uses, those that it took with `from` under their full name."""
    names = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name)}
    return names | set(imported(tree))


@pytest.fixture(params=MODULES, ids=place)
def module(request: pytest.FixtureRequest) -> tuple[Path, ast.Module]:
    path: Path = request.param
    return path, ast.parse(path.read_text())


def test_the_package_is_found() -> None:
    assert {layer(path) for path in MODULES} >= {"errors", "extent", "format", "storage", "engine", "nbdkit_plugin"}
    assert len(MODULES) > 20


def test_imports_point_down(module: tuple[Path, ast.Module]) -> None:
    path, tree = module
    own = [name.split(".") for name in imported(tree) if name.split(".")[0] == "qcow2_plugin"]
    if path == PLUGIN:
        assert {tuple(parts[:2]) for parts in own} <= {("qcow2_plugin", "adapters")}
        return
    for parts in own:
        home = [*parts, "__init__"][1]
        if layer(path) == "adapters" and not ((PACKAGE / home).is_dir() or (PACKAGE / f"{home}.py").exists()):
            continue  # a public name
        assert home in MAY_IMPORT[layer(path)], f"{place(path)} imports {'.'.join(parts)}"


@pytest.mark.parametrize("library", HOMES_OF_LIBRARIES)
def test_libraries_are_used_at_home_only(library: str) -> None:
    for path in MODULES:
        if library in {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}:
            assert place(path).startswith(HOMES_OF_LIBRARIES[library]), f"{place(path)} imports {library}"


def test_only_known_libraries_are_used(module: tuple[Path, ast.Module]) -> None:
    path, tree = module
    roots = {name.split(".")[0] for name in imported(tree)}
    assert roots <= {*sys.stdlib_module_names, "qcow2_plugin", *HOMES_OF_LIBRARIES}, place(path)


def test_environment_and_arguments_are_read_at_the_edge_only(module: tuple[Path, ast.Module]) -> None:
    path, tree = module
    if not place(path).startswith(("adapters/cli", "nbdkit_plugin.py", "__main__.py")):
        assert not used(tree) & ENVIRONMENT, place(path)


def test_data_system_calls_are_made_by_storage_only(module: tuple[Path, ast.Module]) -> None:
    path, tree = module
    if layer(path) == "storage" or place(path).startswith("adapters/cli"):  # the cli has its own stdout and sockets
        return
    calls = {dotted(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not (calls | set(imported(tree))) & DATA_CALLS, place(path)
    assert not {name.rpartition(".")[2] for name in calls} & PATH_CALLS, place(path)


def test_formats_are_pure(module: tuple[Path, ast.Module]) -> None:
    path, tree = module
    if layer(path) == "format":
        impure = {"os", "io", "time", "datetime", "threading", "logging", "random", "socket", "subprocess", "pathlib"}
        assert not {name.split(".")[0] for name in imported(tree)} & impure, place(path)


def test_every_module_says_what_it_is(module: tuple[Path, ast.Module]) -> None:
    assert ast.get_docstring(module[1]), place(module[0])


def test_no_module_has_two_jobs(module: tuple[Path, ast.Module]) -> None:
    assert len(module[0].read_text().splitlines()) <= 550, place(module[0])


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("from os import preadv", DATA_CALLS),
        ("import os\nos.pread(1, 2, 3)", DATA_CALLS),
        ("open('x')", DATA_CALLS),
        ("import os\nos.environ['X']", ENVIRONMENT),
        ("from sys import argv", ENVIRONMENT),
        ("def inner():\n    from os import getenv", ENVIRONMENT),
    ],
)
def test_the_rules_see_what_they_forbid(source: str, rule: set[str]) -> None:
    assert used(ast.parse(source)) & rule
