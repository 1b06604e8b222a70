"""The report of a run: one dict for the file, for `--json` and for the table.

It names a model only if the name is public, and contains no path, user, host or prompt.
"""

from __future__ import annotations

import getpass
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlxkv.base.durable import write_whole
from mlxkv.bench.cases import Case, Skipped
from mlxkv.bench.engines import Timing
from mlxkv.bench.rounds import Rounds
from mlxkv.checkpoint.mlxkv_json import read_record
from mlxkv.errors import OutputError
from mlxkv.store.info import Card
from mlxkv.store.refs import CatalogRef, HubRef, locate

FORMAT = "mlxkv bench 1"


@dataclass(frozen=True, slots=True)
class Spread:
    """The figures of all runs of one measure."""

    median: float
    min: float
    max: float
    runs: tuple[float, ...]

    @classmethod
    def of(cls, runs: Sequence[float], digits: int) -> Spread:
        """Of one or more runs, rounded."""
        rounded = tuple(round(value, digits) for value in runs)
        median = round(statistics.median(runs), digits)
        return cls(median, min(rounded), max(rounded), rounded)


def build(
    *,
    machine: dict[str, Any],
    model: dict[str, Any],
    settings: dict[str, Any],
    cases: Sequence[Case],
    engines: Sequence[str],
    rounds: Rounds,
    skipped: Sequence[Skipped],
    complete: bool,
) -> dict[str, Any]:
    """The report, without cases that have no measurement."""
    results = [
        _result(case, engine, rounds.timings[case, engine])
        for case in cases
        for engine in engines
        if (case, engine) in rounds.timings
    ]
    return {
        "format": FORMAT,
        "complete": complete,
        **machine,
        "model": model,
        "settings": settings | {"dtypes": rounds.dtypes},
        "results": results,
        "skipped": [asdict(entry) for entry in [*skipped, *rounds.skipped]],
        "unusable": {engine: failure.kind for engine, failure in rounds.unusable.items()},
    }


def _result(case: Case, engine: str, timings: Sequence[Timing]) -> dict[str, Any]:
    figures = {
        "prefill_tps": Spread.of([t.n_prompt / t.first_s for t in timings], 2),
        "decode_tps": Spread.of([t.n_decoded / t.decode_s for t in timings], 2),
        "first_token_s": Spread.of([t.first_s for t in timings], 4),
        "peak_bytes": Spread.of([t.peak_bytes for t in timings], 0),
    }
    return {
        "context": case.context,
        "batch": case.batch,
        "engine": engine,
        "prompt_tokens": case.n_prompt,
        "used_tokens": case.n_used,
        "timed_steps": case.n_timed,
        "plan_bytes": case.plan_bytes,
        **{name: asdict(spread) for name, spread in figures.items()},
    }


def model_facts(name: str, card: Card) -> dict[str, Any]:
    """A model's sizes, and its name if that is public."""
    return {
        "name": public_name(name, card.path),
        "model_type": card.family,
        "parameters": card.parameters,
        "quantization": card.quantization,
        "bits_per_weight": round(card.bits_per_weight, 3),
        "context": card.context,
        "shape": dict(card.config),
    }


def public_name(name: str, path: Path) -> str | None:
    """A built-in model's name, or a repository's; None for a model that the user made or named."""
    ref, record = locate(name), read_record(path)
    found = None
    if isinstance(ref, CatalogRef):
        found = ref.model.name
    elif isinstance(ref, HubRef):
        found = ref.name
    elif record is not None and record.source in ("hub", "wheel"):
        found = record.name
    owner = found.partition("/")[0] if found and "/" in found else ""
    return None if owner and owner.lower() == _user().lower() else found


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return ""


def default_path(report_machine: dict[str, Any], model: dict[str, Any]) -> Path:
    """`mlxkv-bench-<chip>-<model>.json` in the current folder, numbered if that exists."""
    size = f"{model['model_type']}-{model['parameters'] / 1e6:.0f}m"
    words = (report_machine["chip"], model["name"] or f"{size}-{model['quantization']}")
    return free_path("mlxkv-bench", *words)


def free_path(*words: str) -> Path:
    """A JSON file named by words in the current folder, numbered if that exists."""
    stem = "-".join(_slug(word) for word in words)
    path, n = Path(f"{stem}.json"), 2
    while path.exists():
        path, n = Path(f"{stem}-{n}.json"), n + 1
    return path


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "unknown"


def check_writable(path: Path) -> None:
    """Raise OutputError for a path that cannot be written, before anything is measured."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file", field="report")
    existed = path.exists()
    try:
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}; name another file", field="report") from error


def write(report: dict[str, Any], path: Path) -> None:
    """Write the report file, or raise OutputError."""
    try:
        write_whole(path, json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}", field="report") from error
