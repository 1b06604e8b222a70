"""Which kind of file the images of Ollama's API are."""

from __future__ import annotations

import base64

import numpy as np

from mlxkv.server.media.content import given_in
from mlxkv.server.ollama.fields import content_with
from mlxkv.terminal.files.microphone import wav

PNG, SOUND = b"\x89PNG\r\n\x1a\n a picture", wav(np.zeros(100, np.float32), 16_000)


def test_sound_may_stand_among_the_images_of_ollamas_api():
    coded = [base64.b64encode(data).decode() for data in (PNG, SOUND)]
    data_url = f"data:audio/wav;base64,{coded[1]}"
    content = content_with(("images",), [*coded, data_url, "no base64 \u00e4"], "What?")
    assert isinstance(content, list)
    kinds = [given.kind for part in content if (given := given_in(part)) is not None]
    assert kinds == ["image", "audio", "audio", "image"]
