"""How calls are written: JSON, pairs of tags, Python; and values that are nearly JSON."""
