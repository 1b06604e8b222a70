"""What sentence-transformers keeps beside an embedding model: pooling, Dense layers, prompts.

`modules.json` lists the steps from a text to its vector, each in a folder of its own. Weights that
mlx-embeddings wrote have the Dense layers among the model's, as `dense.0.weight`, and the folders
may be missing.

Reference: sentence-transformers 6.2, `base/model.py` and the modules' own files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxkv.base import regular
from mlxkv.checkpoint.config import Fields, read_json
from mlxkv.checkpoint.weights import TensorInfo, Weights, open_weights
from mlxkv.errors import ConfigError, ModelNotFound, UsageError, WeightsError

MODULES = "modules.json"
FILES = (MODULES, "config_sentence_transformers.json", "sentence_bert_config.json")
"""Files beside config.json; the folders that the first names belong to them."""
FOLDER = re.compile(r"[0-9]{1,2}_[A-Za-z]\w{0,40}")
"""Names of modules' folders."""
_ACTIVATIONS = {"Identity": None, "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu"}
"""PyTorch's names -> ours."""


@dataclass(frozen=True, slots=True)
class DenseConfig:
    """A layer behind the pooling.

    Args:
        activation: of `nn.layers.ACTIVATIONS`; None for none.
    """

    in_features: int
    out_features: int
    bias: bool
    activation: str | None


@dataclass(frozen=True, slots=True)
class Sentence:
    """From a model's hidden states to one vector, and what is put before a text.

    The vector is the mean over a text's tokens; no other pooling is read.

    Args:
        dense: the layers behind the mean, in order.
        normalized: whether the vector is scaled to length 1.
        prompts: name -> what is put before a text.
        default_prompt: the name that is taken where none is given; None for no prompt.
        max_tokens: of a text, the first and last token included; None for the model's context.
    """

    dense: tuple[DenseConfig, ...] = ()
    normalized: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    max_tokens: int | None = None

    def prompt(self, name: str | None) -> str:
        """What to put before a text.

        Args:
            name: one of `prompts`; None for the default, "" for none.

        Raises:
            UsageError: there is no such prompt.
        """
        name = self.default_prompt if name is None else name
        if not name:
            return ""
        if name not in self.prompts:
            names = ", ".join(sorted(self.prompts))
            known = f"must be one of {names}" if names else "is given, and this model has none"
            raise UsageError(f"{known}; got {name[:80]!r}", field="prompt")
        return self.prompts[name]

    def size(self, hidden: int) -> int:
        """Values of a vector, of hidden states of that size."""
        return self.dense[-1].out_features if self.dense else hidden


def read_sentence(model_dir: Path, infos: Mapping[str, TensorInfo], hidden_size: int) -> Sentence:
    """The modules of a model directory; the mean, normalised, where it lists none.

    Args:
        model_dir: the directory.
        infos: headers of its weights.
        hidden_size: of the model.

    Raises:
        ConfigError: a file is damaged, or a module is of a kind that mlxkv does not compute.
    """
    inside = dense_inside(infos, hidden_size)
    dense, normalized = inside, True
    if (model_dir / MODULES).is_file():
        dense, normalized = _steps(model_dir, inside)
    own = _optional(model_dir / "config_sentence_transformers.json")
    prompts = own.any("prompts") or {}
    if not isinstance(prompts, Mapping) or not all(isinstance(p, str) for p in prompts.values()):
        raise own.error("prompts", "must be an object of texts")
    default = own.any("default_prompt_name")
    if default is not None and default not in prompts:
        raise own.error("default_prompt_name", f"is none of the prompts; got {default!r}")
    return Sentence(dense, normalized, dict(prompts), default, _max_tokens(model_dir))


def dense_inside(infos: Mapping[str, TensorInfo], hidden_size: int) -> tuple[DenseConfig, ...]:
    """The Dense layers among the model's own weights, as mlx-embeddings writes them."""
    found, size = [], hidden_size
    while (info := infos.get(f"dense.{len(found)}.weight")) is not None:
        has_bias = f"dense.{len(found)}.bias" in infos
        found.append(DenseConfig(size, info.shape[0], has_bias, None))
        size = info.shape[0]
    return tuple(found)


def _steps(
    model_dir: Path, inside: tuple[DenseConfig, ...]
) -> tuple[tuple[DenseConfig, ...], bool]:
    """The Dense layers, and whether a normalisation ends the list.

    With `inside` the folders may be missing: mlx-embeddings copies none.
    """
    source = model_dir / MODULES
    kinds = [(str(step["type"]).rpartition(".")[2], path) for step, path in _folders(model_dir)]
    names = [kind for kind, _ in kinds]
    plain = ["Transformer", "Pooling", *["Dense"] * names.count("Dense")]
    if names not in (plain, [*plain, "Normalize"]):
        raise ConfigError(
            f"{source}: must list Transformer, Pooling, any number of Dense and then Normalize or "
            f"nothing; got {', '.join(names)}"
        )
    pooling, folders = kinds[1][1], [path for kind, path in kinds if kind == "Dense"]
    if not inside or (pooling / "config.json").exists():
        _check_pooling(pooling)
    if inside and len(inside) != len(folders):
        raise ConfigError(f"{source}: lists {len(folders)} Dense, and the weights {len(inside)}")
    is_inside = inside and not all((folder / "config.json").exists() for folder in folders)
    dense = inside if is_inside else tuple(_dense(folder) for folder in folders)
    return dense, names[-1] == "Normalize"


def _folders(model_dir: Path) -> list[tuple[Mapping[str, Any], Path]]:
    """The steps of `modules.json`, and their folders."""
    source = model_dir / MODULES
    try:
        steps = json.loads(regular.read_text(source))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: cannot be read ({error})") from error
    if not isinstance(steps, list) or not all(
        isinstance(step, Mapping) and {"path", "type"} <= step.keys() for step in steps
    ):
        raise ConfigError(f"{source}: must be a list of objects with 'path' and 'type'")
    for step in steps:
        path = step["path"]
        if not isinstance(step["type"], str):
            raise ConfigError(f"{source}: 'type' must be a text; got {step['type']!r}")
        if not isinstance(path, str) or (path and not FOLDER.fullmatch(path)):
            raise ConfigError(f"{source}: names {path!r}, not a folder beside it")
    return [(step, model_dir / step["path"]) for step in steps]


def module_files(model_dir: Path) -> list[str]:
    """Names of all files of the modules, relative to the directory; [] without `modules.json`."""
    if not (model_dir / MODULES).is_file():
        return []
    names = [name for name in FILES if (model_dir / name).is_file()]
    for step, folder in _folders(model_dir):
        for name in ("config.json", "model.safetensors") if step["path"] else ():
            if (folder / name).is_file():
                names.append(f"{step['path']}/{name}")
    return names


def missing_modules(model_dir: Path) -> list[str]:
    """Files of the Dense layers that `modules.json` names and the directory lacks.

    None of them where there are none at all: the layers are among the model's weights then.
    """
    if not (model_dir / MODULES).is_file():
        return []
    try:
        folders = [path for step, path in _folders(model_dir) if step["type"].endswith(".Dense")]
    except ConfigError:
        return []  # damaged, not missing: the loader says what is wrong with it
    files = [folder / name for folder in folders for name in ("config.json", "model.safetensors")]
    missing = [str(file.relative_to(model_dir)) for file in files if not file.is_file()]
    return missing if len(missing) < len(files) else []


def _check_pooling(folder: Path) -> None:
    """Refuse any pooling but the mean over all tokens; both of the file's styles."""
    fields = Fields(read_json(folder / "config.json"), str(folder / "config.json"))
    old = "pooling_mode_"
    modes = [key.removeprefix(old) for key, on in fields.raw.items() if key.startswith(old) and on]
    if isinstance(mode := fields.any("pooling_mode"), str):
        modes.append(mode)
    elif isinstance(mode, list):
        modes += [str(each) for each in mode]
    if not modes or any(mode not in ("mean", "mean_tokens") for mode in modes):
        raise fields.error("pooling_mode", f"must be mean; got {', '.join(modes) or 'none'}")
    if not fields.bool("include_prompt", True):
        raise fields.error("include_prompt", "must be true: a prompt's tokens are part of the mean")


def _dense(folder: Path) -> DenseConfig:
    fields = Fields(read_json(folder / "config.json"), str(folder / "config.json"))
    kind = fields.str("activation_function", "torch.nn.modules.linear.Identity")
    name = kind.rpartition(".")[2]
    if name not in _ACTIVATIONS:
        raise fields.error("activation_function", f"must be one of {', '.join(_ACTIVATIONS)}")
    for key in ("module_input_name", "module_output_name"):
        fields.str(key, "sentence_embedding", among=("sentence_embedding",))
    return DenseConfig(
        fields.int("in_features"),
        fields.int("out_features"),
        fields.bool("bias", True),
        _ACTIVATIONS[name],
    )


def _max_tokens(model_dir: Path) -> int | None:
    """What sentence-transformers cuts a text to, but for the model's own context."""
    found = _optional(model_dir / "sentence_bert_config.json").opt_int("max_seq_length")
    if found is not None:
        return found
    # transformers writes 1e30 for no limit.
    most = _optional(model_dir / "tokenizer_config.json").any("model_max_length")
    return most if type(most) is int and 0 < most < 2**31 else None


def _optional(path: Path) -> Fields:
    """A file's fields; none where there is no file."""
    try:
        return Fields(read_json(path), str(path))
    except ModelNotFound:
        return Fields({}, str(path))


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """Weights of the Dense layers that lie in folders of their own.

    Args:
        infos: headers under the model's names, `dense.0.weight`.
        arrays: lazy arrays under the same names.
    """

    infos: Mapping[str, TensorInfo]
    arrays: Mapping[str, mx.array]


def dense_weights(model_dir: Path, sentence: Sentence, weights: Weights) -> DenseWeights:
    """The Dense layers' weights; none where the model's own hold them.

    Raises:
        WeightsError: a folder has no weights, or tensors of other names.
        CheckpointError: as `open_weights`.
    """
    infos: dict[str, TensorInfo] = {}
    arrays: dict[str, mx.array] = {}
    if not sentence.dense or "dense.0.weight" in weights.infos:
        return DenseWeights(infos, arrays)
    folders = [path for step, path in _folders(model_dir) if step["type"].endswith(".Dense")]
    for i, folder in enumerate(folders):
        try:
            opened = open_weights(folder)
        except ModelNotFound:
            raise WeightsError(f"{folder}: no model.safetensors; fetch the model again") from None
        if not opened.infos.keys() <= {"linear.weight", "linear.bias"}:
            raise WeightsError(f"{folder}: holds other tensors than linear.weight and linear.bias")
        renamed = {name: name.replace("linear.", f"dense.{i}.") for name in opened.infos}
        loaded = opened.arrays()
        infos |= {new: opened.infos[name] for name, new in renamed.items()}
        arrays |= {new: loaded[name] for name, new in renamed.items()}
    return DenseWeights(infos, arrays)


def with_dense(weights: Weights, dense: DenseWeights) -> Weights:
    """Headers of a model's weights with those of its Dense layers."""
    return Weights({**weights.infos, **dense.infos}) if dense.infos else weights
