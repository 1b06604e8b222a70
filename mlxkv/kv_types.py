"""What the formats of a KV cache are called; `kv_format` has what they are."""

KV_TYPES = ("native", "q8", "q4")
"""KV formats that a cache can be made in: `native` keeps the dtype that the model computes in."""
AUTO = "auto"
KV_CHOICES = (*KV_TYPES, AUTO)
"""What `--kv-type` takes: with `auto` KV is native, and packed where memory is short."""
