"""An answer that was put away: what it needs, besides its request, to go on as if it never slept.

KV is not part of it: that is kept as pages, and what pages do not have is computed again. Nothing
here needs MLX.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import PurePath
from typing import Any, Self

from mlxkv.generation.request import Request
from mlxkv.media.parts import mapped
from mlxkv.sampling.params import SamplingParams
from mlxkv.saved_kv.manifest import NamedKV

Logprob = tuple[float, tuple[tuple[int, float], ...]]
"""A token's log-probability, and the likeliest tokens with theirs."""


@dataclass(frozen=True, slots=True)
class Written:
    """A piece of an answer.

    Args:
        tokens: their ids.
        logprobs: one for each token; none where they were not asked for.
        calls: ids of the calls that these tokens complete.
    """

    tokens: Sequence[int] = ()
    logprobs: Sequence[Logprob] = ()
    calls: Sequence[str] = ()

    def __add__(self, other: Written) -> Written:
        """This piece and the next."""
        return Written(
            [*self.tokens, *other.tokens],
            [*self.logprobs, *other.logprobs],
            [*self.calls, *other.calls],
        )

    def since(self, other: Written) -> Written:
        """What came behind `other`, with which this begins."""
        return Written(
            self.tokens[len(other.tokens) :],
            self.logprobs[len(other.logprobs) :],
            self.calls[len(other.calls) :],
        )

    def to_json(self) -> dict[str, Any]:
        """As a line of the file; the inverse of `from_json`."""
        return {name: list(getattr(self, name)) for name in ("tokens", "logprobs", "calls")}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError, TypeError, KeyError: something else.
        """
        return cls(
            [int(token) for token in raw["tokens"]],
            [
                (float(logprob), tuple((int(token), float(its)) for token, its in top))
                for logprob, top in raw["logprobs"]
            ],
            [str(name) for name in raw["calls"]],
        )


@dataclass(frozen=True, slots=True)
class Asleep:
    """An answer that was put away.

    Args:
        prompt: the whole prompt, as it was encoded: a template may write today's date.
        seed: of its random numbers, whose position follows from the number of tokens.
        written: the answer so far.
    """

    prompt: Sequence[int]
    seed: int
    written: Written = Written()


def request_to_json(request: Request) -> dict[str, Any]:
    """Everything that decides an answer, as JSON: one request has one form.

    Raises:
        TypeError, ValueError: it holds what JSON cannot.
    """
    raw = {field.name: getattr(request, field.name) for field in fields(Request)}
    del raw["on_progress"]
    raw["prompt"] = mapped(request.prompt, _source_to_json)
    if request.saved is not None:
        raw["saved"] = request.saved.to_json().decode()
    if request.format is not None:
        raw["format"] = [request.format.kind, request.format.text]
    sampling = request.sampling.chosen()
    if request.sampling.logit_bias is not None:
        sampling["logit_bias"] = sorted(request.sampling.logit_bias.items())
    raw["sampling"] = sampling
    return json.loads(json.dumps(raw, allow_nan=False))


def request_from_json(raw: Mapping[str, Any]) -> Request:
    """The inverse of `request_to_json`, without `on_progress`.

    Raises:
        UsageError, ValueError, TypeError, KeyError: it is no such request.
    """
    from mlxkv.sampling.grammar import Grammar  # few answers have one

    raw = {**raw, "prompt": mapped(raw["prompt"], _source_from_json)}
    sampling = dict(raw["sampling"])
    if "logit_bias" in sampling:
        sampling["logit_bias"] = {int(token): value for token, value in sampling["logit_bias"]}
    saved, form = raw["saved"], raw["format"]
    changed = {
        "sampling": SamplingParams(**sampling),
        "saved": None if saved is None else NamedKV.from_json(saved.encode()),
        "format": None if form is None else Grammar(*form),
        "stop": tuple(raw["stop"]),
        "callable": None if raw["callable"] is None else tuple(raw["callable"]),
    }
    return Request(**{**raw, **changed})


def _source_to_json(source: Any) -> Any:
    """The content of a picture or of sound; a path as it is.

    Raises:
        TypeError: an image or an array, which is kept by no file.
    """
    if isinstance(source, bytes):
        return {"base64": base64.b64encode(source).decode("ascii")}
    return str(source) if isinstance(source, PurePath) else source


def _source_from_json(source: Any) -> Any:
    if isinstance(source, Mapping) and "base64" in source:
        return base64.b64decode(source["base64"], validate=True)
    return source


def seeded(request: Request, seed: int) -> Request:
    """The same request with this seed."""
    return replace(request, sampling=replace(request.sampling, seed=seed))
