"""A server with a fake engine, and OpenAI's client for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import openai

from tests.support.fake_engine import FakeEngine, serving


class OpenAIServer:
    """What tests of OpenAI's APIs talk to."""

    def __init__(self, engine: FakeEngine, url: str, client: openai.OpenAI):
        self.engine, self.url, self.client = engine, url, client

    @classmethod
    @contextmanager
    def running(cls, **options: Any) -> Iterator[Self]:
        """One with a new engine; options of `serving`."""
        engine = FakeEngine()
        with (
            serving(engine, **options) as url,
            openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client,
        ):
            yield cls(engine, url, client)
