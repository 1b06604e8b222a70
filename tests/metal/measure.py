"""Counts everything on one side and prints it as JSON: a process of its own, which it patches.

    python -m tests.metal.measure FOLDER SIDE [NAME...]

FOLDER keeps the compiled shim, SIDE is `mlxkv` or `mlx-lm`, and NAMEs choose models.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.metal import shim
from tests.metal.hollow import take_gpu_branches

Figures = dict[str, dict[str, dict[str, Any]]]
"""figure -> model -> case -> value."""


def measure(side_name: str, names: list[str]) -> Figures:
    """All figures of a side; those of mlx-lm's definitions only where mlx-lm is installed."""
    from tests.metal import cases

    side = cases.Ours() if side_name == "mlxkv" else cases.Theirs()
    figures: Figures = {}
    for figure, model, case, value in _all(side, names):
        figures.setdefault(figure, {}).setdefault(model, {})[case] = value
    return figures


def _all(side: Any, names: list[str]) -> Iterator[tuple[str, str, str, Any]]:
    from tests.metal import cases, theirs

    for name in cases.MODELS:
        if not names or name in names:
            yield from cases.of_model(side, name)
            if name == "llama-3.1-8b":
                yield from cases.of_mixed_lengths(side, name)
                if isinstance(side, cases.Ours):
                    yield from cases.of_joining(side, name)
                    yield from cases.of_adapters(side, name)
    for name in cases.PICTURES if isinstance(side, cases.Ours) else ():
        if not names or name in names:
            yield from cases.of_picture(name)
    for name in cases.FOREIGN if theirs.installed() else ():
        if not names or name in names:
            yield from cases.of_foreign_model(side, name)
    for V in cases.VOCABULARIES:
        if not names or "sampling" in names:
            yield from cases.of_sampling(side, V)


if __name__ == "__main__":
    folder, side_name, *names = sys.argv[1:]
    shim.install(Path(folder))
    take_gpu_branches()
    json.dump(measure(side_name, names), sys.stdout)
