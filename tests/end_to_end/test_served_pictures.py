"""Pictures over HTTP with a real engine: found by content from every API, and after a restart."""

from __future__ import annotations

import base64
import io
import signal
from typing import Any

import httpx
import numpy as np
from PIL import Image

from tests.end_to_end.test_sleep import post, stopped_in, text_of
from tests.support.command_line import environment
from tests.support.server_process import Server
from tests.support.tiny_media import write_gemma4

TEXT = "The weir was built of granite from the upper quarry and mended twice. " * 8


def coded(seed: int, form: str = "PNG") -> str:
    levels = np.random.RandomState(seed).randint(0, 255, (60, 60, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, form)
    return base64.b64encode(file.getvalue()).decode()


def openai(picture: str, **more: Any) -> dict[str, Any]:
    url = {"url": f"data:image/png;base64,{picture}"}
    parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": TEXT}]
    body = {"model": "eyes", "messages": [{"role": "user", "content": parts}]}
    return {**body, "max_tokens": 3, "temperature": 0, "ignore_eos": True, **more}


def anthropic(picture: str) -> dict[str, Any]:
    source = {"type": "base64", "media_type": "image/png", "data": picture}
    parts = [{"type": "image", "source": source}, {"type": "text", "text": TEXT}]
    return {"model": "eyes", "max_tokens": 3, "messages": [{"role": "user", "content": parts}]}


def ollama(*pictures: str) -> dict[str, Any]:
    message = {"role": "user", "content": TEXT, "images": pictures}
    return {"model": "eyes", "messages": [message], "stream": False, "options": {"num_predict": 3}}


def cache_of(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Where an answer's prompt came from."""
    answer = httpx.post(server.url + path, json=body, timeout=60).json()
    usage = answer.get("usage", answer)
    return usage.get("prompt_tokens_details") or usage["prompt_cache"]


def test_a_picture_is_found_from_every_api_and_its_answer_goes_on_after_a_restart(tmp_path):
    write_gemma4(tmp_path / "models" / "eyes")
    env = environment(tmp_path, MLXKV_KV=str(tmp_path / "kv"), MLXKV_KV_DISK="1GiB")
    server = Server(env)
    first = cache_of(server, "/v1/chat/completions", openai(coded(1)))
    n_prompt = first["computed_tokens"]
    assert first["restored_ram_tokens"] == 0 and first["image_tokens"] == 64
    asked = (("/v1/messages", anthropic(coded(1, "BMP"))), ("/api/chat", ollama(coded(1, "TIFF"))))
    for path, body in asked:
        found = cache_of(server, path, body)
        assert found["computed_tokens"] == 1 and found["restored_ram_tokens"] == n_prompt - 1
    cache_of(server, "/api/chat", ollama(coded(1), coded(2)))
    miss = cache_of(server, "/api/chat", ollama(coded(1), coded(3)))["miss"]
    assert miss["prompt"].endswith("|[picture 2: messages.0.images.1]")

    # Without drafts: what was answered before would come in a few steps.
    long = openai(coded(4), max_tokens=60, stream=True, draft="off")
    whole = text_of(post(server, "/v1/chat/completions", {**long, "user": "another request"}))
    begun = stopped_in(server, "/v1/chat/completions", long, 20, signal.SIGTERM)
    assert whole.startswith(text_of(begun)) and len(text_of(begun)) < len(whole)

    server = Server(env)
    assert text_of(post(server, "/v1/chat/completions", long)) == whole
    for path, body in asked:
        assert cache_of(server, path, body)["computed_tokens"] == 1
    assert server.stop() == 0
