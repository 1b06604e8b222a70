"""Settings of the whole suite."""

from __future__ import annotations

import os

import hypothesis

# No test finds on disk what another one computed; those that are about it choose a folder.
os.environ["MLXKV_KV_DISK"] = "0"

# What the developer's own shell sets for a model is not what a test expects.
for name in ("CONTEXT", "KV_TYPE", "MEMORY", "OVERFLOW", "KEEP"):
    os.environ.pop(f"MLXKV_{name}", None)

# Tiny models on shared machines: a slow example is no failure, and a run repeats itself.
hypothesis.settings.register_profile("mlxkv", deadline=None, derandomize=True)
hypothesis.settings.load_profile("mlxkv")
