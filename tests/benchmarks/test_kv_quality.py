"""The benchmarks of packed KV: what is compared, and that they run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.kv_quality import Quality, Text, markdown, measure
from benchmarks.report import Run, machine_lines, summary
from mlxkv.cache import make_caches
from mlxkv.models.loader import load_model
from mlxkv.nn.model import CausalLM
from tests.support.command_line import chat_model
from tests.support.paths import ROOT
from tests.support.tiny import tokens as random_tokens

N, SKIPPED = 300, 100


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return chat_model(tmp_path_factory.mktemp("models") / "tiny", family="gemma3")


@pytest.fixture(scope="module")
def model(path) -> CausalLM:
    return load_model(path, mx.float32)


def tokens(model: CausalLM) -> list[int]:
    return random_tokens(N, model.config.vocab_size)


def test_native_beside_native_is_the_same(model):
    native, again = measure(model, Text(tokens(model), SKIPPED, 64), ["native"])
    assert (again.kl_mean, again.kl_max, again.n_same) == (0, 0, again.n_positions)
    assert again == native


@pytest.mark.parametrize("chunk", [7, 299])
def test_every_position_behind_the_skipped_ones_counts_once(model, chunk):
    """Against the definitions, written out, over the same chunks."""
    given = tokens(model)
    _, found = measure(model, Text(given, SKIPPED, chunk), ["q4"])
    log_p = {}
    for kv_type in ("native", "q4"):
        caches, x = make_caches(model, kv_type), mx.array([given])
        parts = [model(x[:, i : min(i + chunk, N - 1)], caches) for i in range(0, N - 1, chunk)]
        logits = np.array(mx.concatenate(parts, axis=1)[0], np.float64)[SKIPPED:]
        log_p[kv_type] = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    p, q = log_p["native"], log_p["q4"]
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    assert found.n_positions == len(kl) == N - 1 - SKIPPED
    # The head's product over other rows: float32.
    got = (found.kl_mean, found.kl_median, found.kl_max)
    np.testing.assert_allclose(got, (kl.mean(), np.median(kl), kl.max()), rtol=1e-3)
    assert found.n_same == (p.argmax(axis=-1) == q.argmax(axis=-1)).sum()
    following = q[np.arange(len(q)), given[SKIPPED + 1 :]]
    assert found.perplexity == pytest.approx(np.exp(-following.mean()), rel=1e-4)


def test_the_command_writes_figures_for_every_format(path, tmp_path):
    text = tmp_path / "text.md"
    text.write_text("A river begins where rain and melting snow find the same slope. " * 6)
    command = [sys.executable, "-m", "benchmarks.kv_quality", f"--model={path}", f"--text={text}"]
    command += ["--skip=50", "--positions=200", f"--output={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    rows = [Quality(**row) for row in written["summary"]]
    assert [row.kv_type for row in rows] == ["native", "q8", "k8v4", "q4"]
    assert {row.n_positions for row in rows} == {200}
    assert 0 == rows[0].kl_max < rows[1].kl_mean < rows[2].kl_mean < rows[3].kl_mean
    assert str(tmp_path) not in json.dumps(written)
    assert (tmp_path / "out.md").read_text() == markdown(written)
    assert machine_lines(written)[0] in done.stdout


def test_a_text_that_is_too_short_is_told(path, tmp_path):
    (tmp_path / "text.md").write_text("short")
    command = [sys.executable, "-m", "benchmarks.kv_quality", f"--model={path}"]
    command += [f"--text={tmp_path / 'text.md'}", f"--output={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "the text has 5 tokens; --skip and --positions take 1,537\n"


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
