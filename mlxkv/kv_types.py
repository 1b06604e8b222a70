"""What the formats of a KV cache are called; `kv_format` has what they are."""

KV_TYPES = ("native", "q8", "q4")
"""KV formats that a cache can be made in: `native` keeps the dtype that the model computes in."""
LAYOUTS = {"native": "native", "q8": "q8, side by side", "q4": "q4, side by side"}
"""KV format -> what its arrays are called in a model's fingerprint: another where they are laid out
in another way, so that KV on disk of the earlier one is not taken for it."""
AUTO = "auto"
KV_CHOICES = (*KV_TYPES, AUTO)
"""What `--kv-type` takes: with `auto` KV is native, and packed where memory is short."""
