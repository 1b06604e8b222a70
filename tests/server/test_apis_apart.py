"""What APIs share lives in the core of server/: no API imports another's modules."""

from __future__ import annotations

from tests.test_rooms import MODULES, all_imports

APIS = {"openai", "anthropic", "ollama"}


def api_of(dotted: str) -> str | None:
    """`mlxkv.server.openai.chat` -> `openai`; None outside of the APIs."""
    parts = dotted.split(".")
    return (
        parts[2] if parts[:2] == ["mlxkv", "server"] and parts[2:3] and parts[2] in APIS else None
    )


def test_no_api_imports_another():
    assert {api_of(dotted) for dotted in MODULES} == {None, *APIS}
    across = [
        f"{one.line}: {one.importer} imports {one.imported}"
        for one in all_imports()
        if {None, api_of(one.importer)} & {api_of(one.imported)} == set()
        and api_of(one.importer) is not None
    ]
    assert across == []


def test_the_core_imports_an_api_only_to_mount_it():
    importers = {
        one.importer
        for one in all_imports()
        if api_of(one.importer) is None
        and one.importer.startswith("mlxkv.server.")
        and api_of(one.imported) is not None
    }
    assert importers == {"mlxkv.server.app"}
