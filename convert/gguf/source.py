"""A GGUF file as a `Source`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mlxkv.errors import CheckpointError

from ..plan import check_names
from ..sources import Source, expected_shapes, parse_config
from .file import GGUFFile, open_gguf
from .model import default_dtype, gguf_config, gguf_weights
from .tokenizer import FILES, write_tokenizer


def open_gguf_source(path: Path) -> Source:
    """Opens a GGUF file and checks that its tensors are those of its architecture.

    Raises:
        CheckpointError: damaged, or of an architecture that is not known.
    """
    file = open_gguf(path)
    raw = gguf_config(file)
    family, parsed = parse_config(raw, str(path), len(file.tensors))
    _check_tokens(file, raw["vocab_size"])
    tensors = gguf_weights(file, raw)
    expected = expected_shapes(family, parsed, str(path))
    check_names({name: t.shape for name, t in tensors.items()}, expected, str(path))
    ordered = {name: tensors[name] for name in expected}
    return Source(
        path=path,
        config=raw,
        family=family,
        parsed=parsed,
        tensors=ordered,
        write_side_files=partial(write_tokenizer, file),
        side_files=FILES,
        default_dtype=default_dtype(file),
        skipped=tuple(
            (name, "part of the config: rope_scaling")
            for name in file.tensors
            if name == "rope_freqs.weight"
        ),
        tied=raw["tie_word_embeddings"],
    )


def _check_tokens(file: GGUFFile, n_rows: int) -> None:
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > n_rows:
        raise CheckpointError(
            f"{file.path}: {len(tokens):,} tokens and an embedding of {n_rows:,} rows"
        )
