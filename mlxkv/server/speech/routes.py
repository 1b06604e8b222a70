"""POST /v1/audio/transcriptions, in the shapes of OpenAI's API."""

from __future__ import annotations

from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from mlxkv.engine.messages import Engine
from mlxkv.generation.speech.transcripts import formatted, to_dict
from mlxkv.media.types import AUDIO
from mlxkv.server import sse
from mlxkv.server.config import ServerConfig
from mlxkv.server.ignored import note
from mlxkv.server.media.abilities import abilities_of
from mlxkv.server.media.content import refused
from mlxkv.server.model_names import present
from mlxkv.server.speech.fields import TranscriptionForm
from mlxkv.server.speech.sounds import Sounds
from mlxkv.server.speech.transcription import Transcription
from mlxkv.server.speech.upload import UploadRoute

_TYPES = {"vtt": "text/vtt"}
_JSON = ("json", "verbose_json")


def router(engine: Engine, config: ServerConfig) -> APIRouter:
    """The route for transcripts."""
    routes = APIRouter(route_class=UploadRoute, tags=["openai"])
    sounds = Sounds()

    @routes.post("/v1/audio/transcriptions")
    async def transcriptions(
        request: Request, form: Annotated[TranscriptionForm, Form()]
    ) -> Response:
        """Write down what is said in a recording."""
        note(request, form)
        model = await present(engine, config, form.model)
        if AUDIO not in (await abilities_of(engine, model)).kinds:
            raise refused(("model",), f"{model.name[:80]!r} takes no sound")
        made = Transcription(request, engine, config, model, form, sounds)
        if form.stream:
            return await sse.stream(request, _events(made), config, sse.openai_error_event)
        return await sse.unless_gone(request, _whole(made))

    return routes


async def _whole(made: Transcription) -> Response:
    transcript, form = await made.whole(), made.form
    if form.format not in _JSON:
        text = formatted(transcript, form.format)
        return PlainTextResponse(text, media_type=_TYPES.get(form.format, "text/plain"))
    return JSONResponse({**to_dict(transcript, form.format), "usage": made.usage})


async def _events(made: Transcription) -> sse.Events:
    async with aclosing(made.heard()) as steps:
        async for step in steps:
            if step.text:
                yield sse.event({"type": "transcript.text.delta", "delta": step.text})
            if step.transcript is not None:
                text, usage = step.transcript.text, made.usage
                yield sse.event({"type": "transcript.text.done", "text": text, "usage": usage})
    yield sse.DONE
