"""llama.cpp's adapters, and adapters fused into weights."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFWriter

import mlxkv
from mlxkv.convert import convert
from mlxkv.convert.adapter import read_adapter
from mlxkv.errors import UnsupportedModel
from mlxkv.models import family_for
from mlxkv.models.adapters import Weighted, attach
from tests.models.test_adapters import TOLERANCE, K, Q, adapted, logits_of, mlx_lm, stored
from tests.support.gguf_files import gguf_name, permuted
from tests.support.tiny import llama_config, tokens, write_checkpoint

DOWN = "model.layers.2.mlp.down_proj"
TARGETS = {Q: (64, 64), K: (64, 32), DOWN: (96, 64)}
CONFIG = llama_config(tie_word_embeddings=True)


def write_gguf(path: Path, adapter: Path, kind: str = "adapter") -> Path:
    """An adapter as llama.cpp's converter writes it, with q and k in its order."""
    writer = GGUFWriter(path, "llama")
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 6.0)
    for name, target in read_adapter(adapter).targets.items():
        a, b = np.array(target.a.T), np.array(target.b.T)
        if "q_proj" in name or "k_proj" in name:
            b = permuted(b, b.shape[0] // 16)
        stem = gguf_name(f"{name}.weight", "llama")
        writer.add_tensor(f"{stem}.lora_a", np.ascontiguousarray(a))
        writer.add_tensor(f"{stem}.lora_b", np.ascontiguousarray(b))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "base", CONFIG)


def test_a_gguf_adapter_is_the_one_it_was_made_of(base: Path, tmp_path: Path) -> None:
    first = mlx_lm(tmp_path / "a", TARGETS, scale=2.0)  # alpha 6 of rank 3
    model = mlxkv.load_model(base, dtype=mx.float32)
    file = write_gguf(tmp_path / "a.gguf", first)
    attach(model, family_for(CONFIG, ""), [Weighted(read_adapter(file, CONFIG))])
    expected = logits_of(adapted(base, (first, 1.0)), tokens(20))
    np.testing.assert_allclose(logits_of(model, tokens(20)), expected, atol=1e-5)
    with pytest.raises(UnsupportedModel, match=r"an adapter .* and no model") as caught:
        convert(file, tmp_path / "out")
    assert [(hint.field, hint.value) for hint in caught.value.hints] == [("adapter", str(file))]
    other = write_gguf(tmp_path / "m.gguf", first, kind="model")
    with pytest.raises(UnsupportedModel, match=r"'general.type' is 'model'"):
        read_adapter(other)


def test_fused_weights_give_the_logits_of_the_adapter(base: Path, tmp_path: Path) -> None:
    targets = {**TARGETS, "model.embed_tokens": (96, 64)}
    plain = mlx_lm(tmp_path / "plain", targets)
    magnitudes = {f"{Q}.m": mx.arange(64) / 16 + 0.5, f"{DOWN}.m": mx.arange(64) / 32 + 0.5}
    dora = mlx_lm(tmp_path / "dora", {Q: (64, 64), DOWN: (96, 64)}, fine_tune_type="dora")
    file = dora / "adapters.safetensors"
    mx.save_safetensors(str(file), {**stored(file), **magnitudes})
    convert(base, tmp_path / "out", adapters=[(plain, 0.5), (dora, 1.0)])
    got = logits_of(mlxkv.load_model(tmp_path / "out", dtype=mx.float32), tokens(20))
    # One after the other, as the second's norms are those of what the first made.
    convert(base, tmp_path / "half", adapters=[(plain, 0.5)])
    expected = logits_of(adapted(tmp_path / "half", (dora, 1.0)), tokens(20))
    assert abs(got - expected).max() / expected.std() < TOLERANCE
    beside = logits_of(adapted(base, (plain, 0.5)), tokens(20))
    half = logits_of(mlxkv.load_model(tmp_path / "half", dtype=mx.float32), tokens(20))
    assert abs(half - beside).max() / beside.std() < TOLERANCE


def test_a_quantized_source_is_quantized_again_where_an_adapter_changes_it(
    base: Path, tmp_path: Path
) -> None:
    convert(base, tmp_path / "q8", quantize="affine8", group_size=32)
    adapter = mlx_lm(tmp_path / "a", {Q: (64, 64)})
    convert(tmp_path / "q8", tmp_path / "out", adapters=[(adapter, 1.0)])
    before = stored(tmp_path / "q8" / "model.safetensors")
    after = stored(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert changed == {f"{Q}.weight", f"{Q}.scales", f"{Q}.biases"}
    values, now = (
        mx.dequantize(x[f"{Q}.weight"], x[f"{Q}.scales"], x[f"{Q}.biases"], 32, 8)
        for x in (before, after)
    )
    target = read_adapter(adapter).targets[Q]
    expected = values + target.scale * (target.a @ target.b).T
    error = mx.sqrt(mx.square(now - expected).mean() / mx.square(expected).mean())
    assert float(error) < 0.005  # half a step of 8 bits is some 0.004 of a group's range
