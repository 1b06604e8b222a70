"""What a conversion will write, decided before anything is read or written.

Pure: from names, shapes and dtypes to a `ConvertPlan`, which `--dry-run` prints and `write.py`
carries out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlxkv.checkpoint.quantization import Format
from mlxkv.errors import Hint, UsageError, WeightsError

from .config import output_config
from .quantization import (
    check_recipe,
    fits,
    has_biases,
    is_sensitive,
    must_keep_dtype,
    must_stay_precise,
    parse_quantization,
    with_more_bits,
)
from .sources import Source
from .tensors import SourceTensor

DTYPES = ("float16", "bfloat16", "float32")
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint32": 4, "uint8": 1}
MAX_SHARD_BYTES = 5 << 30


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What the user asked for.

    Attributes:
        dtype: of everything that is not packed, and of scales; None keeps the source's.
        quantization: pack with this; None keeps what the source packs.
        dense: unpack everything (`--quantize none`).
        recipe: None or "mixed".
    """

    dtype: str | None = None
    quantization: Format | None = None
    dense: bool = False
    recipe: str | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES


def parse_options(
    dtype: str | None = None,
    quantize: str | None = None,
    group_size: int | None = None,
    recipe: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ConvertOptions:
    """Checks what was asked for.

    Raises:
        UsageError: names what is allowed.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"must be one of {', '.join(DTYPES)}; got {dtype!r}", field="dtype")
    if max_shard_bytes <= 0:
        raise UsageError(f"the shard size must be positive; got {max_shard_bytes}")
    dense = quantize == "none"
    if group_size is not None and (quantize is None or dense):
        raise UsageError(
            "is for a model that is quantized",
            field="group_size",
            hints=[Hint("quantize", "affine4")],
        )
    quantization = None
    if quantize is not None and not dense:
        quantization = parse_quantization(quantize, group_size)
    check_recipe(recipe, quantization)
    return ConvertOptions(dtype, quantization, dense, recipe, max_shard_bytes)


@dataclass(frozen=True, slots=True)
class StoredArray:
    """One array of the output: a name in a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the model and how it is written.

    Attributes:
        name: of the parameter ("model.layers.0.mlp.up_proj.weight").
        action: "copy" (the source's bits), "cast", "dequantize", "quantize" or "requantize".
        dtype: of the values, or of the scales where it is packed.
        quantization: how it is packed, None: not.
        note: why it is not quantized although that was asked for.
    """

    name: str
    origin: str
    shape: tuple[int, ...]
    source_dtype: str
    action: str
    dtype: str
    quantization: Format | None = None
    note: str = ""

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def n_values(self) -> int:
        return math.prod(self.shape)

    @property
    def arrays(self) -> tuple[StoredArray, ...]:
        """What is stored for it: the values, or weight, scales and biases."""
        if self.quantization is None:
            return (StoredArray(self.name, self.dtype, self.shape),)
        *rows, columns = self.shape
        bits, group = self.quantization.bits, self.quantization.group_size
        scales = (*rows, columns // group)
        scale_dtype = self.dtype if has_biases(self.quantization) else "uint8"
        found = (
            StoredArray(self.name, "uint32", (*rows, columns * bits // 32)),
            StoredArray(f"{self.module}.scales", scale_dtype, scales),
        )
        if not has_biases(self.quantization):
            return found
        return (*found, StoredArray(f"{self.module}.biases", scale_dtype, scales))

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


@dataclass(frozen=True)
class ConvertPlan:
    """What will be written.

    Attributes:
        source: what is converted, for people.
        tensors: in the order of the model.
        config: the `config.json` of the output.
        shards: file name to the tensors in it.
        side_files: names of the other files that are written.
        skipped: names in the source that are left out on purpose, with the reason.
        notes: what the user should know.
    """

    source: str
    tensors: tuple[PlannedTensor, ...]
    config: Mapping[str, Any]
    shards: Mapping[str, tuple[PlannedTensor, ...]]
    side_files: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def total_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def n_parameters(self) -> int:
        return sum(tensor.n_values for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.total_bytes / max(1, self.n_parameters)


def plan_tensor(
    tensor: SourceTensor, options: ConvertOptions, default_dtype: str | None, n_layers: int
) -> PlannedTensor:
    """How one tensor is written.

    Args:
        default_dtype: of values that are unpacked or not, where no `--dtype` is given; None keeps
            the source's, tensor by tensor.
    """
    packed, wanted, note = tensor.packed, options.quantization, ""
    if options.dense:
        target = None
    elif wanted is None:
        target = packed
    elif must_stay_precise(tensor.name, tensor.shape):
        target = None
    else:
        if options.recipe and is_sensitive(tensor.name, n_layers):
            wanted = with_more_bits(wanted)
        target = wanted if fits(wanted, tensor.shape) else None
        if target is None:
            note = f"{tensor.shape[-1]} columns do not divide into groups of {wanted.group_size}"
    if target is not None and target == packed:
        dtype = options.dtype or tensor.scale_dtype
        action = "copy" if dtype == tensor.scale_dtype or not has_biases(target) else "cast"
    else:
        wanted_dtype = None if must_keep_dtype(tensor.name) else options.dtype or default_dtype
        dtype = wanted_dtype or _kept(tensor)
        action = _action(tensor, target, dtype)
    return PlannedTensor(
        tensor.name, tensor.origin, tensor.shape, tensor.dtype, action, dtype, target, note
    )


def _kept(tensor: SourceTensor) -> str:
    return tensor.scale_dtype if tensor.packed is not None else tensor.dtype


def _action(tensor: SourceTensor, target: Format | None, dtype: str) -> str:
    was_packed = tensor.dtype not in DTYPES
    if target is not None:
        return "requantize" if was_packed else "quantize"
    if was_packed:
        return "dequantize"
    return "copy" if dtype == tensor.dtype else "cast"


def check_names(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Every tensor that the model has must be there, with its shape, and no other.

    Raises:
        WeightsError: lists what is missing, unknown or of another shape.
    """
    problems = []
    for what, names in (
        ("missing", sorted(set(expected) - set(found))),
        ("unknown", sorted(set(found) - set(expected))),
    ):
        if names:
            problems.append(f"{len(names)} {what}: {listed(names)}")
    shapes = [
        f"{name} is {list(found[name])}, the config says {list(expected[name])}"
        for name in sorted(set(found) & set(expected))
        if tuple(found[name]) != tuple(expected[name])
    ]
    if shapes:
        problems.append(f"{len(shapes)} of another shape: {listed(shapes)}")
    if problems:
        raise WeightsError(f"{source}: tensors do not fit the model: {'; '.join(problems)}")


def listed(names: Iterable[str], limit: int = 12) -> str:
    """Names in a row, the first few of them."""
    names = [name if name.isprintable() else repr(name) for name in names]
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def global_quantization(tensors: Iterable[PlannedTensor]) -> dict[str, Any] | None:
    """The `quantization` entry of config.json, as mlx-lm writes it.

    The most frequent kind at the top, and an entry per module for each other; modules that are
    not packed have none, a loader knows them by their lack of scales.
    """
    packed = {t.module: t.quantization for t in tensors if t.quantization is not None}
    if not packed:
        return None
    most, _ = Counter(packed.values()).most_common(1)[0]
    others = {module: q.to_dict() for module, q in packed.items() if q != most}
    return {**most.to_dict(), **others}


def shard(
    tensors: tuple[PlannedTensor, ...], max_shard_bytes: int
) -> dict[str, tuple[PlannedTensor, ...]]:
    """File names and what goes into each; the arrays of one tensor stay together."""
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
    """Decides what is written; reads nothing but names, shapes and dtypes."""
    n_layers = source.parsed.num_hidden_layers
    tensors = tuple(
        plan_tensor(tensor, options, source.default_dtype, n_layers)
        for tensor in source.tensors.values()
    )
    config = output_config(
        source.config,
        native=source.family.native,
        tied=source.tied,
        dtype=_main_dtype(tensors),
        quantization=global_quantization(tensors),
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


def _main_dtype(tensors: tuple[PlannedTensor, ...]) -> str:
    """What config.json calls the dtype: that of the values, and of scales if all are packed."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.quantization is None:
            sizes[tensor.dtype] += tensor.n_values
    return sizes.most_common(1)[0][0] if sizes else tensors[0].dtype
