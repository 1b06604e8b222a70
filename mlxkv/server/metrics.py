"""Monitoring: `/metrics` for Prometheus, `/stats.json`, and the page at `/`."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mlxkv.base.seal import seal_of_environment
from mlxkv.engine.messages import ClientCounts, Counts, Engine
from mlxkv.server.config import ServerConfig
from mlxkv.server.requests import whose_figures
from mlxkv.server.threads import run_in_threadpool

_OUTCOMES = ("answered", "failed", "cancelled")
_TOKENS = (
    "prompt",
    "restored_ram",
    "restored_ssd",
    "computed",
    "upper",
    "generated",
    "next_turn",
    "next_turn_used",
)


class EngineCollector(Collector):
    """Reads the engine's metrics at each scrape.

    A model's counters restart at 0 when it is loaded again, like those of a restarted server.

    Args:
        engine: has them.
        owner: whose figures are read; None for all owners' together.
    """

    def __init__(self, engine: Engine, owner: str | None = None):
        self._engine, self._owner = engine, owner

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats(self._owner)
        yield from _metrics_of_models(stats.models)
        yield _counter(
            "mlxkv_client_tokens",
            "Prompt tokens of a client, by kind.",
            ("client", "kind"),
            _client_tokens(stats.clients),
        )
        yield GaugeMetricFamily("mlxkv_running", "Requests that are running.", stats.running)
        yield GaugeMetricFamily("mlxkv_queued", "Requests waiting in the queue.", stats.queued)
        yield CounterMetricFamily(
            "mlxkv_rejected", "Requests rejected because the queue was full.", stats.rejected
        )
        memory = GaugeMetricFamily(
            "mlxkv_memory_bytes",
            "Memory by kind. mlxkv counts weights, kv_* and pages; MLX reports active, cached and "
            "peak, which include them.",
            labels=["kind"],
        )
        for kind, n_bytes in stats.memory.items():
            memory.add_metric([kind], n_bytes)
        yield memory


def _metrics_of_models(models: Mapping[str, Counts]) -> Iterator[Metric]:
    yield _counter(
        "mlxkv_requests",
        "Finished requests, by outcome.",
        ("model", "outcome"),
        {
            (model, outcome): getattr(counts, outcome)
            for model, counts in models.items()
            for outcome in _OUTCOMES
        },
    )
    yield _counter(
        "mlxkv_tokens",
        "Tokens by kind. Prompt tokens are restored from RAM or SSD, or computed; upper: those "
        "computed of which an adapter's layers alone were; next_turn: computed before the prompt "
        "came; next_turn_used: those that a prompt had.",
        ("model", "kind"),
        {
            (model, kind): getattr(counts, f"{kind}_tokens")
            for model, counts in models.items()
            for kind in _TOKENS
        },
    )
    yield _counter(
        "mlxkv_next_turn_saved_seconds",
        "Seconds that prompts took less because of next_turn tokens, estimated from the speed "
        "at which those were computed.",
        ("model",),
        {(model,): counts.next_turn_saved_s for model, counts in models.items()},
    )
    yield _counter(
        "mlxkv_fetched_bytes",
        "Bytes of pages that had been read from disk when a prompt needed them.",
        ("model",),
        {(model,): counts.fetched_bytes for model, counts in models.items()},
    )
    yield _counter(
        "mlxkv_fetch_saved_seconds",
        "Seconds that reading those took, and that their prompts did not.",
        ("model",),
        {(model,): counts.fetch_saved_s for model, counts in models.items()},
    )
    yield _counter(
        "mlxkv_misses",
        "Prompts that reused less KV than a cached sequence offered, by reason.",
        ("model", "reason"),
        {(model, why): n for model, counts in models.items() for why, n in counts.misses.items()},
    )
    yield from _draft_metrics(models)


def _draft_metrics(models: Mapping[str, Counts]) -> Iterator[Metric]:
    yield _counter(
        "mlxkv_draft_passes",
        "Steps that computed drafted tokens, summed over answers.",
        ("model",),
        {(model,): counts.draft_passes for model, counts in models.items()},
    )
    yield _counter(
        "mlxkv_draft_tokens",
        "Drafted tokens by drafter: proposed, and accepted of those.",
        ("model", "drafter", "kind"),
        {
            (model, drafter, kind): n
            for model, counts in models.items()
            for kind, of in (
                ("proposed", counts.drafted_tokens),
                ("accepted", counts.accepted_tokens),
            )
            for drafter, n in of.items()
        },
    )


def _counter(
    name: str, what: str, labels: Sequence[str], values: Mapping[tuple[str, ...], float]
) -> Metric:
    """A counter, with a value for each combination of labels."""
    family = CounterMetricFamily(name, what, labels=labels)
    for of_labels, value in values.items():
        family.add_metric(of_labels, value)
    return family


def router(engine: Engine, config: ServerConfig) -> APIRouter:
    """The routes for monitoring."""
    routes = APIRouter(tags=["watching"])
    registries: dict[str | None, CollectorRegistry] = {}

    def registry_of(owner: str | None) -> CollectorRegistry:
        if owner not in registries:
            registries[owner] = CollectorRegistry()
            registries[owner].register(EngineCollector(engine, owner))
        return registries[owner]

    page = files("mlxkv.server").joinpath("page.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": _policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @routes.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Metrics in Prometheus' text format: of the engine; with several API keys, of the key."""
        registry = registry_of(whose_figures(request))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/stats.json")
    async def stats(request: Request) -> Response:
        """The same metrics as JSON, with the models in memory and the API key's clients."""
        owner, whose = request.state.owner, whose_figures(request)
        shown = await run_in_threadpool(_shown, engine, owner, whose)  # scans the KV folder
        return JSONResponse(shown, headers={"Cache-Control": "no-store"})

    @routes.head("/", include_in_schema=False)
    @routes.get("/")
    async def watch() -> Response:
        """A page that shows the metrics live."""
        return HTMLResponse(page, headers=headers)

    return routes


def _client_tokens(clients: Iterable[ClientCounts]) -> dict[tuple[str, ...], int]:
    """Tokens of each client's prompts by kind, of all owners together."""
    found: dict[tuple[str, ...], int] = {}
    for counts in clients:
        for kind in ("restored", "computed", "next_turn", "next_turn_used"):
            key = counts.client, kind
            found[key] = found.get(key, 0) + getattr(counts, f"{kind}_tokens")
    return found


def _client(counts: ClientCounts) -> dict[str, Any]:
    shown = dataclasses.asdict(counts)
    del shown["owner"]
    return shown


def _shown(engine: Engine, owner: str, whose: str | None) -> dict[str, Any]:
    """The metrics with their time, from which clients compute rates.

    Args:
        engine: has them.
        owner: whose clients are shown: they come with texts of prompts.
        whose: owner of the figures; None for all owners' together.
    """
    stats = engine.stats(whose)
    loaded = {model.name: dataclasses.asdict(model) for model in engine.loaded(whose)}
    for model in loaded.values():
        del model["name"], model["path"]
        model["until"] = model["until"] and model["until"].isoformat()
    return {
        "time_s": time.time(),
        "alive": engine.alive,
        "restarts": engine.restarts,
        "running": stats.running,
        "queued": stats.queued,
        "rejected": stats.rejected,
        "memory": stats.memory,
        "asleep": dict(stats.asleep),
        "kv_encrypted": seal_of_environment().is_on,
        "models": {
            name: {"counts": dataclasses.asdict(counts), "loaded": loaded.get(name)}
            for name, counts in stats.models.items()
        },
        "clients": [_client(counts) for counts in stats.clients if counts.owner == owner],
    }


def _policy(page: str) -> str:
    """A Content-Security-Policy that allows the page's own script, style and server only."""

    def hashed(tag: str) -> str:
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()

    return (
        f"default-src 'none'; script-src 'sha256-{hashed('script')}'; "
        f"style-src 'sha256-{hashed('style')}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
