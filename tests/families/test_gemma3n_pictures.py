"""Gemma 3n with pictures against transformers and timm: what make_gemma3n_pictures.py wrote.

Tolerances: rows of pictures within 1e-4 of their largest value, logits within 1e-3 of their
standard deviation, as in test_parity. Greedy tokens are taken among those of text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxkv
from mlxkv.errors import UnsupportedModel
from mlxkv.models.gemma3n_config import VisionConfig
from mlxkv.models.gemma3n_vision import VisionTower
from mlxkv.nn.batch import batch
from mlxkv.nn.model import Placed
from tests.families.oracle.gemma3n_pictures import (
    CONFIG,
    DIRECTORY,
    END,
    N_ROWS,
    SIZE,
    SIZES,
    SOFT,
    picture,
    prompts,
    weight,
)
from tests.support.tiny import fingerprint, write_checkpoint

MANIFEST = json.loads((DIRECTORY / "manifest.json").read_text())
PROMPTS = prompts(MANIFEST["seed"])


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(DIRECTORY / "golden.npz") as data:
        return dict(data)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    made = {
        name: weight(name, shape, MANIFEST["seed"]) for name, shape in MANIFEST["tensors"].items()
    }
    assert fingerprint(made) == MANIFEST["sha256"], "the weights are not those of the oracle"
    return made


@pytest.fixture(scope="module")
def model(weights, tmp_path_factory):
    return loaded(tmp_path_factory.mktemp("new"), "new", weights)


def loaded(directory: Any, style: str, weights: dict[str, np.ndarray]) -> Any:
    config = json.loads((DIRECTORY / f"config.{style}.json").read_text())
    return mlxkv.load_model(write_checkpoint(directory, config, weights), dtype=mx.float32)


def rows_of(model: Any, number: int, size: int = SIZE) -> mx.array:
    return model.media_rows("image", {"pixels": mx.array(picture(number, size))})


def media_of(tokens: Sequence[int], numbers: Sequence[int], model: Any) -> list[Placed]:
    starts = [i for i in range(1, len(tokens)) if tokens[i] == SOFT != tokens[i - 1]]
    return [
        Placed("image", start, rows_of(model, number))
        for start, number in zip(starts, numbers, strict=True)
    ]


def within(media: Sequence[Placed], start: int, stop: int) -> list[Placed]:
    """The parts of media in a chunk, which may begin or end inside one."""
    parts = []
    for kind, at, rows in media:
        first, last = max(at, start), min(at + rows.shape[0], stop)
        if first < last:
            parts.append(Placed(kind, first - start, rows[first - at : last - at]))
    return parts


def prefill(model: Any, caches: Any, name: str, chunk: int) -> mx.array:
    """Logits of every position `[L, V]`, the prompt given `chunk` tokens at a time."""
    tokens, numbers = PROMPTS[name]
    media, parts = media_of(tokens, numbers, model), list[mx.array]()
    mx.eval([placed.rows for placed in media])
    for start in range(0, len(tokens), chunk):
        part = mx.array([tokens[start : start + chunk]])
        parts.append(model(part, caches, within(media, start, start + chunk))[0])
        mx.eval(parts[-1])
    return mx.concatenate(parts)


def best(logits: mx.array) -> int:
    return int(mx.argmax(logits[:END]))


def check_logits(golden: dict[str, np.ndarray], name: str, logits: mx.array) -> None:
    expected = golden[f"logits.{name}"]
    off = np.abs(np.array(logits) - expected).max(axis=1) / expected.std()
    assert off.max() < 1e-3, f"off by {off.max():.2g} at {off.argmax()}"


@pytest.mark.parametrize("size", SIZES)
def test_rows_equal_the_reference_whether_the_adapter_pools_or_interpolates(model, golden, size):
    rows = mx.stack([rows_of(model, number, size) for number in (0, 1)])
    expected = golden[f"rows.{size}"]
    assert rows.shape == expected.shape == (2, N_ROWS, 48)
    off = np.abs(np.array(rows) - expected).max() / np.abs(expected).max()
    assert off < 1e-4
    # Random weights see little of a picture; it must still be far more than the tolerance.
    assert np.abs(expected[0] - expected[1]).max() / np.abs(expected).max() > 1e-2


@pytest.mark.parametrize(("name", "chunk"), [("one", 1), ("one", 99), ("two", 7), ("two", 99)])
def test_logits_equal_the_reference_however_the_prompt_is_cut(model, golden, name, chunk):
    check_logits(golden, name, prefill(model, mlxkv.make_caches(model), name, chunk))


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_tokens_equal_the_reference(model, golden, name):
    caches = mlxkv.make_caches(model)
    answer = [best(prefill(model, caches, name, 7)[-1])]
    while len(answer) < 40:
        answer.append(best(model(mx.array([answer[-1:]]), caches)[0, -1]))
    assert answer == golden[f"greedy.{name}"].tolist()


def test_a_picture_goes_on_beside_text_in_one_batch(model, golden):
    sequences = {name: mlxkv.make_caches(model) for name in PROMPTS}
    answers = {
        name: [best(prefill(model, caches, name, 99)[-1])] for name, caches in sequences.items()
    }
    caches = batch(list(sequences.values()))
    for _ in range(39):
        last = mx.array([answer[-1:] for answer in answers.values()])
        for answer, logits in zip(answers.values(), model.last_logits(last, caches), strict=True):
            answer.append(best(logits))
    assert answers == {name: golden[f"greedy.{name}"].tolist() for name in PROMPTS}


def test_whatever_token_stands_where_a_picture_is_the_same_is_computed(model):
    tokens, numbers = PROMPTS["two"]
    media = media_of(tokens, numbers, model)
    others = [5 if token == SOFT else token for token in tokens]
    logits = [model(mx.array([ids]), None, media) for ids in (tokens, others)]
    assert mx.array_equal(*logits)


def test_kernels_as_mlx_vlm_writes_them_and_the_hub_style_load_as_the_same(
    model, weights, golden, tmp_path
):
    """mlx-vlm names parts without "model." and has kernels with their channels last."""
    theirs = {
        name.removeprefix("model.").replace("language_model.", "language_model.model.", 1): array
        if array.ndim != 4
        else np.ascontiguousarray(np.moveaxis(array, 1, -1))
        for name, array in weights.items()
    }
    other = loaded(tmp_path, "hub", theirs)
    assert mx.array_equal(rows_of(other, 1), rows_of(model, 1))
    tokens, numbers = PROMPTS["one"]
    check_logits(
        golden, "one", other(mx.array([tokens]), None, media_of(tokens, numbers, other))[0]
    )


def test_text_alone_loads_without_the_encoder(weights, golden, tmp_path):
    text = {name: array for name, array in weights.items() if "language_model" in name}
    other = loaded(tmp_path, "new", text)
    assert other.media_kinds == frozenset()
    check_logits(golden, "none", other(mx.array([PROMPTS["none"][0]]))[0])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("architecture", "resnet50", "architecture must be mobilenetv5_300m_enc; got 'resnet50'"),
        ("model_args", {"depth": 3}, "model_args holds depth"),
    ],
)
def test_an_encoder_of_another_kind_is_refused(key, value, message):
    config = VisionConfig.from_dict({**CONFIG["vision_config"], key: value}, "config.json")
    with pytest.raises(UnsupportedModel, match=message):
        VisionTower(config)
