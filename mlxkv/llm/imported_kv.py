"""KV from another machine: checked when it is imported, and computed in part before it is trusted.

Until then its pages lie apart and serve no prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx

from mlxkv.base.paths import kv_dir
from mlxkv.engine.runtime import Runtime
from mlxkv.errors import CheckpointError, UsageError
from mlxkv.generation.kv_check import KVCheck, KVReport
from mlxkv.kv.storage import storage_of
from mlxkv.kv.types import KVFormat, RecurrentSpec
from mlxkv.models.loader import lay_out
from mlxkv.prefix.eviction import DiskLimits
from mlxkv.prefix.layout import FULL, WINDOW, Kinds, token_ids
from mlxkv.prefix.on_disk.disk import PageDisk
from mlxkv.prefix.on_disk.format import PageFile
from mlxkv.prefix.on_disk.writer import PageFiles
from mlxkv.prefix.open import fingerprint_in
from mlxkv.saved_kv.archive import open_archive
from mlxkv.saved_kv.checks import TensorShape, check_page, check_text
from mlxkv.saved_kv.manifest import NamedKV
from mlxkv.saved_kv.registry import KVNames
from mlxkv.saved_kv.signature import check_signature
from mlxkv.store.adapters import key_of_own
from mlxkv.store.resolve import resolve
from mlxkv.text.tokenizer import Tokenizer


def import_file(
    file: Path,
    name: str | None = None,
    model: str | None = None,
    trust: Sequence[Path] = (),
) -> NamedKV:
    """Import saved KV and check all that can be checked without the model's weights.

    Args:
        file: from `mlxkv kv export`.
        name: to save it under, instead of its own.
        model: that it must belong to; None for the one it names.
        trust: files of public keys, one of which must have signed it: it is trusted at once.

    Raises:
        UsageError: no such file, or the name is taken.
        ModelNotFound: the model is not here.
        CheckpointError: the file or the model is damaged, or what it holds is no KV of the model.
        OutputError: there is no room for it.
    """
    if trust:
        check_signature(file, trust)
    try:
        with open_archive(file) as (named, _):
            path = resolve(model or named.model, fetch=False)
    except FileNotFoundError:
        raise UsageError(f"{file}: no such file") from None
    adapters = key_of_own(path)
    wanted = fingerprint_in(kv_dir(), path, named.dtype, named.kv_type, adapters)

    def check(named: NamedKV) -> Callable[[PageFile], None]:
        check_text(named, token_ids(named.tokens), Tokenizer.from_dir(path))
        shapes, states = _shapes(path, named)
        return lambda page: check_page(
            page, shapes[page.key.part], is_state=states and page.key.part == WINDOW
        )

    return KVNames(kv_dir()).import_(
        file, name=name, fingerprint=wanted, check=check, trusted=bool(trust)
    )


def export(name: str, file: Path) -> None:
    """Write saved KV into a file that `import_file` takes.

    Raises:
        UsageError: no such name, or the file is there already.
        CheckpointError, OutputError: as `KVNames.export`.
    """
    KVNames(kv_dir()).export(name, file)


def _shapes(path: Path, named: NamedKV) -> tuple[dict[str, dict[str, TensorShape]], bool]:
    """Part -> the tensors that a page of it has; and whether the second part is a state.

    Raises:
        ValueError: the model has no pages.
    """
    specs = lay_out(path, named.dtype).model.cache_specs()
    kinds = Kinds.of(specs)
    if kinds is None:
        raise ValueError("its model has layers that keep a state instead of KV: save it here")
    dtype = getattr(mx, named.dtype)
    owned = list(KVFormat(named.kv_type).layers(specs))
    shapes: dict[str, dict[str, TensorShape]] = {FULL: {}, WINDOW: {}}
    for part in kinds.parts:
        for index in kinds.caches(part):
            spec, kv = owned[index]
            if isinstance(spec, RecurrentSpec):
                shapes[part] |= _of_state(index, spec, named.dtype)
                continue
            rows = (mx.zeros((1, spec.n_kv_heads, 1, n), dtype) for n in (spec.k_dim, spec.v_dim))
            for j, x in enumerate(storage_of(kv.name).encode_both(*rows)):
                B, H, _, D = x.shape
                shapes[part][f"{index}.{j}"] = str(x.dtype).rpartition(".")[2], (B, H, D)
    return shapes, kinds.states


def _of_state(index: int, spec: RecurrentSpec, dtype: str) -> dict[str, TensorShape]:
    """The arrays of a state, as `RecurrentCache.read` gives them."""
    state = "float32", (1, spec.n_heads, spec.key_dim * spec.value_dim)
    return {f"{index}.0": (dtype, (1, spec.n_tail, spec.n_channels)), f"{index}.1": state}


def verify(
    runtime: Runtime,
    name: str,
    *,
    full: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> KVReport:
    """See `LLM.verify_kv`."""
    names = KVNames(kv_dir())
    saved = names.load(name)
    pages = runtime.pages
    own = None if pages is None else pages.disk
    if pages is None or own is None or saved.fingerprint != own.fingerprint:
        raise UsageError(f"{name} is KV of {saved.model} ({saved.dtype}, {saved.kv_type})")
    if saved.media:
        raise UsageError(
            f"{name} has {len(saved.media)} pictures or pieces of sound, and without their content "
            "its KV cannot be computed again and compared"
            + ("; import it with the public key that signed it" * bool(saved.quarantine))
        )
    files = own.files
    if saved.quarantine:
        files = PageFiles(names.root, saved.quarantine, DiskLimits.for_folder(names.root))
    disk = PageDisk(files, pages.kinds, own.dtype)
    report = KVCheck(runtime.model, saved, disk, pages.kinds).run(
        full=full, on_progress=on_progress
    )
    if report.passed:
        names.trust(saved, own.files)
    return report


def trusted(runtime: Runtime, saved: NamedKV) -> NamedKV:
    """Saved KV whose pages may be used: a sample of an import is computed first.

    Raises:
        CheckpointError: it is not what the model computes.
    """
    if not saved.quarantine:
        return saved
    report = verify(runtime, saved.name, full=False)
    false = report.false_span
    if false is not None:
        raise CheckpointError(
            f"{saved.name}: the imported KV of tokens {false.start:,} to {false.stop - 1:,} is not "
            f"what this model computes from them (differs by {false.difference:.2g}, allowed "
            f"{report.tolerance:.2g}); `mlxkv kv rm {saved.name}` and save it here"
        )
    return KVNames(kv_dir()).load(saved.name)
