"""What a model is, read from its files without loading a weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxkv.base import regular
from mlxkv.base.units import human_bytes, human_count
from mlxkv.checkpoint.config import read_config, text_config
from mlxkv.checkpoint.mlxkv_json import Record, read_record
from mlxkv.errors import CheckpointError, ModelNotFound
from mlxkv.kv.types import CacheSpec, KVFormat, take_drafts
from mlxkv.store import catalog
from mlxkv.store.settings import Setting, Settings, effective

if TYPE_CHECKING:
    from mlxkv.checkpoint.weights import TensorInfo, Weights
    from mlxkv.models.loader import Layout

FORMULA = "n_kv_heads * (k_dim + v_dim) * bytes per value, summed over the layers"


@dataclass(frozen=True, slots=True)
class KVFacts:
    """What the KV cache of one sequence takes.

    Attributes:
        bytes_per_token: of the layers that see everything.
        window_bytes: of the layers with a window, once it is full.
        n_full_layers: layers that see everything.
        n_window_layers: layers with a window.
        window: the largest of the windows; 0 without one.
        n_state_layers: layers that keep a state in place of KV.
        state_bytes: theirs, for any number of tokens.
        context_bytes: all of it at the model's full context.
        dtype: of the values, on this machine.
    """

    bytes_per_token: int
    window_bytes: int
    n_full_layers: int
    n_window_layers: int
    window: int
    context_bytes: int
    dtype: str
    n_state_layers: int = 0
    state_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Card:
    """What `mlxkv show` prints.

    Attributes:
        parameters: values of all weights, those of quantized ones included.
        bits_per_weight: bits of all tensors by parameters, scales included.
        definition: `mlxkv (llama)` or `mlx-lm`.
        chat_template: whether there is one.
        context: the model's own.
        settings: what it runs with on this machine.
        files: name and bytes.
        skipped: tensors that are left out on purpose.
        config: the main numbers of config.json.
        media: what it takes beside text, `image` and `audio`, and the bytes of each one's encoder.
        dimensions: values of a vector, of an embedding model; 0 for one that writes.
        prompts: names of what an embedding model puts before a text.
    """

    name: str
    path: Path
    family: str
    definition: str
    parameters: int
    bits_per_weight: float
    quantization: str
    context: int
    config: Mapping[str, int]
    kv: KVFacts
    chat_template: bool
    source: str
    origin: str
    license: str
    notice: str
    files: tuple[tuple[str, int], ...]
    settings: Settings
    skipped: tuple[str, ...] = ()
    media: Mapping[str, int] = field(default_factory=dict)
    dimensions: int = 0
    prompts: tuple[str, ...] = ()

    def text(self) -> str:
        """The card for people, one fact a line."""
        kv = self.kv
        cache = f"{human_bytes(kv.bytes_per_token)} a token ({kv.dtype})"
        if kv.n_window_layers:
            cache += f" in {kv.n_full_layers} layers, and {human_bytes(kv.window_bytes)} in "
            cache += f"{kv.n_window_layers} with a window of {kv.window:,}"
        if kv.state_bytes:
            cache += f" in {kv.n_full_layers} layers, and {human_bytes(kv.state_bytes)} of "
            cache += f"states in {kv.n_state_layers}"
        formula = FORMULA + (", plus the states" if kv.state_bytes else "")
        from mlxkv.checkpoint.weights import skipped_text

        rows = [
            ("name", self.name),
            ("family", f"{self.family}, defined by {self.definition}"),
            ("parameters", human_count(self.parameters)),
            ("quantization", f"{self.quantization}, {self.bits_per_weight:.2f} bits per weight"),
            ("input", self._input()),
            ("context", f"{self.context:,} tokens"),
            *(
                self._of_vectors()
                if self.dimensions
                else (
                    ("KV cache", cache),
                    ("", f"{human_bytes(kv.context_bytes)} at full context; {formula}"),
                )
            ),
            ("shape", ", ".join(f"{key} {value:,}" for key, value in self.config.items())),
            ("chat template", self._template()),
            ("source", f"{self.source} {self.origin}".strip()),
            ("license", self.license or "not stated"),
            ("notice", self.notice),
            ("skipped", skipped_text(self.skipped)),
            ("path", str(self.path)),
        ]
        rows += [
            ("" if i else "settings", f"{setting.name:<9} {setting}")
            for i, setting in enumerate(self.settings)
        ]
        rows += [
            ("" if i else "files", f"{human_bytes(size):>9}  {name}")
            for i, (name, size) in enumerate(self.files)
        ]
        shown = [row for row in rows if row[1]]
        return "\n".join(f"{key:<14} {value}" for key, value in shown)

    def _of_vectors(self) -> tuple[tuple[str, str], ...]:
        return (
            ("vectors", f"{self.dimensions:,} values, of texts; see `mlxkv embed`"),
            ("prompts", ", ".join(self.prompts)),
            ("KV cache", "none: attention goes both ways"),
        )

    def _template(self) -> str:
        if self.chat_template:
            return "yes"
        return "" if self.dimensions else "no: a base model, use --raw"

    def _input(self) -> str:
        """`text, pictures (encoder 812 MiB)`; "" for text alone."""
        names = {"image": "pictures", "audio": "sound"}
        media = [f"{names[kind]} (encoder {human_bytes(n)})" for kind, n in self.media.items()]
        return ", ".join(["text", *media]) if media else ""


def to_dict(card: Card) -> dict[str, Any]:
    """The card as JSON has it."""
    files = [{"name": name, "bytes": size} for name, size in card.files]
    settings = {s.name: {"value": s.value, "origin": s.origin} for s in card.settings}
    return asdict(card) | {"path": str(card.path), "files": files, "settings": settings}


def summarize(model_dir: Path) -> tuple[str, str, int]:
    """Family, quantization and context of a model, for a line of the list.

    Raises:
        ModelNotFound, ConfigError: no config.json, or a damaged one.
    """
    raw = read_config(model_dir)
    source = str(model_dir / "config.json")
    inner = text_config(raw)
    context = inner.get("max_position_embeddings")
    if not isinstance(context, int):
        context = _native_context(raw, source)
    return str(raw.get("model_type", "?")), quantization_label(model_dir, inner), context


def _native_context(raw: Mapping[str, Any], source: str) -> int:
    """The context that a family assumes if config.json has none; 0 if the family has none."""
    from mlxkv.models import family_for

    try:
        family = family_for(raw, source)
        return family.config(raw, source).context if family.native else 0
    except CheckpointError:
        return 0


def quantization_label(
    model_dir: Path, config: Mapping[str, Any], weights: Weights | None = None
) -> str:
    """`affine4 g32`, `mixed affine4+affine8`, a foreign method's name, or the weights' dtype.

    Args:
        config: the text model's part of config.json.
        weights: the weights' headers, if they were read already.
    """
    from mlxkv.checkpoint.quantization import Quantization

    try:
        quantization = Quantization.from_config(config, "config.json")
    except CheckpointError:
        entry = config.get("quantization") or config.get("quantization_config")
        return str(entry.get("quant_method", "?")) if isinstance(entry, Mapping) else "?"
    if quantization is None:
        return _dtype_label(model_dir, weights)
    own = (form for form in quantization.by_path.values() if form is not None)
    forms = [quantization.default, *own]
    names = sorted({f if (f := form.mode)[-1].isdigit() else f"{f}{form.bits}" for form in forms})
    groups = sorted({form.group_size for form in forms})
    label = f"{'+'.join(names)} g{'/'.join(map(str, groups))}"
    return f"mixed {label}" if len(names) > 1 else label


def _dtype_label(model_dir: Path, weights: Weights | None) -> str:
    from mlxkv.checkpoint.weights import open_weights

    try:
        return str((weights or open_weights(model_dir)).dtype).removeprefix("mlx.core.")
    except (CheckpointError, ModelNotFound):
        return "?"


def describe(name: str, model_dir: Path, layout: Layout | None = None) -> Card:
    """The card of a model directory.

    Args:
        layout: of a model that is being loaded, so that nothing is read twice.

    Raises:
        CheckpointError: config or weights are damaged, or the architecture is not supported.
    """
    from mlxkv.models.loader import open_checkpoint, random_state_kept

    if layout is None:
        checkpoint, _ = open_checkpoint(model_dir)
        with random_state_kept():
            model = checkpoint.family.build(checkpoint.config)
    else:
        checkpoint, model = layout.checkpoint, layout.model
    raw, family, context = checkpoint.raw, checkpoint.family, checkpoint.config.context
    inner, skipped = text_config(raw), set(checkpoint.skipped)
    infos = {name: info for name, info in checkpoint.weights.infos.items() if name not in skipped}
    parameters = _parameters(infos, inner, checkpoint.source)
    entry = catalog.find(name)
    record = read_record(model_dir) or Record(name, _source_of(model_dir), "")
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
            "head_dim", "intermediate_size", "vocab_size")  # fmt: skip
    return Card(
        name=f"{entry.name} ({entry.title})" if entry else name,
        path=model_dir,
        family=str(raw["model_type"]),
        definition=f"mlxkv ({family.name})" if family.native else "mlx-lm",
        parameters=parameters,
        bits_per_weight=8 * sum(info.nbytes for info in infos.values()) / max(parameters, 1),
        quantization=quantization_label(model_dir, inner, checkpoint.weights),
        context=context,
        config={key: inner[key] for key in keys if isinstance(inner.get(key), int)},
        kv=_kv_facts(model.cache_specs(), checkpoint.dtype, context),
        chat_template=_has_template(model_dir),
        source=record.source,
        origin=record.origin,
        license=record.license or _license_in(model_dir),
        notice=record.notice,
        files=tuple(
            (path.name, path.stat().st_size)
            for path in sorted(model_dir.iterdir())
            if path.is_file()
        ),
        settings=_settings(model_dir, model.cache_specs()),
        skipped=tuple(checkpoint.skipped),
        media=_media(model.media_kinds, infos),
        dimensions=model.n_dimensions,
        prompts=tuple(checkpoint.config.sentence.prompts) if family.embeds else (),
    )


def _settings(model_dir: Path, specs: Sequence[CacheSpec | None]) -> Settings:
    """Those that count for a model: one whose states cannot be taken back takes no drafts."""
    settings = effective(model_dir)
    if not take_drafts(specs):
        return replace(settings, draft=Setting("draft", "off", "its states cannot be taken back"))
    return settings


def _media(kinds: Collection[str], infos: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Kind -> bytes in the files of what makes its rows."""
    from mlxkv.checkpoint.tensor_names import tower_of

    towers = {"image": "vision", "audio": "audio"}
    return {
        kind: sum(info.nbytes for name, info in infos.items() if tower_of(name) == tower)
        for kind, tower in towers.items()
        if kind in kinds
    }


def _parameters(infos: Mapping[str, Any], config: Mapping[str, Any], source: str) -> int:
    """Values of all weights: a quantized one holds 32 / bits of them in each of its words."""
    from mlxkv.checkpoint.quantization import Quantization

    quantization = Quantization.from_config(config, source)
    total = 0
    for name, info in infos.items():
        module, _, kind = name.rpartition(".")
        quantized = f"{module}.scales" in infos
        if quantized and kind in ("scales", "biases"):
            continue
        n = prod(info.shape)
        if quantized and kind == "weight" and quantization is not None:
            n = n * 32 // (quantization.at(module) or quantization.default).bits
        total += n
    return total


def _kv_facts(specs: list[Any], checkpoint: Any, context: int) -> KVFacts:
    from mlxkv.models.dtypes import compute_dtype

    dtype = compute_dtype("auto", checkpoint)
    kv = KVFormat(itemsize=dtype.size)
    own = [spec for spec in specs if spec is not None]
    states = [spec for spec in own if spec.opaque]
    full = [spec for spec in own if spec.window is None and not spec.opaque]
    sliding = [spec for spec in own if spec.window is not None]
    return KVFacts(
        bytes_per_token=sum(spec.token_bytes(kv) for spec in full),
        window_bytes=sum(spec.nbytes(spec.window, kv) for spec in sliding),
        n_full_layers=len(full),
        n_window_layers=len(sliding),
        window=max((spec.window for spec in sliding), default=0),
        context_bytes=sum(spec.nbytes(context, kv) for spec in own),
        dtype=str(dtype).removeprefix("mlx.core."),
        n_state_layers=len(states),
        state_bytes=sum(spec.nbytes(context, kv) for spec in states),
    )


def _has_template(model_dir: Path) -> bool:
    if (model_dir / "chat_template.jinja").is_file():
        return True
    for name in ("tokenizer_config.json", "chat_template.json"):
        try:
            if json.loads(regular.read_text(model_dir / name)).get("chat_template"):
                return True
        except (OSError, ValueError, AttributeError):
            continue
    return False


def digest(model_dir: Path) -> str:
    """SHA-256 of the names, sizes and times of a model's files, which changes with any write."""
    found = hashlib.sha256()
    for file in sorted(model_dir.rglob("*")):
        if file.is_file():
            stat, name = file.stat(), file.relative_to(model_dir)
            found.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return found.hexdigest()


def _source_of(model_dir: Path) -> str:
    return "hub" if model_dir.parent.name == "snapshots" else "directory"


def _license_in(model_dir: Path) -> str:
    """What the model card's header says, where a repository brought one."""
    try:
        lines = regular.read_text(model_dir / "README.md").splitlines()
    except (OSError, ValueError):
        return ""
    for line in lines[1:40]:
        if line.startswith("license:"):
            return line.removeprefix("license:").strip()
    return ""


def supported() -> str:
    """The families that mlxkv runs, for people."""
    import importlib.util

    from mlxkv.models import NATIVE

    by_module: dict[str, list[str]] = {}
    for model_type, module in NATIVE.items():
        by_module.setdefault(module, []).append(model_type)
    by_module["embedding_gemma"] = ["gemma3_text that sees both ways"]  # `models.family_for`
    width = max(map(len, by_module))
    lines = [f"{module:<{width}} {', '.join(types)}" for module, types in sorted(by_module.items())]
    if importlib.util.find_spec("mlx_lm") is not None:
        others = "every other model_type that the installed mlx-lm defines"
    else:
        others = "with `pip install mlx-lm`, every other model_type that it defines"
    return "\n".join([*lines, f"{'mlx-lm':<{width}} {others}"])
