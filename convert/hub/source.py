"""A directory with config.json and safetensors as a `Source`: Hugging Face's, or MLX's own."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxkv.checkpoint.config import read_config, text_config, with_next_token, with_towers
from mlxkv.checkpoint.expert_stacks import expert_stacks
from mlxkv.checkpoint.hybrid_names import NEXT_TOKEN
from mlxkv.checkpoint.mlxkv_json import RECORD, of_model
from mlxkv.checkpoint.quantization import Format, Quantization, other_settings
from mlxkv.checkpoint.sentence import Sentence, dense_inside, module_files
from mlxkv.checkpoint.tensor_names import is_kv, text_name, towers_in
from mlxkv.checkpoint.weights import Weights, open_weights
from mlxkv.errors import UnsupportedModel, WeightsError
from mlxkv.models import Family
from mlxkv.models.copies import next_token_copies

from ..plan import DTYPES, check_names
from ..sources import Source, expected_shapes, parse_config
from ..tensors import SourceTensor, matrix_shape
from .matrices import Matrix
from .other_formats import Found, find_matrices
from .stored import MatrixPart, MatrixTensor, Stored
from .tensors import NAMES, ComputedPart, DenseTensor, Part, QuantizedTensor, StackedPart

if TYPE_CHECKING:
    from .merges import MergedTokens
    from .ranks import RankedTokens
    from .sentencepiece import SentencePieceModel

    OtherTokenizer = SentencePieceModel | RankedTokens | MergedTokens

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "tiktoken.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
# How pictures and sound become what a tower takes.
_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
# Most licences of weights ask that they go along.
_LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def open_hub_source(path: Path, *, text_only: bool = False) -> Source:
    """Open a directory, and check that its tensors are those of its config.

    Args:
        path: the directory.
        text_only: leave the towers of pictures and sound out.

    Raises:
        CheckpointError: it is damaged or incomplete, or its architecture is not supported.
    """
    raw = read_config(path)
    source = str(path / "config.json")
    weights = _open_stored(path, raw, source)
    towers = frozenset() if text_only else towers_in(weights.names)
    named = set(weights.names)
    stored = with_next_token(with_towers(raw, towers), named)
    family, parsed = parse_config(stored, source, len(named))
    kept, left_out = _remapped(weights, family, parsed)
    quantization = None
    if not other_settings(raw):
        quantization = Quantization.from_config(text_config(raw), source)
    tensors = _tensors(weights, kept, quantization, source)
    unread = _unread(weights, family, left_out) if towers_in(kept) else {}
    left_out = [name for name in left_out if text_name(name) not in unread]
    skipped = [(name, _reason(name, parsed.num_hidden_layers)) for name in sorted(left_out)]
    skipped += weights.found.unused.items()
    parsed, tied = _settle_head(parsed, tensors, skipped)
    parsed = _settle_next_token(parsed, tensors, skipped)
    if family.embeds:  # Dense layers in folders of their own are copied as they are
        inside = dense_inside(weights.weights.infos, parsed.hidden_size)
        parsed = dataclasses.replace(parsed, sentence=Sentence(dense=inside))
    expected = expected_shapes(family, parsed, source)
    _leave_out_zero_biases(tensors, expected, skipped)
    check_names({name: t.shape for name, t in tensors.items()}, expected, str(path))
    tokenizer, side_files, notes = _side_files(path, with_processor=bool(towers_in(expected)))
    return Source(
        path=path,
        config=raw,
        family=family,
        parsed=parsed,
        tensors={name: tensors[name] for name in expected}
        | _tensors(weights, unread, quantization, source),
        write_side_files=tokenizer,
        side_files=side_files,
        skipped=tuple(skipped),
        notes=notes,
        tied=tied,
    )


def _open_stored(path: Path, raw: Mapping[str, Any], source: str) -> Stored:
    """A directory's arrays, those of other quantizers put together."""
    weights = open_weights(path)
    found = Found({}, frozenset(), {})
    if not text_config(raw).get("quantization"):
        found = find_matrices(weights.infos, raw, source)
    own = {*found.used, *found.unused, *found.matrices}
    plain = Weights({name: info for name, info in weights.infos.items() if name not in own})
    inner = text_config(raw)
    stated = str(inner.get("dtype") or inner.get("torch_dtype") or "").removeprefix("torch.")
    dtype = stated if stated in DTYPES else str(plain.dtype).removeprefix("mlx.core.")
    if stated not in DTYPES and not any(NAMES.get(i.dtype) in DTYPES for i in plain.infos.values()):
        dtype = "float16"  # where all is cast to 8 bits
    apart = {info.file for info in weights.infos.values() if info.dtype == "F8_E5M2"}
    return Stored(plain, found, dtype, frozenset(apart))


@dataclass(frozen=True, slots=True)
class _Kept:
    """One array of the model: its part of the file, or how to compute it."""

    origin: str
    part: Part


def _remapped(weights: Stored, family: Family, config: Any) -> tuple[dict[str, _Kept], list[str]]:
    """The model's arrays by name: those that the family did not change are in a file."""
    arrays = weights.arrays()
    names = {id(array): name for name, array in arrays.items()}
    kept, left_out = family.remap(arrays, config)

    def compute(name: str) -> Callable[[], mx.array]:
        return lambda: family.remap(weights.arrays(name), config)[0][name]

    in_file = weights.part
    found = {}
    dropped = set(left_out)
    own = (n for n in arrays if n not in dropped) if family.native else ()
    stacks = {text_name(stack): names for stack, names in expert_stacks(own).items()}
    for name, array in kept.items():
        origin = names.get(id(array))
        if origin is not None:
            found[name] = _Kept(origin, in_file(origin))
        elif name in stacks:
            experts = StackedPart(tuple(in_file(expert) for expert in stacks[name]))
            found[name] = _Kept(stacks[name][0], experts)
        else:
            dtype = str(array.dtype).removeprefix("mlx.core.")
            found[name] = _Kept(name, ComputedPart(tuple(array.shape), dtype, compute(name)))
    return found, left_out


def _unread(weights: Stored, family: Family, left_out: list[str]) -> dict[str, _Kept]:
    """What the model leaves out, and mlx-vlm's of this family does not load without.

    Its Gemma 3n has keys and values of its own in each layer, also where it reads another's.
    """
    if family.name != "gemma3n":
        return {}
    return {text_name(n): _Kept(n, weights.part(n)) for n in left_out if is_kv(n)}


def _tensors(
    weights: Stored, kept: Mapping[str, _Kept], quantization: Quantization | None, source: str
) -> dict[str, SourceTensor]:
    """Tensors of arrays: weight, scales and biases of a quantized one belong together."""
    found: dict[str, SourceTensor] = {}
    quantized = {name.removesuffix(".scales") for name in kept if name.endswith(".scales")}
    if quantized and quantization is None:
        raise UnsupportedModel(f"{source}: key 'quantization' is missing and weights are quantized")
    main = str(weights.weights.dtype).removeprefix("mlx.core.")
    for name, item in kept.items():
        module, _, kind = name.rpartition(".")
        if module in quantized and kind in ("scales", "biases"):
            continue
        if module in quantized and kind == "weight" and quantization is not None:
            entry = quantization.at(module) or quantization.default
            found[name] = _quantized_tensor(module, kept, entry, main, source)
            continue
        if (matrices := _matrices(item.part)) is not None:
            shape = item.part.shape
            found[name] = MatrixTensor(name, item.origin, shape, matrices, weights.dtype)
            continue
        if item.part.dtype not in DTYPES:
            raise UnsupportedModel(
                f"{source}: tensor {item.origin} has dtype {item.part.dtype}, not a float, and no "
                "scales"
            )
        found[name] = DenseTensor(name, item.origin, item.part)
    return found


def _matrices(part: Part) -> tuple[Matrix, ...] | None:
    """The weights of another quantizer that a part is made of; None of any other."""
    parts = part.parts if isinstance(part, StackedPart) else (part,)
    found = tuple(part.matrix for part in parts if isinstance(part, MatrixPart))
    return found if len(found) == len(parts) else None


def _quantized_tensor(
    module: str, kept: Mapping[str, _Kept], entry: Format, main_dtype: str, source: str
) -> QuantizedTensor:
    """A quantized weight, and its arrays.

    Raises:
        WeightsError: they do not fit together.
    """
    suffixes = ("weight", "scales", "biases") if entry.mode == "affine" else ("weight", "scales")
    missing = [suffix for suffix in suffixes if f"{module}.{suffix}" not in kept]
    if missing:
        raise WeightsError(f"{source}: {module} is quantized and its {missing[0]} are missing")
    items = [kept[f"{module}.{suffix}"] for suffix in suffixes]
    weight, *scales = (item.part for item in items)
    *rows, words = weight.shape or (0,)
    columns = words * 32 // entry.bits
    scale_kinds = DTYPES if entry.mode == "affine" else ("uint8",)
    fits = weight.dtype == "uint32" and all(
        part.shape == (*rows, columns // entry.group_size) and part.dtype in scale_kinds
        for part in scales
    )
    if not fits or columns % entry.group_size:
        raise WeightsError(
            f"{source}: {module} does not match its quantization "
            f"({entry.mode}, {entry.bits} bits, groups of {entry.group_size})"
        )
    scale_dtype = scales[0].dtype if entry.mode == "affine" else main_dtype
    name, shape, parts = f"{module}.weight", (*rows, columns), (weight, *scales)
    return QuantizedTensor(name, items[0].origin, shape, entry, parts, scale_dtype)


def _reason(name: str, n_layers: int) -> str:
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    is_extra = layer is not None and int(layer[1]) >= n_layers
    if is_extra or text_name(name).startswith(NEXT_TOKEN):
        return "predicts the token after next"
    if re.search(r"vision|visual|multi_modal|image|audio", name):
        return "not part of the language model"
    if name.endswith("inv_freq"):
        return "computed from the config"
    return "not used by the model's definition"


def _settle_head(
    config: Any, tensors: dict[str, SourceTensor], skipped: list[tuple[str, str]]
) -> tuple[Any, bool]:
    """The config, and whether the head is the embedding.

    Where a tied config has a head too, the head counts unless it is a copy.
    """
    head = tensors.get("lm_head.weight")
    if not config.tie_word_embeddings or head is None:
        return config, bool(config.tie_word_embeddings)
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is not None and _equal(head, embedding):
        del tensors["lm_head.weight"]
        skipped.append((head.origin, "a copy of the embedding, which is the head"))
        return config, True
    return dataclasses.replace(config, tie_word_embeddings=False), False


def _settle_next_token(
    config: Any, tensors: dict[str, SourceTensor], skipped: list[tuple[str, str]]
) -> Any:
    """The config with what its next-token layer has of its own; copies are left out."""
    next_token = getattr(config, "next_token", None)
    if next_token is None:
        return config
    own: dict[str, bool] = {}
    for field, (at, of) in next_token_copies(config).items():
        mine, model = tensors.get(f"{at}weight"), tensors.get(f"{of}weight")
        own[field] = mine is not None
        if mine is not None and model is not None and _equal(mine, model):
            del tensors[f"{at}weight"]
            skipped.append((mine.origin, "a copy of what the model has"))
            own[field] = False
    return dataclasses.replace(config, next_token=dataclasses.replace(next_token, **own))


def _leave_out_zero_biases(
    tensors: dict[str, SourceTensor],
    expected: Mapping[str, tuple[int, ...]],
    skipped: list[tuple[str, str]],
) -> None:
    """AutoGPTQ stores zeros for the bias that a projection does not have."""
    for name in [name for name in tensors if name.endswith(".bias") and name not in expected]:
        weight = tensors.get(f"{name.removesuffix('bias')}weight")
        if isinstance(weight, MatrixTensor) and not tensors[name].rows(0, 1).any().item():
            skipped.append((tensors.pop(name).origin, "zeros"))


def _equal(a: SourceTensor, b: SourceTensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    n_rows, columns = matrix_shape(a.shape)
    step = max(a.row_step, b.row_step, (1 << 22) // max(1, columns))
    blocks = ((start, min(n_rows, start + step)) for start in range(0, n_rows, step))
    return all(mx.array_equal(a.rows(*block), b.rows(*block)).item() for block in blocks)


def _side_files(
    path: Path, *, with_processor: bool
) -> tuple[Callable[[Path], None], tuple[str, ...], tuple[str, ...]]:
    """A function that writes the files beside the weights, their names, and notes on them."""
    wanted = (*_TOKENIZER_FILES, *(_PROCESSOR_FILES if with_processor else ()))
    names = [name for name in wanted if (path / name).is_file()]
    names += module_files(path)
    templates = sorted(path.glob("additional_chat_templates/*.jinja"))
    names += [f"{file.parent.name}/{file.name}" for file in templates if file.is_file()]
    for pattern in _LICENCE_FILES:
        names += sorted(file.name for file in path.glob(pattern) if file.is_file())
    settings = of_model(path)
    copy = partial(_copy_files, path, tuple(names), settings)
    if settings:
        names.append(RECORD)
    if "tokenizer.json" in names:
        return copy, tuple(names), ()
    model = _other_tokenizer(path, names)
    if model is None:
        return (
            copy,
            tuple(names),
            ("no tokenizer.json, and nothing to make one of: the output has none",),
        )

    def write(folder: Path) -> None:
        copy(folder)
        model.write(folder)

    added = [name for name in model.files if name not in names]
    return write, (*names, *added), (f"tokenizer.json is made from {model.path.name}",)


def _other_tokenizer(path: Path, names: list[str]) -> OtherTokenizer | None:
    """A tokenizer in another form than tokenizer.json; None where there is none."""
    from .merges import FILES, open_merges
    from .ranks import is_tiktoken, open_tekken, open_tiktoken
    from .sentencepiece import open_sentencepiece

    if (path / "tekken.json").is_file():
        return open_tekken(path)
    for name in ("tokenizer.model", "tiktoken.model"):
        if name in names and is_tiktoken(path / name):
            return open_tiktoken(path, name)
    if "tokenizer.model" in names:
        return open_sentencepiece(path)
    return open_merges(path) if all(name in names for name in FILES) else None


def _copy_files(
    source: Path, names: tuple[str, ...], settings: Mapping[str, Any], folder: Path
) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    if settings:  # without the source's origin
        (folder / RECORD).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
