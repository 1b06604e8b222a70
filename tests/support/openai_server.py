"""A server with a fake engine, and OpenAI's client for it."""

from __future__ import annotations

import openai

from tests.support.fake_engine import FakeEngine


class OpenAIServer:
    """What tests of OpenAI's APIs talk to."""

    def __init__(self, engine: FakeEngine, url: str):
        self.engine, self.url = engine, url
        self.client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
