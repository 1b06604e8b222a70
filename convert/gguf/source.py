"""A GGUF file as a `Source`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mlxkv.errors import CheckpointError

from ..plan import check_names
from ..sources import Source, expected_shapes, parse_config
from .file import open_gguf
from .model import ROPE_FACTORS, default_dtype, gguf_config, gguf_weights
from .tokenizer import FILES, write_tokenizer


def open_gguf_source(path: Path) -> Source:
    """Open a GGUF file, and check that its tensors are those of its architecture.

    Raises:
        CheckpointError: it is damaged, or its architecture is not supported.
    """
    file = open_gguf(path)
    raw = gguf_config(file)
    family, parsed = parse_config(raw, str(path), len(file.tensors))
    tokens, n_rows = file.metadata.get("tokenizer.ggml.tokens"), raw["vocab_size"]
    if isinstance(tokens, list) and len(tokens) > n_rows:
        raise CheckpointError(f"{path}: {len(tokens):,} tokens and an embedding of {n_rows:,} rows")
    tensors = gguf_weights(file, raw)
    expected = expected_shapes(family, parsed, str(path))
    check_names({name: t.shape for name, t in tensors.items()}, expected, str(path))
    factors = ((ROPE_FACTORS, "part of the config: rope_scaling"),)
    return Source(
        path=path,
        config=raw,
        family=family,
        parsed=parsed,
        tensors={name: tensors[name] for name in expected},
        write_side_files=partial(write_tokenizer, file),
        side_files=FILES,
        default_dtype=default_dtype(file),
        skipped=factors if ROPE_FACTORS in file.tensors else (),
        tied=raw["tie_word_embeddings"],
    )
