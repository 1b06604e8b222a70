"""Named KV: a prompt that is computed once and continued many times.

A name stands for a text and its token ids. KV that was evicted from disk is computed again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlxkv.base.paths import kv_dir, models_dir
from mlxkv.base.units import told_apart
from mlxkv.checkpoint.mlxkv_json import read_record
from mlxkv.engine import encoding
from mlxkv.engine.prompt import PROBES
from mlxkv.engine.runtime import Runtime
from mlxkv.errors import ContextExceeded, Hint, ModelNotFound, OutputError, UsageError
from mlxkv.generation.request import Prompt, is_messages
from mlxkv.kv.types import STEP, KVFormat, first_kv_type
from mlxkv.media.prompt import NO_MEDIA, PromptMedia
from mlxkv.memory.needs import kv_bytes
from mlxkv.prefix.layout import token_bytes
from mlxkv.prefix.on_disk.disk import PageDisk
from mlxkv.prefix.on_disk.format import PageKey
from mlxkv.prefix.pages import Pages
from mlxkv.saved_kv.manifest import NamedKV
from mlxkv.store.refs import PathRef, locate

Progress = Callable[[int, int], None]


def save(
    runtime: Runtime, name: str, prompt: Prompt, model: str | None, on_progress: Progress | None
) -> NamedKV:
    """See `LLM.save_kv`."""
    from mlxkv.saved_kv.registry import KVNames

    pages, disk = _where(runtime)
    names = KVNames(kv_dir())
    names.check_spelling(name)
    pinned = names.is_pinned(name)
    text, messages, tokens, media = _prefix(runtime, prompt)
    _check_length(runtime, pages, len(tokens))
    _check_room(runtime, disk, len(tokens))
    session = runtime.session()
    session.media = media
    with pages.writing_through():
        session.restore(tokens)
        mx.eval(session.prefill(tokens, on_progress=on_progress))
        links = session.finish()
        pages.keep(links, named=True)
    disk.flush()
    keys = pages.keys_to_resume(links)
    _check_written(disk, keys, len(tokens))
    saved = NamedKV(
        name=name,
        fingerprint=disk.fingerprint,
        model=_lasting_name(model) if model else _name_of(runtime),
        n_tokens=len(tokens),
        keys=tuple(keys),
        text=text,
        messages=messages,
        tokens=token_bytes(tokens),
        created=time.time(),
        pinned=pinned,
        kv_type=first_kv_type(runtime.kv_type),
        dtype=disk.dtype,
        media=tuple(replace(medium, data=None) for medium in media),
    )
    names.save(saved, replace=True)
    return saved


def _check_length(runtime: Runtime, pages: Pages, n_tokens: int) -> None:
    """Raise for a prompt that no answer, or no later prompt, could go on from."""
    if n_tokens >= runtime.context:
        raise ContextExceeded(n_tokens, runtime.context)
    if pages.stable is not None and n_tokens > pages.stable:
        raise UsageError(
            f"the prompt has {n_tokens:,} tokens; this model's KV can be reused up to "
            f"{pages.stable:,} tokens only (its rotary embedding stretches)"
        )


def _check_written(disk: PageDisk, keys: Sequence[PageKey], n_tokens: int) -> None:
    """Raise OutputError where pages of a prompt are not on disk."""
    if missing := sum(key not in disk for key in keys):
        raise OutputError(
            f"the KV of {n_tokens:,} tokens does not fit {kv_dir()}: {missing} of {len(keys)} "
            f"files were not written ({disk.refusals()}); free some with `mlxkv kv rm` and `mlxkv "
            f"kv gc`, or raise MLXKV_KV_DISK"
        )


def _check_room(runtime: Runtime, disk: PageDisk, n_tokens: int) -> None:
    """Raise OutputError where the KV of so many tokens fits the disk in no case."""
    kv = KVFormat(first_kv_type(runtime.kv_type), runtime.model.compute_dtype.size)
    whole = n_tokens // STEP * STEP  # of the rest, less than a step, a cache allocates a whole one
    needed = kv_bytes(runtime.model.cache_specs(), whole, kv)
    if needed > (most := disk.files.folder.most_bytes()):
        wanted, room = told_apart(needed, most)
        raise OutputError(
            f"the KV of {n_tokens:,} tokens does not fit {kv_dir()}: it takes {wanted}, and there "
            f"is room for {room} at most; make room on its disk, or raise MLXKV_KV_DISK"
        )


def _lasting_name(model: str) -> str:
    """A model's name that is valid in any folder: a path is made absolute."""
    try:
        ref = locate(model)
    except ModelNotFound:
        return model
    return str(ref.path.absolute()) if isinstance(ref, PathRef) else model


def find(runtime: Runtime, name: str | NamedKV | None) -> NamedKV | None:
    """See `LLM.saved_kv`."""
    if name is None:
        return None
    from mlxkv.saved_kv.registry import KVNames

    saved = KVNames(kv_dir()).load(name) if isinstance(name, str) else name
    pages, disk = _where(runtime)
    if saved.fingerprint != disk.fingerprint:
        raise UsageError(
            f"{saved.name} is KV of {saved.model} ({saved.dtype}, {saved.kv_type}), and this model "
            f"({disk.dtype}, {runtime.kv_type}) has other weights, another dtype or KV format: "
            f"save it again, or load the model as it was",
            hints=[Hint("dtype", saved.dtype), Hint("kv_type", saved.kv_type)],
        )
    from mlxkv.llm.imported_kv import trusted  # few prompts continue saved KV

    saved = trusted(runtime, saved)
    if saved.pinned:
        pages.ram.pin(key.name for key in saved.keys)
    return saved


def _name_of(runtime: Runtime) -> str:
    """The model's name: that of its directory in the models folder, or its path."""
    if runtime.path.absolute().parent != models_dir():
        return str(runtime.path.absolute())
    record = read_record(runtime.path)
    return record.name if record else runtime.path.name


def _where(runtime: Runtime) -> tuple[Pages, PageDisk]:
    if runtime.pages is None:
        raise UsageError("this model keeps a state instead of KV, which cannot be saved")
    if runtime.pages.disk is None:
        raise UsageError("KV on disk is switched off: MLXKV_KV_DISK is 0")
    return runtime.pages, runtime.pages.disk


def _prefix(
    runtime: Runtime, prompt: Prompt
) -> tuple[str, tuple[Any, ...] | None, list[int], PromptMedia]:
    """Text, messages, token ids and media to be saved."""
    if not is_messages(prompt):
        tokens = encoding.encode(runtime, prompt)
        text = prompt if isinstance(prompt, str) else runtime.tokenizer.decode(tokens)
        return text, None, tokens, NO_MEDIA
    messages = tuple(dict(message) for message in prompt)  # pyright: ignore[reportArgumentType, reportCallIssue]
    writer = encoding.writer(runtime)
    probes = [[*messages, {"role": "user", "content": probe}] for probe in PROBES]
    first, second = (writer.write(probe) for probe in probes)
    letters = zip(first.text, second.text, strict=False)
    head = first.before(next((i for i, (a, b) in enumerate(letters) if a != b), 0))
    tokens = runtime.tokenizer.encode_rendered(head)
    return head.text, tuple(writer.without_content(messages)), tokens, writer.media
