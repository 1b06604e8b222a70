"""Models: GET /api/tags, /api/ps and /api/version, POST /api/show."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

import mlxkv
from mlxkv.base.units import human_count
from mlxkv.engine.messages import Engine, Loaded
from mlxkv.errors import MlxkvError
from mlxkv.sampling.params import recommended
from mlxkv.server.config import ServerConfig
from mlxkv.server.fields import NoEffect
from mlxkv.server.ignored import note
from mlxkv.server.json_route import JSONRoute
from mlxkv.server.model_names import LocalModel, adapted, context_of, listed, present
from mlxkv.server.ollama.fields import Named
from mlxkv.server.requests import whose_figures
from mlxkv.server.threads import run_in_threadpool
from mlxkv.store import info, resolve
from mlxkv.store.adapter_names import SIGN
from mlxkv.store.info import Card
from mlxkv.store.library import StoredModel
from mlxkv.text.tokenizer_files import ModelFiles, read_chat_template

FOR_EVER = "9999-12-31T23:59:59Z"
_SENSES = {"image": "vision", "audio": "audio"}
"""Kinds of media, as Ollama calls what a model is capable of."""
_SWITCHES = frozenset({"enable_thinking", "thinking", "reasoning_effort"})


OLLAMA_VERSION = "0.21.2"
"""Clients ask for one: Codex from 0.13.4 on, VS Code's Copilot from 0.6.4 on."""


class ShowRequest(Named):
    """A model to describe."""

    verbose: Annotated[bool | None, NoEffect()] = None


class Cards:
    """Cards of models, read again when a model's config.json changes."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, int], Card | None] = {}

    def of(self, name: str, path: Path) -> Card | None:
        """A model's card; None if it cannot be read."""
        try:
            key = path, (path / "config.json").stat().st_mtime_ns
            if key not in self._known:
                self._known[key] = info.describe(name, path)
            return self._known[key]
        except (OSError, MlxkvError):
            return None


def router(engine: Engine, config: ServerConfig) -> APIRouter:
    """The routes for models."""
    routes = APIRouter(route_class=JSONRoute, tags=["ollama"])
    cards = Cards()

    @routes.get("/api/version")
    async def version() -> Response:
        """The version of Ollama whose API this is, and mlxkv's own."""
        return JSONResponse({"version": OLLAMA_VERSION, "mlxkv": mlxkv.__version__})

    @routes.get("/api/tags")
    async def tags() -> Response:
        """The models on this machine."""
        return JSONResponse({"models": await run_in_threadpool(_rows, cards, config)})

    @routes.get("/api/ps")
    async def ps(request: Request) -> Response:
        """The models in memory; with several API keys, the KV and sequences of the key."""
        owner = whose_figures(request)
        found = await run_in_threadpool(engine.loaded, owner)  # scans the KV folder
        rows = [row for each in found for row in (_loaded(each), *_adapters(each))]
        return JSONResponse({"models": rows})

    @routes.post("/api/show")
    async def show(request: Request, body: ShowRequest) -> Response:
        """All about one model."""
        note(request, body)
        model = await present(engine, config, body.model_name)
        return JSONResponse(await run_in_threadpool(_shown, body.model_name, model, config))

    return routes


def _rows(cards: Cards, config: ServerConfig) -> list[dict[str, Any]]:
    models = listed(config)
    found = {model.name: _row(cards, model) for model in models}
    for model, base in adapted(models):
        row = found[base.name]
        details = row["details"] | {"parent_model": base.name}
        own = {"name": model.name, "model": model.name, "size": model.size_bytes}
        found[model.name] = row | own | {"details": details}
    return list(found.values())


def _row(cards: Cards, model: StoredModel) -> dict[str, Any]:
    known = cards.of(model.name, model.path)
    parameters = human_count(known.parameters) if known else ""
    return {
        "name": model.name,
        "model": model.name,
        "modified_at": _modified(model.path),
        "size": model.size_bytes,
        "digest": info.digest(model.path),
        "details": _details(model.family, parameters, model.quantization),
    }


def _details(family: str, parameters: str, quantization: str) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": parameters,
        "quantization_level": quantization,
    }


def _modified(path: Path) -> str:
    try:
        seconds = max(file.stat().st_mtime for file in path.iterdir())
    except (OSError, ValueError):
        seconds = 0.0
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _loaded(model: Loaded) -> dict[str, Any]:
    until = FOR_EVER if model.until is None else model.until.isoformat()
    return {
        "name": model.name,
        "model": model.name,
        "size": model.size_bytes,
        "digest": model.digest,
        "details": _details(model.family, human_count(model.parameters), model.quantization),
        "expires_at": until,
        "size_vram": 0 if "cpu" in model.device.lower() else model.size_bytes,
        "context_length": model.context,
        "memory": {
            "weights": model.weights_bytes,
            "kv_used": model.kv_used_bytes,
            "kv_allocated": model.kv_allocated_bytes,
            "kv_max": model.kv_max_bytes,
            "pages_ram": model.pages_ram_bytes,
            "pages_ssd": model.pages_ssd_bytes,
        },
        "sequences": model.n_sequences,
        "asleep": model.n_asleep,
        "kv_type": model.kv_type,
    }


def _adapters(model: Loaded) -> list[dict[str, Any]]:
    """A row for each set of adapters that requests have brought into memory beside a model."""
    rows, whole = [], _loaded(model)
    for adapter, n_bytes in model.adapters:
        name = f"{model.name}{SIGN}{adapter}"
        own = {"name": name, "model": name, "size": n_bytes}
        own["size_vram"] = n_bytes if whole["size_vram"] else 0
        own["details"] = whole["details"] | {"parent_model": model.name}
        kept = ("digest", "expires_at", "context_length", "kv_type")
        rows.append({key: whole[key] for key in kept} | own)
    return rows


def _shown(asked: str, model: LocalModel, config: ServerConfig) -> dict[str, Any]:
    name = model.name
    path = model.path or resolve.resolve(name, fetch=False)
    about = info.describe(name, path)
    template = read_chat_template(ModelFiles(path), {})
    source = template.source if template else ""
    capabilities = ["embedding" if about.dimensions else "completion"]
    if template is not None:
        capabilities += ["tools"] if "tools" in template.variables else []
        thinks = _SWITCHES & template.variables or "</think>" in source
        capabilities += ["thinking"] if thinks else []
    capabilities += [_SENSES[kind] for kind in about.media]
    context = context_of(path, config) or about.context
    values = {"num_ctx": context, **recommended(path).chosen()}
    parameters = [f"{key} {value}" for key, value in values.items()]
    return {
        "modelfile": "\n".join([f"FROM {name}", *(f"PARAMETER {each}" for each in parameters), ""]),
        "parameters": "\n".join(parameters),
        "template": source,
        "license": about.license,
        "details": _details(about.family, human_count(about.parameters), about.quantization),
        "model_info": _model_info(asked, about, context),
        "capabilities": capabilities,
        "modified_at": _modified(path),
    }


def _model_info(asked: str, about: Card, context: int) -> dict[str, Any]:
    """Facts under Ollama's keys.

    Copilot shows `general.basename`, and fits its prompts to `context_length`: the effective one.
    """
    family = about.family
    names = {
        "num_hidden_layers": "block_count",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "vocab_size": "vocab_size",
    }
    numbers = {f"{family}.{names[key]}": value for key, value in about.config.items()}
    return {
        "general.architecture": family,
        "general.basename": asked,
        "general.parameter_count": about.parameters,
        f"{family}.context_length": context,
        **numbers,
        **({f"{family}.embedding_length": about.dimensions} if about.dimensions else {}),
        "mlxkv.bits_per_weight": about.bits_per_weight,
        "mlxkv.kv_bytes_per_token": about.kv.bytes_per_token,
        "mlxkv.kv_window_bytes": about.kv.window_bytes,
        "mlxkv.kv_state_bytes": about.kv.state_bytes,
        "mlxkv.kv_context_bytes": about.kv.context_bytes,
    }
