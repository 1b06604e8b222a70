"""`mlxkv bench`: how fast a model is on this machine, beside mlx-lm, and a report to share."""
