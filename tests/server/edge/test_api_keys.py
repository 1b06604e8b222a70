"""A file of API keys, and what a browser takes the server's responses for."""

from __future__ import annotations

import os

import httpx
import pytest

from mlxkv.errors import UsageError
from mlxkv.server.config import ServerConfig
from mlxkv.server.edge import api_keys
from mlxkv.server.edge.api_keys import ApiKeys, owner_of, read_keys
from tests.support.fake_engine import MODEL, FakeEngine, says, serving

HTML = "<b>x</b><script>y</script>"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\none\n\n  two  \n")
    path.chmod(0o600)
    return path


def test_a_file_has_one_key_a_line(file):
    assert read_keys(file) == ("one", "two")


def test_keys_of_the_file_and_of_options_count_and_others_do_not(file):
    with serving(FakeEngine(), api_keys=("three",), api_key_file=file) as url:
        for key, status in (("one", 200), ("two", 200), ("three", 200), ("# ours", 401)):
            assert httpx.get(url + "/stats.json", headers={"x-api-key": key}).status_code == status
        for path in ("/stats.json", "/metrics", "/v1/models", "/api/tags", "/openapi.json"):
            assert httpx.get(url + path).status_code == 401
        assert httpx.get(url + "/health").status_code == 200


def test_a_file_that_changes_is_read_again_and_a_damaged_one_changes_nothing(
    file, monkeypatch, caplog
):
    monkeypatch.setattr(api_keys, "LOOK_S", 0.0)
    keys = ApiKeys(ServerConfig(api_key_file=file))
    assert keys.owner("one") == owner_of("one") and not caplog.records
    file.write_text("new\n")
    assert keys.owner("one") is None and keys.owner("new") == owner_of("new")
    file.write_text("a key with spaces\n")
    assert keys.owner("new") and "spaces" not in caplog.records[0].getMessage()
    file.unlink()
    assert keys.owner("new") and keys.owner("a key with spaces") is None


@pytest.mark.parametrize("mode, warns", [(0o600, False), (0o640, True), (0o604, True)])
def test_a_file_that_others_can_read_is_warned_of(file, caplog, mode, warns):
    file.chmod(mode)
    ApiKeys(ServerConfig(api_key_file=file))
    assert ("chmod 600" in caplog.text) == warns


@pytest.mark.parametrize("content", [b"", b"# none\n", b"a b\n", b"\xff\xfe\n", "ü\n".encode()])
def test_a_file_without_valid_keys_is_one_line_that_shows_none_of_it(file, content):
    file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        ApiKeys(ServerConfig(host="0.0.0.0", api_key_file=file))
    assert "\n" not in str(caught.value) and "a b" not in str(caught.value)


def test_a_pipe_in_place_of_the_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="not a file"):
        ApiKeys(ServerConfig(api_key_file=tmp_path / "pipe"))


def test_no_response_is_a_page_but_the_servers_own():
    engine = FakeEngine(says(HTML))
    said = {"messages": [{"role": "user", "content": HTML}]}
    with serving(engine) as url:
        answers = [
            httpx.post(url + "/v1/chat/completions", json={"model": model, **said, **more})
            for model in (MODEL, HTML)
            for more in ({}, {"stream": True}, {HTML: 1}, {"n": HTML})
        ]
        answers += [httpx.get(url + path) for path in ("/stats.json", "/metrics", f"/{HTML}")]
        answers.append(httpx.get(url + "/health", headers={"host": "evil.example"}))
        page = httpx.get(url + "/")
    for answer in [*answers, page]:
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert not any("html" in answer.headers["content-type"] for answer in answers)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert unsafe not in page.text
