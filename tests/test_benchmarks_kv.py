"""The benchmarks of packed KV: what is compared, and that they run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.report import Run, summary
from tests.command_line import chat_model

ROOT = Path(__file__).resolve().parent.parent


# Decode speed.


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("engine", ["mlxkv", "mlx-lm"])
def test_both_engines_decode_over_packed_kv(engine, family, tmp_path):
    """mlx-lm's rotating caches cannot be packed: a note says how many layers stay native."""
    tiny = chat_model(tmp_path / "tiny", family=family, head_dim=64)
    command = [sys.executable, "-m", "benchmarks.worker", f"--engine={engine}", f"--model={tiny}"]
    command += ["--measure=speed", "--contexts=[600]", "--seconds=0", "--kv-type=q4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert set(printed["figures"]) == {"decode 600 q4 tok/s", "decode 600 q4 cpu ms/tok"}
    partly = engine == "mlx-lm" and family == "gemma3"
    assert printed["note"].startswith("q4: 5 of 6 layers native (Rotating" if partly else "")
    assert bool(printed["note"]) is partly


def test_a_format_is_a_row_of_its_own_beside_the_same_of_mlx_lm():
    runs = [
        Run("speed", engine, index, "", {f"decode 9 {kv}tok/s": speed})
        for index in range(3)
        for kv in ("", "q8 ")
        for engine, speed in (("mlxkv", 6.0), ("mlx-lm", 2.0 + len(kv)))
    ]
    rows = summary(runs)
    assert [(row.measure, row.ratio) for row in rows] == [
        ("decode 9 tok/s", 3.0),
        ("decode 9 q8 tok/s", 1.2),
    ]
    assert all(row.target == 1 for row in rows)
