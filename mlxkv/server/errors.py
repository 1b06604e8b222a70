"""Errors in the shape of the request's API, with its names for fields.

The path selects the API: `/v1/messages` is Anthropic's, `/api` Ollama's, everything else OpenAI's.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from mlxkv.base.faults import told
from mlxkv.base.paths import models_dir
from mlxkv.engine.messages import Busy
from mlxkv.errors import (
    ContextExceeded,
    InternalError,
    MediaError,
    MlxkvError,
    ModelNotFound,
    OutOfMemory,
    Spelling,
    lacks_memory,
)
from mlxkv.sampling.params import PARAMETERS

_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_ANTHROPIC_TYPES = {**_OPENAI_TYPES, 504: "timeout_error"}


class ThreadNotFound(ModelNotFound):
    """A thread of Anthropic's API that is to be continued: none are kept here."""


class ServerStopping(MlxkvError):
    """The server ends before the answer does."""

    status = 503

    def __init__(self) -> None:
        super().__init__("the server is stopping: send the request again later")


def stopping() -> HTTPException:
    """`ServerStopping` for a request that is not read yet."""
    return HTTPException(503, str(ServerStopping()), {"Connection": "close", "Retry-After": "5"})


# Class of error -> code, and the field for errors that name none.
_CODES = {
    ContextExceeded: ("context_length_exceeded", None),
    MediaError: ("invalid_request", None),
    ThreadNotFound: ("thread_not_found", "thread.previous_message_id"),
    ModelNotFound: ("model_not_found", "model"),
    OutOfMemory: ("insufficient_memory", None),
    ServerStopping: ("server_stopping", None),
}
_FOLDERS = re.compile(r"(?<![\w:/.])/(?!v1/|api/)(?:[^/\s'\"]+/)+")
_FIELD = re.compile(r"(?!(constrained-)?(str|int|float|bool)$)[^A-Z\[\]()]+(\[\])?")
_READ_ERRORS = 200
_SHOWN_ERRORS = 5
_SHOWN_CHARS = 300


@dataclass(frozen=True, eq=False)
class Fields(Spelling):
    """An API's names for the fields of a `Request`.

    Args:
        names: field -> name; a field that is not here cannot be set in this API.
        too_long: how the API says that a prompt of `n` tokens passes a context of `limit`: clients
            know a full context by these words, and compact.
            Empty for the words of the error.
        values: (name, value) -> what stands for the value there, where it is another.
        prompt: the name of what is too long then.
    """

    names: Mapping[str, str]
    too_long: str
    values: Mapping[tuple[str, object], object] = field(default_factory=dict)
    prompt: str = "messages"

    def name(self, field: str) -> str | None:
        return self.names.get(field)

    def setting(self, field: str, value: object) -> str | None:
        name = self.name(field)
        if name is None:
            return None
        return f"{name}: {json.dumps(self.values.get((name, value), value))}"


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_TEMPLATE = {"template_options": "chat_template_kwargs"}
_OURS = _same(
    *PARAMETERS, "model", "logit_bias", "stop", "context", "overflow", "keep", "draft", "adapter",
    "keep_alive", "think", "tools", "logprobs",
) | _TEMPLATE  # fmt: skip
_OPENAI_TOO_LONG = (
    "This model's maximum context length is {limit} tokens, and the prompt has {n}: shorten it"
)
OPENAI = Fields(
    {**_OURS, **_same("min_tokens"), "max_tokens": "max_tokens", "format": "response_format"},
    _OPENAI_TOO_LONG,
)
_TEXTS = _same("model", "keep_alive")
EMBEDDINGS = Fields(
    {**_TEXTS, **_same("dimensions", "prompt", "truncate"), "texts": "input"}, "", prompt="input"
)
RERANK = Fields(
    {**_TEXTS, **_same("query", "documents", "top_n", "max_tokens_per_doc")},
    "a document and the query have {n} tokens, and the model takes {limit}: shorten the document, "
    "or have it cut by max_tokens_per_doc",
    prompt="documents",
)
RESPONSES = Fields(
    {
        **_OURS,
        "max_tokens": "max_output_tokens",
        "format": "text.format",
        "truncate": "truncation",
    },
    _OPENAI_TOO_LONG,
    {("truncation", True): "auto"},
)
ANTHROPIC = Fields(
    {
        **_same("model", "max_tokens", "tools", "draft", "adapter"),
        **_same(*PARAMETERS),
        "stop": "stop_sequences",
        "think": "thinking",
        "format": "output_config.format",
        **_TEMPLATE,
    },
    "prompt is too long: {n} tokens > {limit} maximum",
)
OLLAMA = Fields(
    {
        **_same("model", "think", "tools", "format", "truncate", "logprobs", "keep_alive", "draft"),
        **_same("dimensions", "adapter"),
        **_TEMPLATE,
        "quantize": "quantize",
        "overflow": "shift",
        "max_tokens": "options.num_predict",
        "context": "options.num_ctx",
        "keep": "options.num_keep",
        **{name: f"options.{name}" for name in (*PARAMETERS, "stop")},
    },
    "the input length exceeds the context length: {n} tokens, and {limit} are allowed",
    {("shift", "shift"): True, ("shift", "stop"): False},
)  # fmt: skip


def _is_below(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(f"{prefix}/")


def fields_of(path: str) -> Fields:
    """The field names of a path's API."""
    known = (
        ("/v1/messages", ANTHROPIC),
        ("/v1/responses", RESPONSES),
        ("/v1/embeddings", EMBEDDINGS),
        ("/v1/rerank", RERANK),
        ("/v2/rerank", RERANK),
        ("/api", OLLAMA),
    )
    return next((fields for prefix, fields in known if _is_below(path, prefix)), OPENAI)


@dataclass(frozen=True, slots=True)
class Failure:
    """An error response, not yet in an API's shape.

    Args:
        status: HTTP status.
        message: what is wrong, and what to do.
        code: the API's code for such errors; None for none.
        param: the request's invalid field; None for none.
        headers: HTTP headers.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def failure_of(error: BaseException, fields: Fields) -> Failure:
    """The response for an exception. An unexpected one is logged, and clients see no details."""
    match error:
        case Busy():
            after = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
            return Failure(error.status, str(error), "server_busy", headers=after)
        case InternalError():
            pass
        case MlxkvError():
            code, param = next(
                (pair for kind, pair in _CODES.items() if isinstance(error, kind)), (None, None)
            )
            if isinstance(error, ContextExceeded):
                param = fields.prompt
            named = None if error.field is None else fields.name(error.field)
            return Failure(error.status, _told(error, fields), code, named or param)
        case RequestValidationError():
            return _invalid(error)
        case HTTPException():
            return Failure(error.status_code, str(error.detail), headers=error.headers or {})
    if lacks_memory(error):
        return failure_of(
            OutOfMemory("the server's memory ran out: send the request again"), fields
        )
    return Failure(500, str(told(error)), "internal_error")


def _told(error: MlxkvError, fields: Fields) -> str:
    """The message of an error, in the API's words where clients look for them."""
    if isinstance(error, ContextExceeded) and fields.too_long:
        said = fields.too_long.format(n=error.n_tokens, limit=error.context)
        return error.with_hints(said, fields)
    return without_folders(error.spelled(fields))


def without_folders(text: str) -> str:
    """A message in which files have their names alone: folders are not the client's business."""
    for folder in sorted({str(models_dir()), str(Path.home())}, key=len, reverse=True):
        text = text.replace(f"{folder}{os.sep}", "/")
    return _FOLDERS.sub("", text)


def _invalid(error: RequestValidationError) -> Failure:
    """Every fault of a request's fields on one line."""
    errors = error.errors()[:_READ_ERRORS]
    places = [_place(each["loc"]) for each in errors]
    # Of a field that may be one of several types, only the error of the type that was meant.
    found = [
        (place, each)
        for place, each in zip(places, errors, strict=True)
        if not any(other.startswith(f"{place}.") for other in places if place)
    ]
    shown, param = [], None
    for place, each in found[:_SHOWN_ERRORS]:
        message = str(each["msg"]).removeprefix("Value error, ")
        if each["type"] == "json_invalid":
            place, message = "", f"the body is not JSON: {each['ctx']['error']}"
        elif each["type"] == "extra_forbidden":
            message = "not supported"
        param = param or place or None
        shown.append(f"{place}: {message}" if place else message)
    more = len(found) - len(shown) + len(error.errors()) - len(errors)
    text = "; ".join(shown) + (f" (and {more} more)" if more > 0 else "")
    return Failure(400, text[:2000], "invalid_request", param and param[:_SHOWN_CHARS])


def _place(loc: Sequence[Any]) -> str:
    """`messages.0.content`: pydantic adds the names of types, which are no fields."""
    parts = [str(part) for part in loc[1:] if isinstance(part, int) or _FIELD.fullmatch(part)]
    return ".".join(parts if loc[:1] == ("body",) else [str(loc[0]), *parts] if loc else [])


def openai_error(failure: Failure) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`."""
    fallback = "server_error" if failure.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": failure.message,
            "type": _OPENAI_TYPES.get(failure.status, fallback),
            "param": failure.param,
            "code": failure.code,
        }
    }


def anthropic_error(failure: Failure) -> dict[str, Any]:
    """`{"type": "error", "error": {"type", "message", "details"}}`.

    Clients send a whole conversation again where `details.error_code` is `thread_not_found`.
    """
    fallback = "api_error" if failure.status >= 500 else "invalid_request_error"
    kind = _ANTHROPIC_TYPES.get(failure.status, fallback)
    details = {"details": {"error_code": failure.code}} if failure.code else {}
    return {"type": "error", "error": {"type": kind, "message": failure.message, **details}}


def ollama_error(failure: Failure) -> dict[str, Any]:
    """`{"error": message}`."""
    return {"error": failure.message}


def shape(path: str, failure: Failure) -> dict[str, Any]:
    """The error in the shape of a path's API."""
    if _is_below(path, "/v1/messages"):
        return anthropic_error(failure)
    if _is_below(path, "/api"):
        return ollama_error(failure)
    return openai_error(failure)


def error_response(path: str, error: BaseException) -> Response:
    """The HTTP response for an exception."""
    failure = failure_of(error, fields_of(path))
    return JSONResponse(
        shape(path, failure), status_code=failure.status, headers=dict(failure.headers)
    )
