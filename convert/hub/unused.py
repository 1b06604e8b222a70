"""Arrays of other quantizers that no weight needs, and what they are for."""

from __future__ import annotations

from collections.abc import Iterable

_INPUTS = (
    "input_scale", "activation_scale", "input_global_scale", "input_scale_ub",
    "input_zero_point", "act_scale", "weight_format",
)  # fmt: skip
_KV = ("k_scale", "v_scale")
_MORE_KV = (".kv_scale", ".k_zero_point", ".v_zero_point", ".output_scale")
_ATTENTION = (".q_scale", ".prob_scale", ".prob_output_scale")
_FOR = {
    _INPUTS: "for products with quantized input",
    _KV: "for a KV cache in 8 bits; --kv-type chooses its format here",
    _MORE_KV: "for a KV cache in 8 bits; --kv-type chooses its format here",
    _ATTENTION: "for attention in 8 bits",
}


def unused_arrays(names: Iterable[str], *, quantized: bool) -> dict[str, str]:
    """Those of some arrays that no weight needs -> what they are for.

    Args:
        names: of arrays that are no part of a quantized weight.
        quantized: whether another quantizer has made the checkpoint. Models have parameters with
            some of these names too.
    """
    ends = [
        (end, why)
        for group, why in _FOR.items()
        if quantized or group in (_INPUTS, _KV)
        for end in group
    ]
    return {name: why for name in names for end, why in ends if name.endswith(end)}
