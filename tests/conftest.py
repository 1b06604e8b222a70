"""Settings of the whole suite."""

from __future__ import annotations

import os

import hypothesis

# No test finds on disk what another one computed; those that are about it choose a folder.
os.environ["MLXKV_KV_DISK"] = "0"

# Tiny models on shared machines: a slow example is no failure, and a run repeats itself.
hypothesis.settings.register_profile("mlxkv", deadline=None, derandomize=True)
hypothesis.settings.load_profile("mlxkv")
