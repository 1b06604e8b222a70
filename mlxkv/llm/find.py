"""Find models that fit this machine: on the hub, or without a network among known ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxkv.base import device
from mlxkv.base.units import human_bytes, parse_bytes
from mlxkv.errors import DownloadError, MlxkvError, ModelNotFound
from mlxkv.store import hub_catalog

if TYPE_CHECKING:
    from mlxkv.store.hub_search import Hit

CONTEXT = 8192
"""Tokens that a model must have room for to count as one that fits."""
MOST = 10
Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Fitting:
    """A model that fits.

    Attributes:
        weights_bytes: of its files.
        total_bytes: what it needs at `context` tokens, see `memory.plan.Plan`.
        is_estimate: whether that is a rounded figure, not the plan's.
    """

    name: str
    model_type: str
    weights_bytes: int
    total_bytes: int
    context: int
    limit_bytes: int
    is_estimate: bool


@dataclass(frozen=True, slots=True)
class Search:
    """What was found.

    Attributes:
        fitting: the largest first, `MOST` at most.
        offline: why the hub was not asked; "" where it was.
    """

    fitting: tuple[Fitting, ...]
    limit_bytes: int
    context: int
    offline: str


def find(
    words: Sequence[str],
    memory: str | int | None = None,
    context: int = CONTEXT,
    report: Report = lambda label, done, total: None,
) -> Search:
    """Models whose names have all these words and that fit, the largest first.

    Args:
        words: all must be in the name.
        memory: limit ("16GiB", bytes); None for what the machine allows.
        context: tokens of the one sequence that must fit.
        report: called with what is being done.

    Raises:
        ModelNotFound: no model has these words, or none of them fits.
        DownloadError: the hub answers with an error.
    """
    from mlxkv.store.hub_search import search

    limit = parse_bytes(memory) or device.memory_limit()
    report("searching", 0, 0)
    try:
        hits, offline = search(words), ""
    except DownloadError as error:
        hits, offline = [], str(error)
    if offline:
        sizes = [(model.name, model.needs(context)) for model in hub_catalog.matching(words)]
        fitting = _known_that_fit(words, context, limit)
    else:
        hits.sort(key=lambda hit: hit.weights_bytes, reverse=True)
        sizes = [(hit.name, hit.weights_bytes) for hit in hits]
        fitting = _planned(
            [hit for hit in hits if hit.weights_bytes < limit], context, limit, report
        )
    if not fitting:
        raise _nothing(words, sizes, limit, offline)
    fitting.sort(key=lambda each: each.total_bytes, reverse=True)
    return Search(tuple(fitting[:MOST]), limit, context, offline)


def _known_that_fit(words: Sequence[str], context: int, limit: int) -> list[Fitting]:
    return [
        Fitting(m.name, m.model_type, m.weights_bytes, m.needs(context), context, limit, True)
        for m in hub_catalog.matching(words)
        if m.needs(context) <= limit
    ]


def _planned(hits: Sequence[Hit], context: int, limit: int, report: Report) -> list[Fitting]:
    """Plan models from headers until enough fit; those that cannot be planned are left out."""
    from mlxkv.llm.plan import plan

    found = list[Fitting]()
    for hit in hits:
        if len(found) == MOST:
            break
        report(f"planning {hit.name}", 0, 0)
        try:
            needs = plan(hit.name, context, memory=limit)
        except MlxkvError:
            continue
        if needs.fits:
            weights, total = needs.weights_bytes, needs.total_bytes
            found.append(Fitting(hit.name, hit.model_type, weights, total, context, limit, False))
    return found


def _nothing(
    words: Sequence[str], sizes: Sequence[tuple[str, int]], limit: int, offline: str
) -> ModelNotFound:
    text = " ".join(words)
    if not sizes:
        known = f" among the known ones (the hub was not asked: {offline})" if offline else ""
        return ModelNotFound(f"no model that mlxkv runs has {text!r} in its name{known}")
    name, n_bytes = min(sizes, key=lambda each: each[1])
    return ModelNotFound(
        f"nothing with {text!r} in its name fits in {human_bytes(limit)}: of {len(sizes)} found, "
        f"the smallest is {name} with {human_bytes(n_bytes)}"
    )
