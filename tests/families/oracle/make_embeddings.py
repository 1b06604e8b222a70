"""Make ../golden_embeddings: vectors that sentence-transformers (torch, CPU, float32) computes.

    pip install -e '.[oracle]' sentence-transformers
    python -m tests.families.oracle.make_embeddings

Each file holds the vectors of `tiny_embedder.texts`, those of the first few under the prompt of a
query, and the hash of the weights, which are not stored.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from tests.support import tiny_embedder
from tests.support.paths import GOLDEN
from tests.support.tiny import fingerprint


def make(version: str) -> None:
    """Write one file."""
    with tempfile.TemporaryDirectory() as folder:
        path = tiny_embedder.write_embedder(Path(folder) / version, version)
        model = SentenceTransformer(str(path), device="cpu")
        texts = tiny_embedder.texts()
        # One by one: in a batch a text's padding would round its sums otherwise.
        vectors = np.stack([model.encode(text) for text in texts])
        queries = np.stack([model.encode(text, prompt_name="query") for text in texts[:3]])
    out = GOLDEN.with_name("golden_embeddings")
    out.mkdir(exist_ok=True)
    np.savez_compressed(
        out / f"{version}.npz",
        vectors=vectors,
        queries=queries,
        sha256=np.array(fingerprint(tiny_embedder.weights(version))),
    )
    spread = np.abs(vectors @ vectors.T - np.eye(len(vectors))).max()
    print(f"{version}: {vectors.shape}, most alike {spread:.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in tiny_embedder.CONFIGS:
        make(each)
