"""Keep a model from calling tools that its prompt lists and that may not be called.

The prompt lists all tools, whatever may be called: so turns that differ in this share their prefix.

| may be called | how |
| --- | --- |
| all | nothing is done |
| none | the token that begins a call is never chosen |
| some | a grammar of text and calls of those tools |

Harmony's calls have no token of their own, so that a grammar leaves them out. Where no token of a
format begins a call (Llama 3's JSON), a call can be written; it is text then (`reader`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from mlxkv.engine.runtime import Runtime
from mlxkv.errors import UsageError
from mlxkv.generation.request import Request
from mlxkv.parsers.formats import call_opener, format_with_tools
from mlxkv.sampling.params import SamplingParams

if TYPE_CHECKING:
    from mlxkv.sampling.grammar import Grammar, Masker

_NEVER = -1e9
"""Added to the logit of a token that must not come."""


def choose_masker(
    runtime: Runtime, request: Request, prompt: str | None, owner: str = ""
) -> Masker | None:
    """The masker of an answer: of its format, else of the calls that it may make.

    Args:
        prompt: the rendered prompt; None where it is none.
        owner: of the request.

    Raises:
        UsageError: the format cannot be kept.
    """
    grammar = grammar_of(runtime, request)
    if grammar is None or (request.format is None and prompt is None):
        return None
    try:
        return runtime.maskers.masker(grammar, prompt, owner)
    except UsageError:
        if request.format is not None:
            raise
        return None  # such calls cannot be described; others are text


def grammar_of(runtime: Runtime, request: Request) -> Grammar | None:
    """The grammar of an answer to a rendered prompt; None if it has none."""
    if request.format is not None:
        return request.format
    if request.callable is None or request.min_tokens or request.ignore_eos:
        return None  # a grammar says itself where an answer ends
    name = format_with_tools(runtime.tokenizer)
    if not request.callable and name != "harmony":
        return None
    return _some_calls(request, name)


def without_calls(runtime: Runtime, request: Request, sampling: SamplingParams) -> SamplingParams:
    """Sampling parameters under which no call begins, where none may be made."""
    if request.callable != () or not request.tools:
        return sampling
    opener = call_opener(runtime.tokenizer)
    if opener is None:
        return sampling
    if opener >= runtime.config.vocab_size:
        return sampling  # no logit has its number
    return replace(sampling, logit_bias={**(sampling.logit_bias or {}), opener: _NEVER})


def _some_calls(request: Request, name: str) -> Grammar | None:
    """Text and the calls that may be made; None where no token of the format begins a call."""
    from mlxkv.sampling.calls.tool_call_grammar import MARKED
    from mlxkv.sampling.grammar import Grammar

    if name not in MARKED:
        return None
    functions: list[Mapping] = [tool.get("function", tool) for tool in request.tools or ()]
    tools = [
        {"name": each["name"], "parameters": each.get("parameters") or {}}
        for each in functions
        if each["name"] in (request.callable or ())
    ]
    return Grammar("tools", json.dumps({"tools": tools, "content": {"kind": "text"}}))
