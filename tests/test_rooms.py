"""The house keeps its order: imports point down only. docs/design.md says what each room is for.

Every import counts: those for type checkers, and those inside functions.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.paths import ROOT

ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "base": {"errors"},
    "kv": {"base"},
    "cache": {"kv"},
    "checkpoint": {"base", "kv"},
    "cpu": {"base"},
    "nn": {"cpu", "cache", "kv", "checkpoint", "base"},
    "models": {"nn", "cache", "kv", "checkpoint", "base"},
    "media": {"base"},
    "chat": set(),
    "text": {"chat", "base"},
    "parsers": {"text", "chat"},
    "sampling": {"parsers", "text", "checkpoint", "nn", "base"},
    "prefix": {"kv", "checkpoint", "base"},
    "convert": {"models", "nn", "text", "checkpoint", "base"},
    "store": {"convert", "models", "sampling", "checkpoint", "kv", "base"},
    "saved_kv": {"media", "prefix", "base"},
    "memory": {"media", "prefix", "models", "nn", "cache", "kv", "base"},
    "generation": {"memory", "media", "saved_kv", "prefix", "sampling", "parsers", "text", "chat",
                   "nn", "cache", "kv", "checkpoint", "base"},
    "engine": {"generation", "store", "saved_kv", "memory", "media", "prefix", "models", "nn",
               "sampling", "parsers", "text", "chat", "kv", "base"},
    "llm": {"engine", "generation", "store", "saved_kv", "memory", "media", "prefix", "models",
            "parsers", "text", "chat", "kv", "checkpoint", "base"},
    "server": {"engine", "generation", "store", "sampling", "parsers", "text", "media", "base"},
    "terminal": {"llm", "server", "generation", "store", "saved_kv", "memory", "prefix",
                 "sampling", "parsers", "chat", "media", "base"},
    "launch": {"server", "store", "base"},
    "bench": {"terminal", "llm", "engine", "generation", "store", "memory", "prefix", "models",
              "nn", "sampling", "parsers", "text", "checkpoint", "kv", "base"},
    "commands": {"bench", "launch", "terminal", "server", "llm", "engine", "generation",
                 "saved_kv", "store", "convert", "text", "media", "kv", "base"},
    "cli": {"commands"},
    "mlxkv": {"llm", "models", "memory", "cache", "generation", "base"},
    "__main__": {"cli"},
}  # fmt: skip
"""Room -> what it may import besides itself and `errors`: rooms above it in this table."""


@dataclass(frozen=True)
class Import:
    """One import of a module of ours by another, by their dotted names."""

    importer: str
    imported: str
    line: str
    deferred: bool

    @property
    def rooms(self) -> tuple[str, str]:
        """Of the importer and of the imported."""
        return room_of(self.importer), room_of(self.imported)


def module_files() -> dict[str, Path]:
    """Dotted name -> file of every module."""
    found = {}
    for package, folder in (("mlxkv", ROOT / "mlxkv"), ("mlxkv.convert", ROOT / "convert")):
        for file in sorted(folder.rglob("*.py")):
            parts = [*package.split("."), *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


MODULES = module_files()


def room_of(dotted: str) -> str:
    """`mlxkv.models.llama` -> `models`; the package itself is `mlxkv`."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else "mlxkv"


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports_in(
    node: ast.AST, deferred: bool = False
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Import statements, and whether they run only when a function is called, or never."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            continue  # most of a file, and none of it imports
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        inside = deferred or is_function or is_type_checking(child)
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, inside
        yield from imports_in(child, inside)


@functools.cache
def imports_of(file: Path) -> tuple[tuple[ast.Import | ast.ImportFrom, bool], ...]:
    return tuple(imports_in(ast.parse(file.read_text())))


def imported_names(node: ast.Import | ast.ImportFrom, dotted: str, is_package: bool) -> list[str]:
    """The modules of ours that an import statement means."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        base = node.module or ""
        if node.level:
            parent = dotted.split(".")
            parent = parent[: len(parent) - node.level + is_package]
            base = ".".join([*parent, base] if base else parent)
        full = [f"{base}.{alias.name}" for alias in node.names]
        names = [name if name in MODULES else base for name in full]
    return [name for name in names if name in MODULES]


@functools.cache
def all_imports() -> tuple[Import, ...]:
    """Of every module; some seconds, which no worker takes at collection."""
    found = []
    for dotted, file in MODULES.items():
        is_package = file.name == "__init__.py"
        for node, deferred in imports_of(file):
            for name in imported_names(node, dotted, is_package):
                if name != dotted:
                    where = f"{file.relative_to(ROOT)}:{node.lineno}"
                    found.append(Import(dotted, name, where, deferred))
    return tuple(found)


def test_every_room_is_in_the_table():
    assert {room_of(dotted) for dotted in MODULES} == ROOMS.keys()


def test_the_table_itself_points_one_way():
    order = list(ROOMS)
    for room, allowed in ROOMS.items():
        for below in allowed - {"__version__"}:
            assert order.index(below) < order.index(room), f"{room} -> {below}"


def test_imports_point_down_only():
    up = []
    for one in all_imports():
        importer, imported = one.rooms
        is_version = imported == "mlxkv"  # __version__ alone, which is a constant
        if importer != imported and imported not in {"errors", *ROOMS[importer]} and not is_version:
            up.append(f"{one.line}: {one.importer} imports {one.imported}")
    assert up == []


def test_no_two_modules_import_each_other_over_any_way():
    graph: dict[str, set[str]] = {}
    for one in all_imports():
        graph.setdefault(one.importer, set()).add(one.imported)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join((*path, module))}"
        if module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_what_a_room_may_import_it_does_import():
    used: dict[str, set[str]] = {room: set() for room in ROOMS}
    for one in all_imports():
        importer, imported = one.rooms
        used[importer].add(imported)
    unused = {room: allowed - used[room] for room, allowed in ROOMS.items()}
    assert {room: names for room, names in unused.items() if names} == {}


def test_no_file_is_longer_than_400_lines():
    long = {str(file.relative_to(ROOT)): n for file in MODULES.values()
            if (n := len(file.read_text().splitlines())) > 400}  # fmt: skip
    assert long == {}


def test_each_room_says_what_lives_there():
    for dotted, file in MODULES.items():
        if file.name == "__init__.py":
            assert ast.get_docstring(ast.parse(file.read_text())), dotted


def test_the_package_itself_imports_only_what_is_light():
    direct = {one.rooms[1] for one in all_imports() if one.importer == "mlxkv" and not one.deferred}
    assert direct <= {"base", "errors"}


@pytest.mark.parametrize(
    "heavy",
    [
        "mlx.core",
        "numpy",
        "transformers",
        "torch",
        "tokenizers",
        "fastapi",
        "pydantic",
        "llguidance",
    ],
)
def test_importing_mlxkv_and_its_cli_loads_nothing_heavy(heavy):
    code = f"import sys, mlxkv, mlxkv.cli; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def top_level_names(file: Path) -> Iterator[tuple[str, int]]:
    for node, _ in imports_of(file):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for name in names:
            yield name.split(".")[0], node.lineno


def test_torch_and_transformers_are_for_the_oracle_alone():
    found = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in MODULES.values()
        for name, line in top_level_names(file)
        if name in {"torch", "transformers"}
    ]
    assert found == []


def test_mlx_lm_is_imported_only_where_it_lends_an_architecture_or_is_measured():
    users = {
        str(file.relative_to(ROOT))
        for file in MODULES.values()
        for name, _ in top_level_names(file)
        if name == "mlx_lm"
    }
    assert users <= {"mlxkv/models/foreign.py", "mlxkv/bench/engines.py"}


def test_only_device_loads_shared_libraries():
    users = {
        room_of(dotted) for dotted, file in MODULES.items() for name, _ in top_level_names(file)
        if name == "ctypes"
    }  # fmt: skip
    assert users <= {"base"}


def test_only_the_switch_and_doctor_know_of_the_kernels():
    users = {one.importer for one in all_imports() if one.rooms[1] == "cpu" != one.rooms[0]}
    assert users == {"mlxkv.nn.kernels"}


def test_every_package_is_in_the_wheel():
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = set(tomllib.load(file)["tool"]["setuptools"]["packages"])
    assert listed == {name for name, file in MODULES.items() if file.name == "__init__.py"}
