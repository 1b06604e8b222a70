"""Gemma 4's assistant: parity with transformers' module, and drafts that change no answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxkv
from mlxkv.convert import convert
from mlxkv.generation.decoder import Decoder, Row
from mlxkv.generation.drafts.borrowed import Borrowed
from mlxkv.generation.drafts.drafts import Drafts
from mlxkv.generation.drafts.pace import Time
from mlxkv.generation.session import Session
from mlxkv.kv.types import KV_TYPES
from mlxkv.models.loader import lay_out
from tests.families.oracle import assistant_cases as oracle
from tests.families.test_parity import Golden
from tests.generation.test_decoder import GREEDY, KINDS, Request
from tests.generation.test_speculate import Eager
from tests.support import tiny

TOLERANCE = 1e-4
"""In standard deviations: float32 against float64."""


def made(folder: Path, case: str, **changes: Any) -> Path:
    """A Gemma 4, with an assistant beside it."""
    config = {**oracle.config(case), **changes}
    tiny.write_checkpoint(folder / "gemma-assistant", config, oracle.weights(case))
    return Golden.read("gemma4-dense").write(folder / "gemma", "new")


@pytest.fixture(scope="module", params=oracle.CASES)
def pair(request, tmp_path_factory) -> tuple[str, Any]:
    folder = made(tmp_path_factory.mktemp("assistant"), request.param)
    return request.param, mlxkv.load_model(folder, dtype=mx.float32)


def test_parity_with_transformers(pair):
    case, model = pair
    path = Path(__file__).parent / "golden_assistant" / f"{case}.npz"
    x = {name: mx.array(array) for name, array in oracle.inputs().items()}
    kinds = {kind: (x[f"{kind}.k"], x[f"{kind}.v"]) for kind in oracle.DIMS}
    kv, hidden = [kinds[kind] for kind in oracle.TYPES], x["hidden"]
    with np.load(path) as golden:
        for i, embedding in enumerate(x["embeddings"]):
            hidden, logits = model.assistant(embedding, hidden, kv, oracle.N_HELD)
            for ours, name in ((logits, "logits"), (hidden, "hidden")):
                theirs = golden[name][i]
                assert np.abs(np.array(ours)[0] - theirs).max() < TOLERANCE * theirs.std(), name


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_drafts_of_an_assistant_change_no_answer(pair, kv_type: str):
    _, model = pair
    requests = [
        Request(tuple(tiny.tokens(n, seed=n)), params, 30, kv_type)
        for n, params in ((9, GREEDY), (60, KINDS[3]))  # one past the window of 24
    ]
    decoder, rows = Decoder(model, Eager()), []
    for request in requests:
        session = Session(model, kv_type)
        session.listener = drafter = Borrowed(model.reader(), Time(), session.caches)
        logits = session.prefill(request.prompt, chunk=20)
        rows.append(row := Row(session, logits, request.sampler(model), request.n))
        row.drafts = Drafts([drafter])
        decoder.add(row)
    while decoder.rows:
        list(decoder.step())
    for row, request in zip(rows, requests, strict=True):
        assert row.tokens == request.alone(model)
        assert row.drafts is not None and row.drafts.counts.by["mtp"][0] > 0


def test_what_it_reads_is_the_last_full_and_the_last_sliding_layers(pair):
    _, model = pair
    caches = mlxkv.make_caches(model)
    mx.eval(model(mx.array([tiny.tokens(50)]), caches))  # more than the window, in one chunk
    sliding, *_, full = model.reader().keys_values(caches)
    assert (sliding[0].shape[2], full[0].shape[2]) == (24, 50)
    assert mx.array_equal(sliding[0], caches[4].read(26, 50).arrays[0])
    assert mx.array_equal(full[1], caches[5].read(0, 50).arrays[1])


@pytest.mark.parametrize("is_large_packed", [False, True])
def test_a_quantized_assistant_has_formats_of_its_own(tmp_path: Path, is_large_packed: bool):
    folder, beside = made(tmp_path, "clusters"), tmp_path / "gemma-assistant"
    if is_large_packed:  # in another format
        convert(folder, tmp_path / "small", quantize="q4")
        folder, beside = tmp_path / "small", beside.rename(tmp_path / "small-assistant")
    raw = json.loads((beside / "config.json").read_text())
    weights: dict[str, Any] = dict(mx.load(str(beside / "model.safetensors")))  # pyright: ignore
    packed, how = dict(weights), dict[str, Any](group_size=32, bits=8)
    for name, array in packed.copy().items():
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            at, parts = name.removesuffix("weight"), mx.quantize(array, **how)
            packed |= zip((name, f"{at}scales", f"{at}biases"), parts, strict=True)
            weights[name] = mx.dequantize(*parts, **how)
    models = []
    for arrays, quantization in ((weights, None), (packed, {**how, "mode": "affine"})):
        mx.save_safetensors(str(beside / "new.safetensors"), arrays)
        (beside / "new.safetensors").rename(beside / "model.safetensors")
        (beside / "config.json").write_text(json.dumps({**raw, "quantization": quantization}))
        models.append(mlxkv.load_model(folder, dtype=mx.float32))
    x = {name: mx.array(array) for name, array in oracle.inputs().items()}
    kv = [(x[f"{kind}.k"], x[f"{kind}.v"]) for kind in oracle.TYPES]
    guess = x["embeddings"][0], x["hidden"], kv, oracle.N_HELD
    for one, other in zip(*(model.assistant(*guess) for model in models), strict=True):
        assert mx.abs(one - other).max() < TOLERANCE * mx.abs(one).max()
    assert ["scales" in model.assistant.model.embed_tokens for model in models] == [False, True]


def test_an_assistant_counts_and_one_of_another_model_is_left_out(tmp_path: Path, caplog):
    folder = made(tmp_path, "plain")
    with_it = lay_out(folder, "float32").nbytes
    n_bytes = sum(array.nbytes for array in oracle.weights("plain").values())
    config = {**oracle.config("plain"), "backbone_hidden_size": 64}
    (tmp_path / "gemma-assistant" / "config.json").write_text(json.dumps(config))
    assert with_it - lay_out(folder, "float32").nbytes == n_bytes
    assert "the assistant is left out" in caplog.text
    assert mlxkv.load_model(folder, dtype=mx.float32).reader() is None
