"""The response to one request, in one piece or as events."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from mlxkv.engine.messages import Answer, PutAway
from mlxkv.server import sse
from mlxkv.server.errors import RESPONSES, failure_of
from mlxkv.server.openai.respond import usage
from mlxkv.server.openai.response_output import Event, Output, ids_of, new_id
from mlxkv.server.openai.response_request import ResponseRequest
from mlxkv.server.openai.response_tools import callees
from mlxkv.server.results import AnswerState

NOT_COUNTED = ("queued", "in_progress", "failed", "cancelled")
"""Statuses of responses that have no usage."""


class ResponseReply:
    """The response to one request.

    Args:
        body: the request.
        keep: takes the response at its end; None where it is not to be stored.
        id: of the response; empty for a new one. The same id and answer give the same events.
        created: when it was asked for, in seconds since 1970; None for now.
    """

    def __init__(
        self,
        body: ResponseRequest,
        keep: Callable[[dict[str, Any]], None] | None,
        id: str = "",
        created: int | None = None,
    ):
        self.body, self._keep = body, keep
        self.id = id or new_id("resp")
        self.created = int(time.time()) if created is None else created
        self._output = Output(
            AnswerState(parallel=body.is_parallel),
            body.wants_logprobs,
            {callee.function.name: callee for callee in callees(body.tools or ())},
            ids_of(self.id),
        )
        self._n_events = 0

    async def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The response in one piece."""
        async for _, chunk in sse.merge(answers):
            self._output.take(chunk)
        self._output.close(self._ended())
        return self._kept(self.response(self._ended()))

    async def events(self, answers: Sequence[Answer]) -> sse.Events:
        """The response as server-sent events."""
        begun = False
        async for _, chunk in sse.merge(answers):
            if not begun:
                begun = True
                for kind in ("created", "in_progress"):
                    yield self._lifecycle(kind, self.response("in_progress"))
            for event in self._output.take(chunk):
                yield self._event(event)
        status = self._ended()
        for event in self._output.close(status):
            yield self._event(event)
        yield self._lifecycle(status, self._kept(self.response(status)))

    @property
    def status(self) -> str:
        """Of the response that has ended."""
        return self._ended()

    def _kept(self, response: dict[str, Any]) -> dict[str, Any]:
        if self._keep is not None:
            self._keep(response)
        return response

    def failed(self, error: BaseException) -> bytes:
        """The last event of a stream that failed; or that ends here, and goes on later."""
        failure = failure_of(error, RESPONSES)
        if isinstance(error, PutAway):
            said = {"code": "server_stopping", "message": failure.message, "param": None}
            return self._event({"type": "error", **said})
        code = failure.code or ("server_error" if failure.status >= 500 else "invalid_prompt")
        said = {"code": code, "message": failure.message}
        return self._lifecycle("failed", {**self.response("failed"), "error": said})

    def _event(self, event: Event) -> bytes:
        numbered = {**event, "sequence_number": self._n_events}
        self._n_events += 1
        return sse.event(numbered, event["type"])

    def _lifecycle(self, kind: str, response: dict[str, Any]) -> bytes:
        return self._event({"type": f"response.{kind}", "response": response})

    def _ended(self) -> str:
        return "incomplete" if self._output.progress.finish_reason == "length" else "completed"

    def response(self, status: str) -> dict[str, Any]:
        """The response as it is now, under this status."""
        body, progress = self.body, self._output.progress
        incomplete = None
        if status == "incomplete":
            why = progress.finish.get("finish_details", {})
            incomplete = {"reason": "max_output_tokens", **why}
        shown = body.model_dump(by_alias=True, exclude_none=True)
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": bool(body.background),
            "error": None,
            "incomplete_details": incomplete,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": body.model,
            "output": list(self._output.items),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "store": self._keep is not None,
            "temperature": shown.get("temperature"),
            "text": shown.get("text") or {"format": {"type": "text"}},
            "tool_choice": shown.get("tool_choice", "auto"),
            "tools": shown.get("tools", []),
            "top_p": shown.get("top_p"),
            "truncation": body.truncation or "disabled",
            "usage": None if status in NOT_COUNTED else _usage(progress),
            "user": body.user,
            "metadata": body.metadata or {},
        }


def _usage(progress: AnswerState) -> dict[str, Any]:
    """Token counts under the Responses API's names."""
    used = usage([progress])
    return {
        "input_tokens": used["prompt_tokens"],
        "input_tokens_details": used["prompt_tokens_details"],
        "output_tokens": used["completion_tokens"],
        "output_tokens_details": used["completion_tokens_details"],
        "total_tokens": used["total_tokens"],
    }
