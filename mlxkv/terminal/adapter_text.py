"""An adapter for people, and as JSON."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from mlxkv.base.units import human_bytes

if TYPE_CHECKING:
    from mlxkv.store.adapters import Adapter

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def text(adapter: Adapter, weight: float = 1.0) -> str:
    """One fact a line.

    Args:
        adapter: what is shown.
        weight: that its model is loaded with.
    """
    facts = to_dict(adapter)
    projections = [f"{name} x {n}" for name, n in facts["projections"].items()]
    layers = facts["layers"]
    rows = [
        ("format", facts["format"]),
        ("method", facts["method"]),
        ("base", facts["base"] or "not named"),
        ("rank", ", ".join(map(str, facts["ranks"]))),
        ("size", human_bytes(facts["bytes"])),
        ("changes", ", ".join(projections)),
        ("layers", f"{layers[0]} to {layers[-1]}, {len(layers)} of them" if layers else "none"),
        ("path", facts["path"]),
        *([] if weight == 1 else [("weight", f"{weight:g}")]),
    ]
    return "\n".join(f"{key:<9} {value}" for key, value in rows)


def to_dict(adapter: Adapter) -> dict[str, Any]:
    """As JSON has it: `projections` counts the targets by their last name."""
    layers = {int(match[1]) for path in adapter.targets if (match := _LAYER.search(path))}
    names = Counter(path.rpartition(".")[2] for path in adapter.targets)
    return {
        "path": adapter.source,
        "format": adapter.format,
        "method": adapter.method,
        "base": adapter.base,
        "ranks": list(adapter.ranks),
        "bytes": adapter.nbytes,
        "projections": dict(sorted(names.items())),
        "layers": sorted(layers),
        "digest": adapter.digest,
    }
