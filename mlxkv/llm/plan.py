"""`mlxkv.plan`: the memory that a model needs on this machine, before it is loaded."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlxkv.errors import ModelNotFound, UsageError
from mlxkv.kv.types import first_kv_type
from mlxkv.memory.plan import Plan, plan_model
from mlxkv.memory.trace import hollow
from mlxkv.models.loader import Layout, lay_out
from mlxkv.store.refs import HubRef, locate
from mlxkv.store.settings import Given, Settings, effective


def plan(
    model: str | Path,
    context: int | None = None,
    sequences: int = 1,
    kv_type: str | None = None,
    memory: str | int | None = None,
    dtype: mx.Dtype | str = "auto",
    chunk: int | None = None,
) -> Plan:
    """Plan a model: a directory, a name that `mlxkv list` shows, or a Hugging Face repository.

    Loads nothing. Of a repository that is not here only config.json and the headers of its weights
    are fetched, and nothing is kept. Arguments that are None have the defaults of `load`.

    Args:
        model: path or name.
        context: tokens a sequence; may exceed the model's own.
        sequences: sequences at a time.
        kv_type: one of `KV_TYPES`.
        memory: limit ("16GiB", bytes).
        dtype: to compute in, as for `load`.
        chunk: tokens of a prompt at a time; None for the device's default.

    Raises:
        UsageError: an argument out of its range.
        ModelNotFound, CheckpointError, DownloadError: as for `load`.
    """
    for field, n in (("context", context), ("sequences", sequences), ("chunk", chunk)):
        if n is not None and n < 1:
            raise UsageError(f"must be at least 1; got {n}", field=field)
    layout, settings = _layout(model, dtype, Given(kv_type=kv_type, memory=memory))
    weights_bytes = layout.nbytes  # `hollow` clears the weights
    return plan_model(
        hollow(layout),
        weights_bytes=weights_bytes,
        context=context or settings.context.value,
        sequences=sequences,
        kv_type=first_kv_type(settings.kv_type.value),
        limit=settings.memory.value,
        chunk=chunk,
    )


def _layout(model: str | Path, dtype: mx.Dtype | str, given: Given) -> tuple[Layout, Settings]:
    """A model's layout and settings, from its directory or from headers alone."""
    from mlxkv.store.hub_headers import headers_of
    from mlxkv.store.resolve import resolve

    try:
        path = resolve(str(model), fetch=False)
    except ModelNotFound:
        ref = None if isinstance(model, Path) else locate(model)
        if not isinstance(ref, HubRef) or ref.wanted is not None:
            raise
    else:
        return lay_out(path, dtype), effective(path, given)
    with headers_of(ref.repo_id) as folder:
        return lay_out(folder, dtype, headers_only=True), effective(folder, given)
