"""`mlxkv.plan`: the memory that a model needs on this machine, before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxkv.errors import MediaError, ModelNotFound, UsageError
from mlxkv.kv.types import CacheSpec, KVFormat, first_kv_type
from mlxkv.media.types import AUDIO, IMAGE, Medium
from mlxkv.memory.needs import kv_bytes
from mlxkv.memory.plan import Plan, plan_model
from mlxkv.memory.trace import hollow
from mlxkv.models.adapters import adapted_bytes
from mlxkv.models.loader import Layout, lay_out
from mlxkv.store.adapter_names import split
from mlxkv.store.adapters import adapter_refs, own_adapters, read_adapters
from mlxkv.store.refs import HubRef, locate
from mlxkv.store.settings import Given, Settings, draft_model, draws_on_model, effective

if TYPE_CHECKING:
    from mlxkv.media.pictures import ImageSource
    from mlxkv.media.sound import SoundSource


def plan(
    model: str | Path,
    context: int | None = None,
    sequences: int = 1,
    kv_type: str | Mapping[str, str] | None = None,
    memory: str | int | None = None,
    dtype: mx.Dtype | str = "auto",
    chunk: int | None = None,
    images: Sequence[ImageSource] = (),
    audio: Sequence[SoundSource] = (),
    image_budget: int | None = None,
    draft: str | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
) -> Plan:
    """Plan a model: a directory, a name that `mlxkv list` shows, or a Hugging Face repository.

    Loads nothing. Of a repository that is not here only config.json and the headers of its weights
    are fetched, and nothing is kept. Arguments that are None have the defaults of `load`.

    Args:
        model: path or name; adapters may stand behind it, as in `load`.
        context: tokens a sequence; may exceed the model's own.
        sequences: sequences at a time; of an embedding model a batch is planned, whatever these
            and `kv_type` are.
        kv_type: as for `load`; `auto` is planned as native.
        memory: limit ("16GiB", bytes).
        dtype: to compute in, as for `load`.
        chunk: tokens of a prompt at a time; None for the device's default.
        images: pictures of a sequence, as messages have them. Their tokens are part of the
            context; their encoder, and what it takes while it runs, are counted.
        audio: the same of sound.
        image_budget: tokens a picture at most, for models that let them be chosen.
        draft: what drafts, as for `load`; a model is counted with KV for one sequence.
        adapter: as for `load`; they count as weights.

    Raises:
        UsageError: an argument out of its range, a context that the media alone fill, or a model
            that shall draft for itself.
        MediaError: a file that cannot be read, or the model does not take its kind.
        ModelNotFound, CheckpointError, DownloadError: as for `load`.
    """
    for field, n in (("context", context), ("sequences", sequences), ("chunk", chunk)):
        if n is not None and n < 1:
            raise UsageError(f"must be at least 1; got {n}", field=field)
    model, named = split(model) if isinstance(model, str) else (model, ())
    layout, settings, media = _layout(
        model, dtype, Given(None, kv_type, memory, draft=draft), images, audio, image_budget
    )
    context = context or settings.context.value
    if (n := sum(medium.n_tokens for medium in media)) >= context:
        raise UsageError(
            f"must be more than the {n:,} tokens of the pictures and sound; got {context:,}",
            field="context",
        )
    weights_bytes, encoders = layout.nbytes, layout.encoder_bytes  # `hollow` clears the weights
    own = own_adapters(Path(layout.checkpoint.source).parent)
    refs = [*own, *adapter_refs(named), *adapter_refs(adapter)]
    added = read_adapters(refs, layout.checkpoint.raw)
    built, source = hollow(layout, added), layout.checkpoint.source
    return plan_model(
        built,
        weights_bytes=weights_bytes + adapted_bytes(built),
        context=context,
        sequences=sequences,
        kv_type=first_kv_type(settings.kv_type.value),
        limit=settings.memory.value,
        chunk=chunk,
        encoders=encoders,
        media=media,
        draft_bytes=_draft_bytes(
            draft_model(settings.draft.value), context, model, source, built.cache_specs()
        ),
    )


def _draft_bytes(
    name: str | None,
    context: int,
    target: str | Path,
    source: str,
    specs: Sequence[CacheSpec | None],
) -> int:
    """What a model takes that drafts one sequence; 0 where none does.

    Args:
        name: the drafting model's.
        context: of the sequence.
        target: what the model is called that it drafts for.
        source: where that one's config lies.
        specs: of its layers.
    """
    if name is None:
        return 0
    from mlxkv.engine.draft_models import check_layers, itself

    layout, settings, _ = _layout(name, "auto", Given(), (), (), None)
    if name == str(target) or layout.checkpoint.source == source:
        raise itself(name)
    n_bytes = layout.nbytes  # `hollow` clears the weights
    model = hollow(layout)
    check_layers(name, model.cache_specs(), specs)
    kv_type = first_kv_type(settings.kv_type.value)
    n_tokens = min(context, settings.own_context)
    kv = KVFormat(kv_type, model.compute_dtype.size)
    return n_bytes + kv_bytes(model.cache_specs(), n_tokens, kv)


def _layout(
    model: str | Path,
    dtype: mx.Dtype | str,
    given: Given,
    *sources: Any,
) -> tuple[Layout, Settings, list[Medium]]:
    """A model's layout and settings, from its directory or from headers alone, and its media."""
    from mlxkv.store.hub_headers import headers_of
    from mlxkv.store.resolve import resolve

    try:
        path = resolve(str(model), fetch=False)
    except ModelNotFound:
        ref = None if isinstance(model, Path) else locate(model)
        if not isinstance(ref, HubRef) or ref.wanted is not None:
            raise
    else:
        return _laid_out(path, dtype, given, sources)
    with headers_of(ref.repo_id, ref.revision) as folder:
        return _laid_out(folder, dtype, given, sources, headers_only=True)


def _laid_out(
    path: Path, dtype: mx.Dtype | str, given: Given, sources: Any, *, headers_only: bool = False
) -> tuple[Layout, Settings, list[Medium]]:
    settings = effective(path, given)
    guesses = draws_on_model(settings.draft.value)
    layout = lay_out(path, dtype, headers_only=headers_only, guesses=guesses)
    return layout, settings, _media(layout, path, *sources)


def _media(
    layout: Layout,
    path: Path,
    images: Sequence[ImageSource],
    audio: Sequence[SoundSource],
    image_budget: int | None,
) -> list[Medium]:
    """The pictures and sound as the model takes them."""
    if not images and not audio:
        return []
    from mlxkv.media.reader import reader_of
    from mlxkv.media.source import name_of

    kinds, reader = layout.model.media_kinds, reader_of(path)
    for kind, what, sources in ((IMAGE, "pictures", images), (AUDIO, "sound", audio)):
        if sources and (reader is None or kind not in kinds):
            name = name_of(sources[0], "", "the file")
            raise MediaError(f"{name}: this model takes no {what}")
    assert reader is not None
    parts = [part for source in images for part in reader.image_parts(source, image_budget)]
    found = [part for part in parts if isinstance(part, Medium)]
    return found + [medium for source in audio for medium in reader.audio(source)]
