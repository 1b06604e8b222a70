"""How clients write pictures and sound: base64 and data URLs in all their spellings."""

from __future__ import annotations

import asyncio
import base64
import json
from urllib.parse import quote_from_bytes

import pytest

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


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"model_type": "gemma3", "vision_config": {"a": 1}}, Abilities(frozenset({"image"}))),
        ({"model_type": "gemma3_text"}, Abilities()),
        (
            {"model_type": "gemma4", "vision_config": {"a": 1}},
            Abilities(frozenset({"image"}), (70, 140, 280, 560, 1120)),
        ),
        ("no object", Abilities()),
    ],
)
def test_what_a_model_takes_is_in_its_config(tmp_path, config, found):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert asyncio.run(abilities_of(FakeEngine(), LocalModel("a", tmp_path))) == found


def test_a_budget_is_the_least_the_most_or_the_models_own():
    able = Abilities(frozenset({"image"}), (70, 280, 1120))
    assert [able.budget(d) for d in ("low", "high", "original", "auto", None)] == [
        70, 1120, 1120, None, None,
    ]  # fmt: skip
    assert Abilities(frozenset({"image"})).budget("high") is None
