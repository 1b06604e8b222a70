"""How much a conversion changed the values of a quantized source, measured while it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from .plan import DTYPES, PlannedTensor
from .report import became
from .tensors import SourceTensor, matrix_shape

SAMPLE = 1 << 16
"""Values of each tensor that are compared, from its first rows."""


@dataclass(slots=True)
class Fidelity:
    """Sums over samples, by what became what ("FP8 as bfloat16")."""

    _sums: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(
        self, planned: PlannedTensor, source: SourceTensor, start: int, arrays: Sequence[mx.array]
    ) -> None:
        """Compare a tensor's first block as written with its values."""
        if start or planned.source_dtype in DTYPES or planned.is_same:
            return
        columns, step = matrix_shape(planned.shape)[1], source.row_step
        n = min(arrays[0].shape[0], max(1, SAMPLE // columns // step) * step)
        values = source.rows(0, n).astype(mx.float32)
        difference = _values(planned, [array[:n] for array in arrays]) - values
        sums = [float(mx.square(part).sum()) for part in (difference, values)]
        kind = became(planned)
        before = self._sums.get(kind, (0.0, 0.0))
        self._sums[kind] = before[0] + sums[0], before[1] + sums[1]

    def errors(self) -> dict[str, float]:
        """Root mean square of the differences over that of the values."""
        return {kind: (a / b) ** 0.5 if b else 0.0 for kind, (a, b) in self._sums.items()}


def _values(planned: PlannedTensor, arrays: Sequence[mx.array]) -> mx.array:
    """Rows as they will be read, float32."""
    q, (weight, *parts) = planned.quantization, arrays
    if q is None:
        return weight.astype(mx.float32)
    parts = [part.astype(mx.float32) if q.mode == "affine" else part for part in parts]
    return mx.dequantize(
        weight, *parts, group_size=q.group_size, bits=q.bits, mode=q.mode, dtype=mx.float32
    )
