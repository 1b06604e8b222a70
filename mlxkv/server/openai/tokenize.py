"""POST /tokenize: the token ids of a prompt, in the shape of vLLM's server."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from mlxkv.engine.messages import Ask, Engine
from mlxkv.errors import UsageError
from mlxkv.server import sse
from mlxkv.server.config import ServerConfig
from mlxkv.server.fields import Part
from mlxkv.server.ignored import note
from mlxkv.server.json_route import JSONRoute
from mlxkv.server.model_names import LocalModel
from mlxkv.server.openai.messages import ChatMessage, template_messages
from mlxkv.server.openai.respond import asked
from mlxkv.server.requests import apply_rules, build_request


class TokenizeRequest(Part):
    """A text, or a conversation as the model's chat template writes it."""

    model: str
    prompt: str | None = None
    messages: list[ChatMessage] | None = None

    def ask(self, model: LocalModel, owner: str) -> Ask:
        """The request to the engine.

        Raises:
            UsageError: neither a prompt nor messages, or both.
        """
        if (self.prompt is None) == (self.messages is None):
            raise UsageError("give prompt or messages")
        prompt = template_messages(self.messages) if self.messages is not None else self.prompt
        return Ask(model.name, build_request(prompt or ""), owner, path=model.path)


def router(engine: Engine, config: ServerConfig) -> APIRouter:
    """The route for token ids."""
    routes = APIRouter(route_class=JSONRoute, tags=["openai"])

    @routes.post("/tokenize")
    async def tokenize(request: Request, body: TokenizeRequest) -> Response:
        """Count a prompt's tokens before it is sent."""
        note(request, body)
        ask = apply_rules(await asked(request, engine, config, body), config, request)
        tokens = await sse.unless_gone(request, engine.tokenize(ask))
        return JSONResponse({"count": len(tokens), "tokens": tokens})

    return routes
