"""Embedding models against sentence-transformers: vectors that oracle/make_embeddings.py wrote.

Tolerance: a cosine of 0.999999 or more. Both sides compute in float32; a correct model is within
3e-7 of 1, and version 1 with a window that is one token too wide shows 0.999997.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxkv
from mlxkv.convert import convert
from mlxkv.errors import ConfigError, ContextExceeded, OutOfMemory, UsageError
from mlxkv.generation import embed
from mlxkv.llm.llm import LLM
from mlxkv.models.loader import load_model
from tests.support import tiny_embedder
from tests.support.command_line import chat_model
from tests.support.paths import GOLDEN
from tests.support.tiny import fingerprint, write_checkpoint

LEAST = 0.999999
TEXTS = tiny_embedder.texts()
any_device = pytest.mark.any_device


@functools.cache
def golden(version: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN.with_name("golden_embeddings") / f"{version}.npz") as data:
        found = dict(data)
    assert fingerprint(tiny_embedder.weights(version)) == str(found["sha256"])
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("embedders")
    return {name: tiny_embedder.write_embedder(root / name, name) for name in ("v1", "v2")}


@pytest.fixture(scope="module")
def llms(folders) -> dict[str, LLM]:
    return {name: mlxkv.load(path, dtype="float32") for name, path in folders.items()}


def cosines(found: mx.array, expected: np.ndarray) -> np.ndarray:
    a, b = np.array(found, np.float64), expected.astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_texts_of_any_length_in_one_call_have_the_vectors_of_each_alone(llms, version):
    vectors = llms[version].embed(TEXTS)
    assert cosines(vectors, golden(version)["vectors"]).min() >= LEAST
    np.testing.assert_allclose(np.linalg.norm(np.array(vectors), axis=1), 1, atol=1e-6)
    queries = llms[version].embed(TEXTS[:3], prompt="query")
    assert cosines(queries, golden(version)["queries"]).min() >= LEAST


@any_device
def test_shorter_vectors_are_the_first_values_scaled_again(llms):
    whole = np.array(llms["v1"].embed(TEXTS[:3]))[:, :16]
    short = np.array(llms["v1"].embed(TEXTS[:3], dimensions=16))
    np.testing.assert_allclose(short, whole / np.linalg.norm(whole, axis=1)[:, None], atol=1e-6)
    assert llms["v1"].embed("w7", dimensions=16).shape == (16,)


@any_device
def test_what_cannot_be_embedded_is_an_error_that_says_why(llms, tmp_path):
    llm = llms["v1"]
    with pytest.raises(UsageError, match=r"prompt must be one of document, query; got 'no'"):
        llm.embed("w7", prompt="no")
    with pytest.raises(UsageError, match="dimensions must be 1 to 64; got 65"):
        llm.embed("w7", dimensions=65)
    with pytest.raises(UsageError, match="texts must be 1 to"):
        llm.embed([])
    for nothing in (None, 5):
        with pytest.raises(UsageError, match=r"texts must be a text or a list of texts; got "):
            llm.embed(nothing)  # pyright: ignore[reportArgumentType]
    long = "w9 " * 2047
    with pytest.raises(ContextExceeded, match=r"text 2 has 2,049 tokens and the model takes 2,048"):
        llm.embed(["w9", long])
    cut = llm.embed(["w9 " * 2046, long], truncate=True)
    assert mx.array_equal(cut[0], cut[1])
    with pytest.raises(UsageError, match="dtype must not be float16"):
        mlxkv.load(llm.path, dtype="float16")
    with pytest.raises(UsageError, match="this is an embedding model"):
        llm.generate("w7")
    chat = mlxkv.load(chat_model(tmp_path / "chat"))
    with pytest.raises(UsageError, match="generates text and has no meaningful embeddings"):
        chat.embed("a")


@any_device
def test_vectors_that_fit_in_no_memory_together_are_refused_before_any(llms, monkeypatch):
    monkeypatch.setattr(embed.EmbedQueue, "_row_bytes", 1 << 40)
    monkeypatch.setattr(embed.EmbedQueue, "_compute", lambda *_: pytest.fail("it was computed"))
    with pytest.raises(OutOfMemory, match=r"the vectors of 3 texts take 6.* TiB, .*send fewer"):
        llms["v1"].embed(TEXTS[:3])


@any_device
def test_float16_checkpoints_compute_in_another_dtype(tmp_path):
    path = tiny_embedder.write_embedder(tmp_path / "half", dtype=mx.float16)
    config = json.loads((path / "config.json").read_text()) | {"torch_dtype": "float16"}
    (path / "config.json").write_text(json.dumps(config))
    assert load_model(path).compute_dtype == mx.float32
    llm = mlxkv.load(path, dtype="bfloat16")
    assert llm.model.compute_dtype == mx.bfloat16 and llm.embed("w7").dtype == mx.float32
    assert cosines(llm.embed(TEXTS[2:5]), golden("v1")["vectors"][2:5]).min() > 0.995


@any_device
def test_other_layouts_are_the_same_model(folders, tmp_path):
    """Version 2 inside its multimodal config, version 1 as mlx-embeddings writes it."""
    nested = shutil.copytree(folders["v2"], tmp_path / "nested")
    config = {"model_type": "embedding_gemma2", "text_config": tiny_embedder.V2}
    tensors = {f"language_model.{k}": v for k, v in tiny_embedder.weights("v2").items()}
    tensors["vision_tower.patch_embedder.weight"] = np.zeros((2, 2), np.float32)
    write_checkpoint(nested, config | {"vision_config": {"model_type": "gemma4_vision"}}, tensors)
    flat = shutil.copytree(folders["v1"], tmp_path / "flat")
    dense = enumerate(tiny_embedder.dense_weights())
    tensors = {f"model.{k}": v for k, v in tiny_embedder.weights("v1").items()}
    tensors |= {f"dense.{i}.weight": v for i, v in dense}
    write_checkpoint(flat, tiny_embedder.V1, tensors)
    for folder in ("1_Pooling", "2_Dense", "3_Dense"):
        shutil.rmtree(flat / folder)
    for path, version in ((nested, "v2"), (flat, "v1")):
        found = mlxkv.load(path, dtype="float32").embed(TEXTS[:5])
        assert cosines(found, golden(version)["vectors"][:5]).min() >= LEAST


@any_device
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "pooling_mode must be mean"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.SiLU"}, "activation_function"),
        ("config_sentence_transformers.json", {"default_prompt_name": "x"}, "default_prompt_name"),
    ],
)
def test_modules_that_compute_something_else_are_refused(folders, tmp_path, name, change, message):
    path = shutil.copytree(folders["v1"], tmp_path / "other")
    (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        load_model(path)


@any_device
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_converted_model_keeps_its_modules(folders, tmp_path, version):
    # 8 bits move the sharp attention of random weights far more than that of trained ones.
    asked: list[tuple[dict[str, Any], float]] = [
        ({"dtype": "float32"}, LEAST),
        ({"quantize": "affine8", "group_size": 32}, 0.9),
    ]
    for options, least in asked:
        out = tmp_path / str(least)
        convert(folders[version], out, **options)
        for file in folders[version].rglob("*"):
            if file.is_file() and (file.parent != folders[version] or "sentence" in file.name):
                copy = out / file.relative_to(folders[version])
                assert copy.read_bytes() == file.read_bytes(), file
        found = mlxkv.load(out, dtype="float32").embed(TEXTS[:9])
        assert cosines(found, golden(version)["vectors"][:9]).min() >= least
    with pytest.raises(UsageError, match="dtype must not be float16"):
        convert(folders[version], tmp_path / "half", dtype="float16")


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_plan_holds_what_a_batch_takes(folders, version):
    plan = mlxkv.plan(folders[version], dtype="float32")
    assert plan.batch is not None and plan.batch.longest == 2048
    assert (plan.kv_bytes, plan.pages_bytes, plan.specs) == (0, 0, ())
    llm = mlxkv.load(folders[version], dtype="float32")
    for texts in (["w9 " * 2046], ["w9 " * 126] * 16, ["w8 " * n for n in range(1, 60)]):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        llm.embed(texts)
        assert mx.get_peak_memory() - before <= plan.workspace_bytes * 1.05


@any_device
def test_batches_shrink_to_the_memory_there_is(llms, monkeypatch):
    llm, sizes = mlxkv.load(llms["v1"].path, dtype="float32"), []
    queue = embed.EmbedQueue(llm.model, llm.budget, 2048)  # pyright: ignore[reportArgumentType]
    compute = queue._compute

    def counted(batch):
        sizes.append(sum(len(job.ids[i]) for job, i in batch))
        compute(batch)

    monkeypatch.setattr(queue, "_compute", counted)
    monkeypatch.setattr(embed, "default_chunk", lambda: 64)
    monkeypatch.setattr(queue, "_most", 64)
    llm.budget.limit_bytes = llm.budget.used_bytes + queue._needs.of(32)
    found: list[mx.array | Exception] = []
    ids = [[2, *range(4, 4 + n), 1] for n in (3, 28, 9, 8, 8, 20)]
    for each in ([ids[0]], ids[1:], [list(range(4, 90)) * 3]):
        queue.add(embed.EmbedJob(each, None, found.append))
    while queue:
        queue.step()
    refused = next(x for x in found if isinstance(x, OutOfMemory))
    assert "258 tokens takes" in str(refused)
    assert max(sizes) <= 32 and sum(sizes) == sum(map(len, ids)) and len(found) == 3
