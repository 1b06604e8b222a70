"""The house keeps its order: imports point down only. The order is docs/design.md's.

A module that is not in the table fails the test: give it a place.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.paths import ROOT

LAYERS = (
    ("errors", "device", "steps", "durable", "time_machine"),
    ("cache", "kv_types", "kv_format", "slots", "batch"),
    ("config", "quantization", "weights"),
    ("rope", "linear", "stacking", "moe", "attention", "layers"),
    ("models",),
    ("loader", "tokenizer", "tokenizer_files", "detokenizer", "chat", "parsing", "parsers",
     "sandbox", "sampling_params", "sampling_math", "sampling", "logprobs", "stopping",
     "grammar", "grammar_calls", "grammar_gate", "grammar_native", "grammar_text", "grammar_values",
     "json_schema", "catalog", "names", "terminal", "page_format", "fingerprint",
     "workspace", "step_bound", "settings", "memory"),
    ("generate", "session", "decoder", "overflow", "planner", "budget", "pages", "page_cutter",
     "page_links", "page_part", "page_ram",
     "page_disk", "page_files", "page_folder", "page_room", "kv_names", "named_kv", "hub",
     "hub_headers", "wheels", "store", "copies", "card", "plan_card"),
    ("llm", "conversation", "chunks", "answer", "turn", "saved_prefix", "asks",
     "prompt_order", "serving", "loaded_models", "engine"),
    ("convert", "server"),
    ("cli", "repl", "run", "commands", "doctor", "figures", "kv_cli", "kv_card", "kv_sources",
     "run_cli", "serve_cli", "verify", "speaker", "local", "remote", "client", "bench"),
)  # fmt: skip
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

DEFERRED = {
    ("store", "convert"): "pulling a GGUF file converts it",
    ("copies", "convert"): "a model made of another may be packed",
}
"""Imports inside a function that may point up, and why."""


@dataclass(frozen=True)
class Import:
    """One import of a module of ours by another."""

    importer: str
    imported: str
    line: str
    deferred: bool


def module_files() -> Iterator[tuple[str, str, Path]]:
    """(unit of the table, dotted name, file) of every module."""
    for package, folder in (("mlxkv", ROOT / "mlxkv"), ("mlxkv.convert", ROOT / "convert")):
        for file in sorted(folder.rglob("*.py")):
            parts = [*package.split("."), *file.relative_to(folder).with_suffix("").parts]
            dotted = ".".join(parts).removesuffix(".__init__")
            yield unit_of(dotted), dotted, file


def unit_of(dotted: str) -> str:
    """`mlxkv.models.llama` -> `models`; the package itself is `mlxkv`."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else "mlxkv"


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports_in(
    node: ast.AST, deferred: bool = False
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Import statements that run, and whether only when a function is called."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        inside = deferred or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, inside
        yield from imports_in(child, inside)


def imported_names(node: ast.Import | ast.ImportFrom, dotted: str, is_package: bool) -> list[str]:
    """Dotted names that an import statement may mean, absolute."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        parent = dotted.split(".")
        parent = parent[: len(parent) - node.level + is_package]
        base = ".".join([*parent, base] if base else parent)
    return [f"{base}.{alias.name}" for alias in node.names] if base == "mlxkv" else [base]


def all_imports() -> list[Import]:
    found = []
    for unit, dotted, file in module_files():
        is_package = file.name == "__init__.py"
        for node, deferred in imports_in(ast.parse(file.read_text())):
            for name in imported_names(node, dotted, is_package):
                target = unit_of(name)
                ours = name.startswith("mlxkv.") and not target.startswith("__")
                if ours and target != unit:
                    where = f"{file.relative_to(ROOT)}:{node.lineno}"
                    found.append(Import(unit, target, where, deferred))
    return found


IMPORTS = all_imports()


def test_every_module_has_a_layer():
    units = {unit for unit, _, _ in module_files()} - {"mlxkv", "__main__"}
    assert units - LEVEL.keys() == set(), "put it into LAYERS"


def test_imports_point_down_or_sideways_only():
    upward = [
        f"{i.line}: {i.importer} (layer {LEVEL[i.importer]}) imports "
        f"{i.imported} (layer {LEVEL[i.imported]})"
        for i in IMPORTS
        if i.importer in LEVEL
        and LEVEL.get(i.imported, 0) > LEVEL[i.importer]
        and not (i.deferred and (i.importer, i.imported) in DEFERRED)
    ]
    assert upward == []


def test_every_deferred_import_that_may_point_up_is_still_there():
    used = {(i.importer, i.imported) for i in IMPORTS if i.deferred}
    assert DEFERRED.keys() - used == set()


def test_modules_that_import_each_other_do_so_in_one_direction():
    graph: dict[str, set[str]] = {}
    for i in IMPORTS:
        if not i.deferred:
            graph.setdefault(i.importer, set()).add(i.imported)
    done: set[str] = set()

    def visit(unit: str, path: tuple[str, ...]) -> None:
        assert unit not in path, f"a circle: {' -> '.join((*path, unit))}"
        if unit not in done:
            for target in sorted(graph.get(unit, ())):
                visit(target, (*path, unit))
            done.add(unit)

    for unit in sorted(graph):
        visit(unit, ())


def test_the_package_itself_imports_only_what_is_light():
    direct = {i.imported for i in IMPORTS if i.importer == "mlxkv" and not i.deferred}
    assert direct <= {"device", "errors"}


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
    for node, _ in imports_in(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for name in names:
            yield name.split(".")[0], node.lineno


def test_torch_and_transformers_are_for_the_oracle_alone():
    found = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for _, _, file in module_files()
        for name, line in top_level_names(file)
        if name in {"torch", "transformers"}
    ]
    assert found == []


def test_mlx_lm_is_imported_only_where_it_lends_an_architecture_or_is_measured():
    users = {
        str(file.relative_to(ROOT))
        for _, _, file in module_files()
        for name, _ in top_level_names(file)
        if name == "mlx_lm"
    }
    assert users <= {"mlxkv/models/foreign.py", "mlxkv/bench/engines.py"}


def test_only_device_loads_shared_libraries():
    users = {
        unit for unit, _, file in module_files() for name, _ in top_level_names(file)
        if name == "ctypes"
    }  # fmt: skip
    assert users <= {"device", "time_machine"}  # the latter asks the C library, which is loaded


def test_every_package_is_in_the_wheel():
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = set(tomllib.load(file)["tool"]["setuptools"]["packages"])
    folders = {init.parent for init in (ROOT / "mlxkv").rglob("__init__.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert listed == names | {"mlxkv.convert"}
