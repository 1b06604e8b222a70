"""Plan a conversion from names, shapes and dtypes alone; `--dry-run` prints the plan."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlxkv.checkpoint.quantization import Format
from mlxkv.checkpoint.tensor_names import tower_of, towers_in
from mlxkv.errors import Hint, UsageError, WeightsError

from .config import output_config
from .quantization import (
    MIXED,
    check_recipe,
    fits,
    has_biases,
    is_raised,
    must_keep_dtype,
    must_stay_precise,
    parse_quantization,
    smaller_group,
    with_more_bits,
)
from .sources import Source
from .tensors import SourceTensor, matrix_shape

DTYPES = ("float16", "bfloat16", "float32")
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint32": 4, "uint8": 1}
MAX_SHARD_BYTES = 5 << 30


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What the user asked for.

    Attributes:
        dtype: of everything that is not quantized, and of scales; None keeps the source's.
        quantization: the format to quantize to; None keeps the source's.
        dense: dequantize everything (`--quantize none`).
        recipe: None, "mixed" or one of `MIXED`.
        quantize_towers: quantize the towers of pictures and sound as well.
        text_only: leave them out.
        formats: of weights by name, before all other rules (`quality.choice`).
    """

    dtype: str | None = None
    quantization: Format | None = None
    dense: bool = False
    recipe: str | None = None
    quantize_towers: bool = False
    text_only: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES
    formats: Mapping[str, Format] = field(default_factory=dict)


def parse_options(
    dtype: str | None = None,
    quantize: str | None = None,
    group_size: int | None = None,
    recipe: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    quantize_towers: bool = False,
    text_only: bool = False,
) -> ConvertOptions:
    """Check the user's options.

    Raises:
        UsageError: names what is allowed.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"must be one of {', '.join(DTYPES)}; got {dtype!r}", field="dtype")
    if max_shard_bytes <= 0:
        raise UsageError(f"the shard size must be positive; got {max_shard_bytes}")
    dense = quantize == "none"
    if group_size is not None and (quantize is None or dense):
        raise _needs_quantization("group_size")
    quantization = None
    if quantize is not None and not dense:
        quantization = parse_quantization(quantize, group_size)
    if quantize in MIXED:
        if recipe is not None:
            raise UsageError(f"{quantize} is a recipe itself", field="recipe")
        recipe = quantize
    check_recipe(recipe, quantization)
    if quantize_towers and quantization is None:
        raise _needs_quantization("quantize_towers")
    if quantize_towers and text_only:
        raise UsageError("a model of text alone has no towers", field="quantize_towers")
    return ConvertOptions(
        dtype, quantization, dense, recipe, quantize_towers, text_only, max_shard_bytes
    )


def _needs_quantization(field: str) -> UsageError:
    hint = Hint("quantize", "affine4")
    return UsageError("is for a model that is quantized", field=field, hints=[hint])


@dataclass(frozen=True, slots=True)
class StoredArray:
    """One array of an output file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def row_bytes(self) -> int:
        return matrix_shape(self.shape)[1] * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the model and how it is written.

    Attributes:
        name: of the parameter ("model.layers.0.mlp.up_proj.weight").
        action: "copy" (the source's bits), "cast", "dequantize", "quantize" or "requantize".
        dtype: of the values, or of the scales where it is quantized.
        quantization: its format, None for plain values.
        note: why it is not quantized, or not in the groups that were asked for.
        is_exact: whether a quantized source's values stay as they are in a quantized format.
        stored: its name in the output, where it is not `name`.
    """

    name: str
    origin: str
    shape: tuple[int, ...]
    source_dtype: str
    action: str
    dtype: str
    quantization: Format | None = None
    note: str = ""
    stored: str = ""
    is_exact: bool = True

    @property
    def stored_name(self) -> str:
        """Its name in the output."""
        return self.stored or self.name

    @property
    def module(self) -> str:
        """Its module in the output."""
        return self.stored_name.removesuffix(".weight")

    @property
    def n_values(self) -> int:
        return math.prod(self.shape)

    @property
    def is_same(self) -> bool:
        """Whether a quantized source's values stay as they are."""
        return self.is_exact and self.quantization is not None and self.action in ("copy", "cast")

    @property
    def arrays(self) -> tuple[StoredArray, ...]:
        """The values, or weight, scales and biases."""
        if self.quantization is None:
            return (StoredArray(self.stored_name, self.dtype, self.shape),)
        *rows, columns = self.shape
        bits, group = self.quantization.bits, self.quantization.group_size
        weight = StoredArray(self.stored_name, "uint32", (*rows, columns * bits // 32))
        scales = (*rows, columns // group)
        if not has_biases(self.quantization):
            return weight, StoredArray(f"{self.module}.scales", "uint8", scales)
        names = (f"{self.module}.scales", f"{self.module}.biases")
        return (weight, *(StoredArray(name, self.dtype, scales) for name in names))

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


@dataclass(frozen=True)
class ConvertPlan:
    """What will be written.

    Attributes:
        source: the path of the source, for messages.
        tensors: in the order of the model.
        config: the `config.json` of the output.
        shards: file name -> the tensors in it.
        side_files: names of the other files that are written.
        skipped: names in the source that are left out, with the reason.
        notes: messages for the user.
    """

    source: str
    tensors: tuple[PlannedTensor, ...]
    config: Mapping[str, Any]
    shards: Mapping[str, tuple[PlannedTensor, ...]]
    side_files: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def n_parameters(self) -> int:
        return sum(tensor.n_values for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.total_bytes / max(1, self.n_parameters)


def plan_tensor(tensor: SourceTensor, options: ConvertOptions, source: Source) -> PlannedTensor:
    """How one tensor is written."""
    own, (target, note) = tensor.quantization, _target(tensor, options, source)
    is_exact = True
    if target is not None and target == own:
        dtype = options.dtype or tensor.scale_dtype
        action = "copy" if dtype == tensor.scale_dtype or not has_biases(target) else "cast"
        is_exact = tensor.is_exact(dtype)
    else:
        wanted_dtype = options.dtype or source.default_dtype
        if must_keep_dtype(tensor.name):
            wanted_dtype = None
        own_dtype = tensor.dtype if tensor.dtype in DTYPES else tensor.scale_dtype
        dtype = wanted_dtype or own_dtype
        action = _action(tensor, target, dtype)
    return PlannedTensor(
        name=tensor.name,
        origin=tensor.origin,
        shape=tensor.shape,
        source_dtype=tensor.dtype,
        action=action,
        dtype=dtype,
        quantization=target,
        note=note,
        is_exact=is_exact,
    )


def _target(
    tensor: SourceTensor, options: ConvertOptions, source: Source
) -> tuple[Format | None, str]:
    """The format to write a tensor in, None for plain values; why it is not the one asked for."""
    if tensor.name in options.formats:
        return options.formats[tensor.name], ""
    own, wanted, in_tower = tensor.quantization, options.quantization, tower_of(tensor.name)
    if options.dense:
        return None, ""
    if wanted is None or (in_tower and not options.quantize_towers):
        return own, ""
    is_conv = in_tower and len(tensor.shape) != 2  # mlx-vlm's modules of these are not quantized
    if is_conv or must_stay_precise(tensor.name, tensor.shape):
        return None, ""
    recipe, n_layers = options.recipe, source.parsed.num_hidden_layers
    if recipe and not in_tower and is_raised(recipe, tensor.name, n_layers, tied=source.tied):
        wanted = with_more_bits(wanted, recipe)
    if fits(wanted, tensor.shape):
        return wanted, ""
    why = f"{tensor.shape[-1]} columns do not divide into groups of {wanted.group_size}"
    found = smaller_group(wanted, tensor.shape)
    return found, why if found is None else f"groups of {found.group_size}: {why}"


def _action(tensor: SourceTensor, target: Format | None, dtype: str) -> str:
    was_quantized = tensor.dtype not in DTYPES
    if target is not None:
        return "requantize" if was_quantized else "quantize"
    if was_quantized:
        return "dequantize"
    return "copy" if dtype == tensor.dtype else "cast"


def check_names(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Compare the tensors that were found with those of the model.

    Raises:
        WeightsError: lists what is missing, unknown or of another shape.
    """
    shapes = [
        f"{name} is {list(found[name])}, the config says {list(expected[name])}"
        for name in sorted(found.keys() & expected.keys())
        if tuple(found[name]) != tuple(expected[name])
    ]
    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - expected.keys()),
        "of another shape": shapes,
    }
    problems = [f"{len(them)} {kind}: {listed(them)}" for kind, them in kinds.items() if them]
    if problems:
        raise WeightsError(f"{source}: tensors do not fit the model: {'; '.join(problems)}")


def listed(names: Iterable[str], limit: int = 12) -> str:
    """The first `limit` names, separated by commas."""
    names = [name if name.isprintable() else repr(name) for name in names]
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def global_quantization(tensors: Iterable[PlannedTensor]) -> dict[str, Any] | None:
    """The `quantization` entry of config.json, as mlx-lm writes it.

    The most frequent format at the top, and an entry for each quantized module with another one.
    """
    quantized = {t.module: t.quantization for t in tensors if t.quantization is not None}
    if not quantized:
        return None
    most, _ = Counter(quantized.values()).most_common(1)[0]
    others = {module: q.to_dict() for module, q in quantized.items() if q != most}
    return {**most.to_dict(), **others}


def shard(
    tensors: tuple[PlannedTensor, ...], max_shard_bytes: int
) -> dict[str, tuple[PlannedTensor, ...]]:
    """File name -> its tensors; the arrays of one tensor stay together."""
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return {"model.safetensors": tuple(groups[0])}
    n = len(groups)
    return {f"model-{i:05d}-of-{n:05d}.safetensors": tuple(g) for i, g in enumerate(groups, 1)}


def make_plan(source: Source, options: ConvertOptions) -> ConvertPlan:
    if source.family.embeds and options.dtype == "float16":
        raise UsageError("must not be float16: this model's values overflow it", field="dtype")
    tensors = tuple(plan_tensor(tensor, options, source) for tensor in source.tensors.values())
    towers = towers_in(source.tensors)
    if towers:
        tensors = as_mlx_vlm_names(tensors, source)
    config = output_config(
        source.config,
        native=source.family.native,
        tied=source.tied,
        dtype=_main_dtype(tensors),
        quantization=global_quantization(tensors),
        towers=towers,
        embeds=source.family.embeds,
    )
    return ConvertPlan(
        source=str(source.path),
        tensors=tensors,
        config=config,
        shards=shard(tensors, options.max_shard_bytes),
        side_files=source.side_files,
        skipped=source.skipped,
        notes=source.notes,
    )


def as_mlx_vlm_names(
    tensors: tuple[PlannedTensor, ...], source: Source
) -> tuple[PlannedTensor, ...]:
    """The tensors of a model with towers under mlx-vlm's names: the language model's nested."""
    named = [
        tensor if tower_of(tensor.name) else replace(tensor, stored=f"language_model.{tensor.name}")
        for tensor in tensors
    ]
    embedding = next((t for t in named if t.name == "model.embed_tokens.weight"), None)
    is_gemma3 = source.family.name == "gemma3"
    if is_gemma3 and source.tied and embedding is not None and embedding.quantization is not None:
        # mlx-vlm's Gemma 3 has a head of its own, and copies a dense embedding only.
        named.append(replace(embedding, stored="language_model.lm_head.weight"))
    return tuple(named)


def _main_dtype(tensors: tuple[PlannedTensor, ...]) -> str:
    """The `torch_dtype` of config.json: of most plain values, else of the scales."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.quantization is None:
            sizes[tensor.dtype] += tensor.n_values
    return sizes.most_common(1)[0][0] if sizes else tensors[0].dtype
