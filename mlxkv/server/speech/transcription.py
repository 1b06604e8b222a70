"""The transcript of one recording: each of its windows is a request to the engine.

A window is asked for when the one before it has ended, so that other requests have their turns.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import Request

from mlxkv.engine.messages import Answer, Engine
from mlxkv.generation.speech.languages import language_name
from mlxkv.generation.speech.transcripts import (
    Heard,
    Joined,
    Transcript,
    instruction,
    longest_window,
    max_tokens,
    messages_for,
)
from mlxkv.generation.speech.windows import windows
from mlxkv.media.sound import RATE
from mlxkv.server.config import ServerConfig
from mlxkv.server.model_names import LocalModel
from mlxkv.server.requests import apply_rules, build_request
from mlxkv.server.results import AnswerState
from mlxkv.server.speech.fields import TranscriptionForm
from mlxkv.server.speech.sounds import Sounds
from mlxkv.server.threads import run_in_threadpool

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Transcription:
    """One recording that is transcribed.

    Attributes:
        windows: what the answers to its windows took, so far.
    """

    http: Request
    engine: Engine
    config: ServerConfig
    model: LocalModel
    form: TranscriptionForm
    sounds: Sounds
    windows: list[AnswerState] = field(default_factory=list)

    async def heard(self) -> AsyncGenerator[Heard]:
        """The text as it comes; the last step has the transcript.

        Raises:
            MediaError: the file is no sound that can be read.
            OutOfMemory: an answer ended for want of memory. Also what the engine raises.
        """
        file = self.form.file
        data = await file.read()
        await file.close()
        async with self.sounds.decoded(self.http.state.owner, data, self._name) as samples:
            del data
            async for step in self._steps(samples):
                yield step

    async def _steps(self, samples: np.ndarray) -> AsyncGenerator[Heard]:
        form, duration_s = self.form, len(samples) / RATE
        parts = await run_in_threadpool(windows, samples, RATE, longest_window(form.format))
        joined = Joined(parts, len(samples), RATE)
        text = instruction(language_name(form.language), form.prompt)
        for part in parts:
            joined.begin()
            state = AnswerState()
            self.windows.append(state)
            answer = self._submit(samples[part.begin : part.end], text)
            try:
                async for chunk in answer:
                    state.take(chunk)
                    yield joined.feed(chunk.text)
            finally:
                answer.cancel()
            if state.error is not None:
                raise state.error
            yield joined.end(state.reason == "length")
        yield Heard("", duration_s, duration_s, joined.transcript(form.language))

    async def whole(self) -> Transcript:
        """The transcript."""
        async with aclosing(self.heard()) as steps:
            async for step in steps:
                if step.transcript is not None:
                    return step.transcript
        raise AssertionError("the last step has the transcript")

    @property
    def _name(self) -> str:
        return " ".join((self.form.file.filename or "file").split())[:80]

    def _submit(self, sound: np.ndarray, text: str) -> Answer:
        n_tokens = max_tokens(len(sound), RATE)
        request = build_request(
            messages_for(sound, RATE, text, self._name),
            max_tokens=min(n_tokens, self.config.max_tokens or n_tokens),
            temperature=self.form.temperature or 0.0,
        )
        ask = self.model.ask(request, self.http.state.owner)
        return self.engine.submit(apply_rules(ask, self.config, self.http))

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens of all windows."""
        n_prompt = sum(state.n_prompt for state in self.windows)
        n_answer = sum(state.n_tokens for state in self.windows)
        n_audio = sum(state.stats.audio_tokens for state in self.windows if state.stats)
        return {
            "type": "tokens",
            "input_tokens": n_prompt,
            "input_token_details": {"audio_tokens": n_audio, "text_tokens": n_prompt - n_audio},
            "output_tokens": n_answer,
            "total_tokens": n_prompt + n_answer,
        }
