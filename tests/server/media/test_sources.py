"""How clients write pictures and sound: base64 and data URLs in all their spellings."""

from __future__ import annotations

import asyncio
import base64
import json
import tracemalloc
from functools import partial
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlxkv.server.media.abilities import Abilities, abilities_of
from mlxkv.server.media.sources import decoded, scheme_of
from mlxkv.server.model_names import LocalModel
from tests.support.fake_engine import FakeEngine

DATA = bytes(range(251, 256)) * 9 + b"?>"
CODED = base64.b64encode(DATA).decode()
URL_SAFE = base64.urlsafe_b64encode(DATA).decode()


@pytest.mark.parametrize(
    "text",
    [
        CODED,
        CODED.rstrip("="),
        URL_SAFE,
        "\n".join(CODED[i : i + 8] for i in range(0, len(CODED), 8)),
        f"  {CODED}\r\n",
        f"data:image/png;base64,{CODED}",
        f"DATA:;BASE64,{CODED}",
        f"data:image/png;name=a.png;charset=utf-8; base64,{CODED}",
        f"data:image/jpeg;base64,{quote_from_bytes(CODED.encode(), safe='')}",
        f"data:image/png,{quote_from_bytes(DATA)}",
        f" data:,{quote_from_bytes(DATA)}",
    ],
)
def test_each_spelling_has_the_same_bytes(text):
    assert "+" in CODED and "-" in URL_SAFE
    assert decoded(text) == DATA


@pytest.mark.parametrize(
    "text", ["", " \n", "=", "====", "data:,", "data:image/png;base64,", "data:;base64,\n"]
)
def test_nothing_is_an_error(text):
    with pytest.raises(ValueError, match="is empty"):
        decoded(text)


@pytest.mark.parametrize("text", ["A", "a b!c", "YQ==YQ==", "é", "data:image/png;base64,a?b", "\0"])
def test_what_is_not_base64_is_an_error(text):
    with pytest.raises(ValueError, match="is not base64"):
        decoded(text)


def test_a_data_url_has_a_short_head():
    with pytest.raises(ValueError, match="without a comma"):
        decoded("data:" + "a" * 5000 + ",YQ==")


def test_schemes_are_known_in_capitals():
    assert [scheme_of(t) for t in ("DATA:,", " Https://a", "YQ==", "/a:b")] == [
        "data", "https", "", "",
    ]  # fmt: skip


def test_escapes_at_the_ends_of_blocks_are_whole():
    data = bytes(range(256)) * 1000
    for n in range(3):
        assert decoded("data:," + "a" * n + quote_from_bytes(data, safe="")) == b"a" * n + data
    assert decoded("data:,%4%zz%") == b"%4%zz%"


@pytest.mark.parametrize("spelled", [" A" * 500_000, "data:," + "%41" * 500_000])
def test_decoding_takes_few_times_the_bytes_of_the_text(spelled):
    tracemalloc.start()
    try:
        decoded(spelled)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(spelled)


PICTURES, SOUND = "model.vision_tower.a", "audio_tower.a"


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"model_type": "gemma3", "vision_config": {"a": 1}}, Abilities(frozenset({"image"}))),
        ({"model_type": "gemma3_text"}, Abilities()),
        (
            {"model_type": "gemma4", "vision_config": {"a": 1}},
            Abilities(frozenset({"image"}), (70, 140, 280, 560, 1120)),
        ),
        (
            {"model_type": "gemma4", "audio_config": {"a": 1}, "vision_config": None},
            Abilities(frozenset({"audio"})),
        ),
        ("no object", Abilities()),
    ],
)
def test_what_a_model_takes_is_in_its_config_and_its_weights(tmp_path, config, found):
    (tmp_path / "config.json").write_text(json.dumps(config))
    able, array = partial(abilities_of, FakeEngine(), LocalModel("a", tmp_path)), np.zeros(1)
    save_file({"model.layers.0.a": array}, tmp_path / "model.safetensors")
    assert asyncio.run(able()).kinds == frozenset()
    save_file({PICTURES: array, SOUND: array}, tmp_path / "model.safetensors")
    assert asyncio.run(able()) == found


def test_a_budget_is_the_least_the_most_or_the_models_own():
    able = Abilities(frozenset({"image"}), (70, 280, 1120))
    assert [able.budget(d) for d in ("low", "high", "original", "auto", None)] == [
        70, 1120, 1120, None, None,
    ]  # fmt: skip
    assert Abilities(frozenset({"image"})).budget("high") is None
