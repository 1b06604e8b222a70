"""The shim: where it works, and that MLX then decides as on a Mac's GPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.metal import shim
from tests.support.paths import ROOT

# (B, query heads, KV heads, L, S, head, mask) -> whether one kernel does it, in bfloat16.
ATTENTION = {
    (1, 32, 8, 1, 2048, 128, None): True,
    (4, 32, 8, 1, 2048, 128, "array"): True,
    (1, 8, 4, 1, 512, 256, None): True,
    (1, 20, 1, 1, 2048, 576, None): False,
    (1, 8, 8, 1, 2048, 192, None): False,
    (1, 40, 1, 1, 2048, 128, None): False,
    (1, 8, 1, 1, 2048, 512, None): True,
    (1, 8, 1, 1, 512, 512, None): False,
    (1, 16, 2, 1, 2048, 512, "array"): False,
    (1, 32, 8, 2048, 4096, 128, "causal"): True,
    (1, 64, 8, 2048, 2175, 64, "array"): True,
    (1, 8, 4, 2048, 2048, 256, "causal"): True,
    (1, 8, 4, 2048, 4096, 256, "causal"): False,
    (1, 8, 4, 512, 512, 256, "causal"): False,
    (1, 8, 1, 2048, 4096, 512, "causal"): True,
    (1, 8, 1, 512, 1024, 512, "causal"): False,
}

BUILD = """
import json, sys
from pathlib import Path
import mlx.core as mx
from tests.metal import shim

shim.install(Path(sys.argv[1]))
evaluate = mx.eval
with shim.gpu():
    names = []
    for B, H, Hk, L, S, D, mask in json.loads(sys.argv[2]):
        q, k = mx.zeros((B, H, L, D), mx.bfloat16), mx.zeros((B, Hk, S, D), mx.bfloat16)
        mask = mx.zeros((L, S), mx.bool_) if mask == "array" else mask
        out = mx.fast.scaled_dot_product_attention(q, k, k, scale=1.0, mask=mask)
        names.append([op["name"] for op in shim.graph(out)["ops"]])
    x = mx.fast.rms_norm(mx.zeros((2, 64)), mx.ones((64,)), 1e-5)
    names.append([op["name"] for op in shim.graph(x)["ops"]])
    try:
        evaluate(x)
        names.append(["evaluated"])
    except RuntimeError:
        names.append([])
json.dump(names, sys.stdout)
"""


@pytest.fixture(scope="module")
def built(shim_folder) -> list[list[str]]:
    """Operations of each attention, of a norm, and of what was evaluated."""
    command = [sys.executable, "-c", BUILD, str(shim_folder), json.dumps(list(ATTENTION))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("shapes", ATTENTION)
def test_attention_takes_one_kernel_where_metal_has_it(built, shapes):
    names = built[list(ATTENTION).index(shapes)]
    assert ("ScaledDotProductAttention" in names) == ATTENTION[shapes]
    assert ("Softmax" in names) != ATTENTION[shapes]


def test_a_norm_is_one_operation(built):
    assert "RMSNorm" in built[-2]


def test_nothing_is_evaluated_on_the_gpu(built):
    assert built[-1] == []


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(shim.sys, "platform", "linux")
    monkeypatch.setattr(shim.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(shim.shutil, "which", lambda tool: None)
    assert shim.why_not() == "g++ and nm not installed"


def test_another_machine_is_named(monkeypatch):
    monkeypatch.setattr(shim.sys, "platform", "darwin")
    monkeypatch.setattr(shim.platform, "machine", lambda: "arm64")
    assert shim.why_not() == "the shim patches Linux x86_64 code; this is darwin arm64"


def test_another_mlx_is_named_beside_the_one_that_was_decoded(monkeypatch):
    monkeypatch.setattr(shim.sys, "platform", "linux")
    monkeypatch.setattr(shim.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(shim.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(shim, "version", lambda: "9.9")
    reason = shim.why_not()
    assert reason is not None
    assert shim.DECODED_FROM in reason and "9.9" in reason
