"""The counts that hold, in goldens.json: of mlxkv, and beside them mlx-lm's of the same.

    figure -> model -> case -> {"mlxkv": value, "mlx-lm": value}

A value is a number, or numbers by name; less is better in all of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

PATH = Path(__file__).with_name("goldens.json")
OURS, THEIRS = "mlxkv", "mlx-lm"

Value = int | dict[str, int]
Key = tuple[str, str, str]
"""(figure, model, case)"""


@dataclass(frozen=True)
class Goldens:
    """What was counted.

    Args:
        versions: of MLX and mlx-lm.
        sides: `mlxkv` and `mlx-lm` -> values.
    """

    versions: Mapping[str, str]
    sides: Mapping[str, Mapping[Key, Value]]


def read(path: Path = PATH) -> Goldens:
    """The goldens of a file."""
    raw = json.loads(path.read_text())
    sides: dict[str, dict[Key, Value]] = {OURS: {}, THEIRS: {}}
    for key, by_side in _flat(raw["figures"]):
        for side, value in by_side.items():
            sides[side][key] = value
    return Goldens(raw["versions"], sides)


def write(goldens: Goldens, path: Path = PATH) -> None:
    """Write a file, sorted, a line for each case."""
    nested: dict[str, dict[str, dict[str, str]]] = {}
    for key in sorted({key for values in goldens.sides.values() for key in values}):
        figure, model, case = key
        sides = {side: values[key] for side, values in goldens.sides.items() if key in values}
        nested.setdefault(figure, {}).setdefault(model, {})[case] = json.dumps(sides)
    figures = _block(
        {
            figure: _block({model: _block(cases, 6) for model, cases in models.items()}, 4)
            for figure, models in nested.items()
        },
        2,
    )
    versions = json.dumps(dict(sorted(goldens.versions.items())))
    path.write_text(_block({"versions": versions, "figures": figures}, 0) + "\n")


def _block(entries: Mapping[str, str], indent: int) -> str:
    lines = ",\n".join(f"{' ' * indent}  {json.dumps(k)}: {v}" for k, v in entries.items())
    return f"{{\n{lines}\n{' ' * indent}}}"


def measured(side: str, folder: Path) -> dict[Key, Value]:
    """Count one side now, in a process of its own.

    Args:
        side: `OURS` or `THEIRS`.
        folder: where the compiled shim is kept.
    """
    command = [sys.executable, "-m", "tests.metal.measure", str(folder), side]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(_flat(json.loads(done.stdout)))


def _flat(nested: Mapping[str, Any]) -> Iterator[tuple[Key, Any]]:
    for figure, models in nested.items():
        for model, cases in models.items():
            for case, value in cases.items():
                yield (figure, model, case), value


def worse(now: Value | None, golden: Value | None) -> list[str]:
    """What has grown, or is counted for the first time: `48 -> 50` or `AsType [.., 1]: 0 -> 2`."""
    return [text for text, grown in _changes(now, golden) if grown]


def better(now: Value | None, golden: Value | None) -> list[str]:
    """What has become less, or is not counted any more."""
    return [text for text, grown in _changes(now, golden) if not grown]


def _changes(now: Value | None, golden: Value | None) -> Iterator[tuple[str, bool]]:
    if isinstance(now, int) or isinstance(golden, int):
        if now != golden:
            grown = golden is None or (now is not None and _number(now) > _number(golden))
            yield f"{golden} -> {now}", grown
        return
    before, after = golden or {}, now or {}
    for name in sorted(before.keys() | after.keys()):
        a, b = before.get(name, 0), after.get(name, 0)
        if a != b:
            yield f"{name}: {a} -> {b}", b > a


def _number(value: Value) -> int:
    assert isinstance(value, int)
    return value
