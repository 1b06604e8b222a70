"""GGUF files that are found beside the plain ones: split, in 4-bit floats, adapters, odd tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quants
from tokenizers import Tokenizer

import mlxkv
from mlxkv.convert import convert, describe
from mlxkv.convert.gguf.families.common import is_past_the_end
from mlxkv.convert.gguf.families.gemma4 import reads_anothers_kv
from mlxkv.convert.gguf.file import open_gguf
from mlxkv.convert.gguf.tokenizer import gguf_tokenizer
from mlxkv.errors import CheckpointError, ModelNotFound, TokenizerError, UnsupportedModel
from tests.support import tiny
from tests.support.gguf_families import write_family
from tests.support.gguf_files import random_blocks, write_gguf, write_model
from tests.support.paths import TOKENIZERS


def typed(kind: str, end: str | tuple[str, ...]) -> Callable[[str], str]:
    return lambda name: kind if name.endswith(end) else "F32"


def split(whole: Path, folder: Path, n_tensors: int) -> list[Path]:
    """A file's tensors in several files, as llama.cpp's `gguf-split` writes them."""
    file = open_gguf(whole)
    tensors = list(file.tensors.values())
    groups = [tensors[i : i + n_tensors] for i in range(0, len(tensors), n_tensors)]
    paths = []
    for number, group in enumerate(groups):
        paths.append(folder / f"m-{number + 1:05d}-of-{len(groups):05d}.gguf")
        writer = GGUFWriter(paths[-1], "llama")
        if number:
            writer.kv_data[0].clear()
        else:
            for key, value in file.metadata.items():
                if key == "general.architecture":
                    continue
                listed = value.tolist() if isinstance(value, np.ndarray) else value
                by_type = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
                by_type |= {float: writer.add_float32, list: writer.add_array}
                by_type[type(listed)](key, listed)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", len(groups))
        writer.add_int32("split.tensors.count", len(tensors))
        for tensor in group:
            rows = file.read_rows(tensor, 0, int(np.prod(tensor.shape[:-1], dtype=int)))
            writer.add_tensor(tensor.name, rows.view("<f4").reshape(tensor.shape))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_any_part_of_a_split_model_stands_for_all(tmp_path: Path):
    whole = write_model(tmp_path / "whole.gguf", tiny.llama_config())
    (tmp_path / "parts").mkdir()
    paths = split(whole, tmp_path / "parts", 10)
    assert len(paths) == 3
    convert(whole, tmp_path / "a")
    expected = (tmp_path / "a" / "model.safetensors").read_bytes()
    for name, source in {"last": paths[2], "folder": tmp_path / "parts"}.items():
        convert(source, tmp_path / name)
        assert (tmp_path / name / "model.safetensors").read_bytes() == expected
    second = paths[1].read_bytes()
    paths[1].unlink()
    with pytest.raises(ModelNotFound, match=r"1 of 3 parts are missing .* m-00002-of-00003\.gguf"):
        convert(paths[0], tmp_path / "b")
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(CheckpointError, match="says that it is part 2 of 3"):
        convert(paths[0], tmp_path / "b")
    paths[1].write_bytes(second[: len(second) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        convert(paths[0], tmp_path / "b")
    paths[1].write_bytes(second)
    alone = paths[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(CheckpointError, match="must be named NAME-00001-of-00003"):
        convert(alone, tmp_path / "b")


@pytest.mark.parametrize(
    ("kind", "holds"), [("adapter", "an adapter"), ("imatrix", "an importance matrix")]
)
def test_a_file_without_a_model_says_what_it_holds(tmp_path: Path, kind: str, holds: str):
    tensors = {"blk.0.attn_q.weight.lora_a": np.zeros((4, 8), np.float32)}
    path = write_gguf(tmp_path / "a.gguf", tensors, "llama", {"general.type": kind})
    with pytest.raises(UnsupportedModel, match=f"holds {holds}"):
        convert(path, tmp_path / "out")


def test_experts_in_mxfp4_stay_packed(tmp_path: Path):
    config = {
        "model_type": "gpt_oss", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 16,
        "rope_theta": 150000.0, "tie_word_embeddings": False, "torch_dtype": "float32",
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        name: shape
        for name, shape in tiny.tensor_shapes({**config, "attention_bias": True}).items()
        if ".mlp." not in name
    }
    for i in range(2):
        at, E, n = f"model.layers.{i}", 64, 3
        shapes[f"{at}.self_attn.sinks"] = (4,)
        shapes |= {f"{at}.mlp.router.weight": (n, E), f"{at}.mlp.router.bias": (n,)}
        shapes[f"{at}.mlp.experts.gate_up_proj"] = (n, E, 128)
        shapes[f"{at}.mlp.experts.gate_up_proj_bias"] = (n, 128)
        shapes[f"{at}.mlp.experts.down_proj"] = (n, 64, E)
        shapes[f"{at}.mlp.experts.down_proj_bias"] = (n, E)
    path = write_family(tmp_path / "f.gguf", config, tiny.random_weights(shapes))
    file = open_gguf(path)
    tensors: dict[str, Any] = {}
    for name, tensor in file.tensors.items():
        rows = file.read_rows(tensor, 0, int(np.prod(tensor.shape[:-1], dtype=int)))
        tensors[name] = rows.view("<f4").reshape(tensor.shape)
        if "_exps.weight" in name:
            blocks = random_blocks("MXFP4", (int(np.prod(tensor.shape[:-1])), 64))
            blocks[:, ::17] = 122 + blocks[:, ::17] % 4  # scales that make values of some 0.1
            tensors[name] = blocks.reshape(*tensor.shape[:-1], -1)
    keys = {k.removeprefix("gpt-oss."): v for k, v in file.metadata.items()}
    del keys["general.architecture"]
    keys = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in keys.items()}
    packed = write_gguf(
        tmp_path / "p.gguf", tensors, "gpt-oss", keys, typed("MXFP4", "exps.weight")
    )
    plan = convert(packed, tmp_path / "packed", dtype="float32").plan
    kinds = {t.quantization.mode for t in plan.tensors if t.quantization is not None}
    assert kinds == {"mxfp4"} and all(t.is_exact for t in plan.tensors)
    convert(packed, tmp_path / "plain", quantize="none", dtype="float32")
    prompt = mx.array([tiny.tokens(40)])
    got, expected = (
        np.array(mlxkv.load_model(tmp_path / name, dtype=mx.float32)(prompt))
        for name in ("packed", "plain")
    )
    np.testing.assert_allclose(got, expected, atol=1e-3 * expected.std(), rtol=0)


def test_the_second_scale_of_nvfp4_counts(tmp_path: Path):
    """A scale of 1 is not stored, and values stay; with another the nearest are within an eighth of
    the larger scale of each 32 values."""
    config = tiny.llama_config()
    weights = tiny.random_weights(tiny.tensor_shapes(config))
    base = open_gguf(write_model(tmp_path / "f.gguf", config, weights=weights))
    names = ("blk.0.ffn_up.weight", "blk.1.ffn_up.weight")
    blocks = random_blocks("NVFP4", (96, 64))
    blocks[:, :4] = 48 + blocks[:, :4] % 16
    tensors: dict[str, Any] = {
        name: base.read_rows(t, 0, int(np.prod(t.shape[:-1], dtype=int))).view("<f4")
        .reshape(t.shape)
        for name, t in base.tensors.items()
    }  # fmt: skip
    tensors |= dict.fromkeys(names, blocks)
    tensors["blk.0.ffn_up.scale"] = np.array([0.0123], np.float32)
    tensors["blk.0.ffn_up.input_scale"] = np.array([0.5], np.float32)
    keys = {k.removeprefix("llama."): v for k, v in base.metadata.items()}
    del keys["general.architecture"]
    keys = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in keys.items()}
    path = write_gguf(tmp_path / "a.gguf", tensors, "llama", keys, typed("NVFP4", names))
    plan = convert(path, tmp_path / "out").plan
    assert "nearest values: 1 tensors, NVFP4 as affine6 g32" in describe(plan)
    stored: Any = mx.load(str(tmp_path / "out" / "model.safetensors"))
    true = quants.dequantize(blocks, GGMLQuantizationType["NVFP4"])
    arrays = [stored[f"model.layers.1.mlp.up_proj.{part}"] for part in ("weight", "scales")]
    exact = mx.dequantize(*arrays, group_size=16, bits=4, mode="nvfp4", dtype=mx.float32)
    np.testing.assert_array_equal(np.array(exact), true)
    parts = ("weight", "scales", "biases")
    arrays = [stored[f"model.layers.0.mlp.up_proj.{part}"] for part in parts]
    arrays = [a if a.dtype == mx.uint32 else a.astype(mx.float32) for a in arrays]
    near = np.array(mx.dequantize(*arrays, group_size=32, bits=6)) / 0.0123
    larger = 4 * np.array(arrays[1]) / 0.0123
    assert (np.abs(near - true).reshape(96, 2, 32) <= 0.13 * larger[..., None]).all()
    assert np.abs(near - true).max() > 0


def gemma_metadata(**changes: Any) -> tuple[Tokenizer, dict[str, Any]]:
    own = Tokenizer.from_file(str(TOKENIZERS / "gemma" / "tokenizer.json"))
    model = json.loads(own.to_str())["model"]
    names = [token for token, _ in sorted(own.get_vocab().items(), key=lambda item: item[1])]
    types = [6 if len(n) == 6 and n.startswith("<0x") else 1 for n in names]
    for i, token in own.get_added_tokens_decoder().items():
        types[i] = 3 if token.special else 4
    return own, {
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.add_bos_token": False,
        **changes,
    }


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_gemma_without_its_sentencepiece_model_has_merges(tmp_path: Path, kind: str):
    """As byte-level, or as SentencePiece with the same score for all."""
    own, metadata = gemma_metadata()
    metadata |= {"tokenizer.ggml.model": kind, "tokenizer.ggml.add_space_prefix": False}
    metadata["tokenizer.ggml.pre"] = "default"
    if kind == "llama":
        metadata["tokenizer.ggml.scores"] = [-1000.0] * len(metadata["tokenizer.ggml.tokens"])
    path = write_gguf(tmp_path / "a.gguf", {"x": np.zeros((2, 2), "f4")}, "gemma3", metadata)
    made = gguf_tokenizer(open_gguf(path))
    for text in ("A sentence, with  two spaces.\n\tx=1", "héllo ☃ 日本", "<end_of_turn>a"):
        expected = own.encode(text, add_special_tokens=False).ids
        assert made.encode(text, add_special_tokens=False).ids == expected


def test_scores_that_are_all_alike_are_an_error(tmp_path: Path):
    _, metadata = gemma_metadata(**{"tokenizer.ggml.model": "llama"})
    del metadata["tokenizer.ggml.merges"]
    metadata["tokenizer.ggml.scores"] = [-1000.0] * len(metadata["tokenizer.ggml.tokens"])
    path = write_gguf(tmp_path / "a.gguf", {"x": np.zeros((2, 2), "f4")}, "llama", metadata)
    with pytest.raises(TokenizerError, match=r"scores are all -1000\.0.*its tokenizer\.model"):
        gguf_tokenizer(open_gguf(path))


@pytest.mark.parametrize("name", ["blk", "blk.x", "blk.x.attn_k.weight", "blk.99999999999.a"])
def test_a_name_that_is_of_no_block_is_none(name: str):
    """Found by mutations: a Gemma 4's name without a number ended in a trace."""
    config = {"num_hidden_layers": 2, "num_kv_shared_layers": 1}
    assert reads_anothers_kv(name, config) == is_past_the_end(name, config) == ""
    assert reads_anothers_kv("blk.1.attn_k.weight", config)
    assert is_past_the_end("blk.2.attn_k.weight", config)
