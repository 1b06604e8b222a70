"""Weight quantization as config.json describes it, in mlx-lm's format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlxkv.errors import UnsupportedModel

MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((1, 2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
"""mode -> (bits, group sizes) that MLX has kernels for."""

OTHER_METHODS = (
    "fp8", "fbgemm_fp8", "compressed-tensors", "awq", "gptq", "auto-round", "intel/auto-round",
    "modelopt", "bitsandbytes",
)  # fmt: skip
"""`quant_method` of other quantizers' checkpoints, which the converter reads."""

_FORMAT_KEYS = ("group_size", "bits", "mode")


@dataclass(frozen=True, slots=True)
class Format:
    """How one weight is quantized: `bits` per value, one scale per `group_size` values of a row."""

    mode: str = "affine"
    bits: int = 4
    group_size: int = 64

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str, *, named: bool = False) -> Format:
        """Read one entry; what it leaves out, or is null, has MLX's default for the mode.

        Args:
            named: the entry of one module, whose bits have a default too.

        Raises:
            UnsupportedModel: a mode, width or group size that MLX cannot run.
        """
        mode = "affine" if raw.get("mode") is None else raw["mode"]
        if not isinstance(mode, str) or mode not in MODES:
            raise UnsupportedModel(
                f"{source}: quantization mode must be one of {', '.join(MODES)}; got {mode!r}"
            )
        all_bits, group_sizes = MODES[mode]
        default_group = 64 if mode == "affine" else group_sizes[0]
        if mode == "affine" and "bits" not in raw and not named:
            raise UnsupportedModel(f"{source}: quantization names no bits")
        # mlx-lm's mixed recipes write null for its own default.
        bits, group_size = raw.get("bits"), raw.get("group_size")
        if bits is None:
            bits = 4 if mode == "affine" else all_bits[0]
        if group_size is None:
            group_size = default_group
        for key, value, allowed in (
            ("bits", bits, all_bits),
            ("group_size", group_size, group_sizes),
        ):
            if type(value) is not int or value not in allowed:
                numbers = ", ".join(map(str, allowed))
                raise UnsupportedModel(
                    f"{source}: quantization {key} of mode {mode} must be one of {numbers}; "
                    f"got {value!r}"
                )
        return cls(mode, bits, group_size)

    def to_dict(self) -> dict[str, Any]:
        """The entry as mlx-lm writes it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


def other_settings(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json says of another quantizer; {} where that is none of `OTHER_METHODS`.

    MLX's own entry says that the weights are MLX's, and what is left beside it counts no more.
    """
    inner = raw.get("text_config")
    parts = (raw, inner if isinstance(inner, Mapping) else {})
    if any(part.get("quantization") for part in parts):
        return {}
    for part in parts:
        found = part.get("quantization_config") or part.get("compression_config")
        if isinstance(found, Mapping) and found.get("quant_method") in OTHER_METHODS:
            return found
    return {}


def is_cast_to_8_bits(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json says that all weights are 8-bit floats without scales."""
    inner = raw.get("text_config")
    parts = (raw, inner if isinstance(inner, Mapping) else {})
    stated = [part.get(key) for part in parts for key in ("dtype", "torch_dtype")]
    return any(str(dtype).removeprefix("torch.").startswith("float8") for dtype in stated)


@dataclass(frozen=True, slots=True)
class Quantization:
    """The formats of a checkpoint.

    Args:
        default: for every quantized weight that is not named.
        by_path: module path -> its own format; None for one that is not quantized.
    """

    default: Format = Format()
    by_path: Mapping[str, Format | None] = field(default_factory=dict)

    @classmethod
    def from_config(cls, raw: Mapping[str, Any], source: str) -> Quantization | None:
        """Read `quantization` (or `quantization_config`) of a config.json; None if there is none.

        Raises:
            UnsupportedModel: a format that MLX cannot run.
        """
        key = "quantization" if raw.get("quantization") else "quantization_config"
        entry = raw.get(key)
        if not entry:
            return None
        if not isinstance(entry, Mapping):
            raise UnsupportedModel(f"{source}: {key} must be an object; got {entry!r}")
        if entry.get("quant_method") == "mxfp4" and raw.get("model_type") == "gpt_oss":
            # As released: only the experts are quantized, and their layout says the rest.
            return cls(Format("mxfp4", 4, 32), {})
        if "quant_method" in entry:
            can = "`mlxkv convert` makes a model of it that runs"
            if entry["quant_method"] not in OTHER_METHODS:
                can = "convert the model from its unquantized weights"
            raise UnsupportedModel(
                f"{source}: {key}: quant_method {entry['quant_method']!r} is not supported; {can}"
            )
        by_path = {
            path: Format.from_dict(value, f"{source}: {path}", named=True) if value else None
            for path, value in entry.items()
            if path not in _FORMAT_KEYS and (isinstance(value, Mapping) or value is False)
        }
        return cls(Format.from_dict(entry, source), by_path)

    def adding(self, formats: Mapping[str, Format | None]) -> Quantization:
        """The same with formats of further modules."""
        return replace(self, by_path={**self.by_path, **formats})

    def at(self, path: str) -> Format | None:
        """The format of the weight of the module at `path`.

        mlx-lm nests a multimodal checkpoint's modules under the name of its language model, which
        stands before (Gemma 3, 4) or after (Gemma 3n) the first `model`.
        """
        inner = f"model.language_model.{path.removeprefix('model.')}"
        for name in (path, f"language_model.{path}", inner):
            if name in self.by_path:
                return self.by_path[name]
        return self.default
