"""A GGUF file, and one of encoders beside it, as a `Source`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mlxkv.checkpoint.gguf_names import mmproj_beside
from mlxkv.errors import CheckpointError, Hint, UnsupportedModel

from ..plan import check_names
from ..sources import Source, expected_shapes, parse_config
from ..tensors import SourceTensor
from .file import GGUFFile
from .mmproj import ARCHITECTURE, encoder_weights, misfit, open_mmproj, with_encoders
from .model import default_dtype, gguf_config, gguf_weights, unused_tensors
from .split import open_whole
from .tokenizer import FILES, write_tokenizer

ADAPTER = "adapter"
_NO_MODELS = {
    ADAPTER: "an adapter (LoRA) and no model: give the model that it was made for",
    "imatrix": "an importance matrix and no model: give the model's file",
    "vocab": "a vocabulary and no weights: give the model's file",
}
"""`general.type` of files that are none -> what they hold."""


def open_gguf_source(path: Path, mmproj: Path | None = None, *, text_only: bool = False) -> Source:
    """Open a GGUF file, and check that its tensors are those of its architecture.

    Args:
        path: of the language model.
        mmproj: of its encoders. None takes the one that lies beside it, if that fits.
        text_only: leave encoders out.

    Raises:
        CheckpointError: it is damaged, or its architecture is not supported.
    """
    file = open_whole(path)
    kind = file.metadata.get("general.type")
    if isinstance(kind, str) and kind in _NO_MODELS:
        hints = [Hint("adapter", str(path), "adds it")] if kind == ADAPTER else []
        raise UnsupportedModel(f"{path} holds {_NO_MODELS[kind]}", hints=hints)
    if file.architecture == ARCHITECTURE:
        raise UnsupportedModel(
            f"{path} holds the encoders of a model: give its language model's file",
            hints=[Hint("mmproj", path.name, "adds these encoders to it")],
        )
    text = gguf_config(file)
    tokens, n_rows = file.metadata.get("tokenizer.ggml.tokens"), text["vocab_size"]
    if isinstance(tokens, list) and len(tokens) > n_rows:
        raise CheckpointError(f"{path}: {len(tokens):,} tokens and an embedding of {n_rows:,} rows")
    tensors: dict[str, SourceTensor] = dict(gguf_weights(file, text))
    skipped = unused_tensors(file, text)
    raw = text
    encoders, notes = (None, ()) if text_only else _encoders(file, text, mmproj)
    if encoders is not None:
        raw = with_encoders(encoders, text, tokens)
        more, sound = encoder_weights(encoders)
        tensors |= more
        skipped += [(name, "an encoder of sound of another kind") for name in sound]
    n_tensors = len(file.tensors) + (0 if encoders is None else len(encoders.tensors))
    family, parsed = parse_config(raw, str(path), n_tensors)
    expected = expected_shapes(family, parsed, str(path))
    check_names({name: t.shape for name, t in tensors.items()}, expected, str(path))
    return Source(
        path=path,
        config=raw,
        family=family,
        parsed=parsed,
        tensors={name: tensors[name] for name in expected},
        write_side_files=partial(write_tokenizer, file),
        side_files=FILES,
        default_dtype=default_dtype(file),
        skipped=tuple(skipped),
        notes=notes,
        tied=text["tie_word_embeddings"],
    )


def _encoders(
    file: GGUFFile, text: Mapping[str, Any], mmproj: Path | None
) -> tuple[GGUFFile | None, tuple[str, ...]]:
    """The encoders of a language model, and notes for the user.

    Raises:
        CheckpointError: those that were asked for are damaged, or not this model's.
    """
    if mmproj is not None:
        encoders = open_mmproj(mmproj)
        if reason := misfit(encoders, file, text):
            raise CheckpointError(f"{mmproj}: {reason}")
        return encoders, ()
    beside = mmproj_beside(file.path)
    if len(beside) != 1:
        several = f"{len(beside)} files of encoders lie beside it: choose one with --mmproj"
        return None, (several,) if beside else ()
    try:
        encoders = open_mmproj(beside[0])
        reason = misfit(encoders, file, text)
    except CheckpointError as error:
        return None, (f"left out the encoders beside it: {error}",)
    if reason:
        return None, (f"left out {beside[0].name}: {reason}",)
    return encoders, (f"with the encoders of {beside[0].name}",)
