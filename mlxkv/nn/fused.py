"""Where attention is one kernel, as `attention.attend` and MLX decide it."""

from __future__ import annotations

from mlxkv.base import device

VECTOR_QUERIES = 8
"""Queries up to which MLX takes Metal's kernel for few queries, not the one for chunks."""
VECTOR_ROWS = 32
"""Queries of the heads of one KV head that Metal's kernel for few queries takes."""

CHUNK_DIMS = (64, 80, 128)
"""Head sizes that Metal's kernel for chunks takes."""


def is_fused(
    L: int, k_dim: int, v_dim: int, n_shared: int, *, quantized: bool = False, capped: bool = False
) -> bool:
    """Whether `attend` is one kernel, which keeps no scores, with every MLX from 0.32.0 on.

    The head sizes are those of `ScaledDotProductAttention::use_fallback` in MLX's Metal backend
    that all releases have; 0.32.2 adds some for chunks. Sinks and masks do not change the choice:
    the keys of a chunk are at least its queries. The CPU backend has no such kernel. CUDA's choice
    depends on the GPU and on the dtype: no.

    Args:
        L: queries of one sequence.
        k_dim: values per key.
        v_dim: values per value vector.
        n_shared: query heads for each KV head.
        quantized: whether the KV is.
        capped: whether the scores have a soft cap.
    """
    if capped or device.kind() != "metal":
        return False
    if L > VECTOR_QUERIES:  # quantized KV is dequantized first
        return k_dim == v_dim and k_dim in CHUNK_DIMS
    if quantized and L == 1:  # a product on the codes
        return False
    is_known = (k_dim == v_dim and k_dim in (64, 96, 128, 256)) or (k_dim, v_dim) == (192, 128)
    return is_known and L * n_shared <= VECTOR_ROWS
