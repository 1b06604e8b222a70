"""Fields that OpenAI's APIs share: sampling, and formats of the answer.

A field that no class here declares changes nothing and is named (`ignored`): `safety_identifier`
and `service_tier` (there is one user, and one tier), `prompt_cache_key` and
`prompt_cache_retention` (prefixes are found by their tokens), `prediction`. Fields beyond OpenAI's:
`top_k`, `min_p`, `repeat_penalty` (also `repetition_penalty`), `repeat_last_n`, `context`,
`overflow`, `keep`, `keep_alive`, `think`, the formats `regex` and `grammar`, and in chat and
completions vLLM's `min_tokens` and `ignore_eos`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mlxkv.errors import UsageError
from mlxkv.sampling.grammar import Grammar
from mlxkv.sampling.params import GENERATION_CONFIG, PARAMETERS
from mlxkv.server.fields import (
    AdapterNames,
    Count,
    DrafterName,
    LogitBias,
    NoEffect,
    Part,
    Real,
    Refused,
    StopText,
    StopTexts,
    Text,
    Whole,
    only,
    sampled,
)
from mlxkv.server.results import AnswerState, usage_so_far

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]

_THINK: dict[str, bool | str] = {"none": False, "minimal": "low", "xhigh": "high"}


class Unsupported(Part):
    """Fields of OpenAI's and other servers' that would change the answer: only at the values at
    which they do nothing."""

    audio: Refused = None
    web_search_options: Refused = None
    guided_json: Refused = None
    guided_regex: Refused = None
    guided_choice: Refused = None
    guided_grammar: Refused = None
    structured_outputs: Refused = None
    grammar: Refused = None
    json_schema: Refused = None
    chat_template: Refused = None
    documents: Refused = None
    stop_token_ids: Refused = None
    allowed_token_ids: Refused = None
    bad_words: Refused = None
    prompt_logprobs: Refused = None
    truncate_prompt_tokens: Annotated[Any, only(-1)] = None
    use_beam_search: Annotated[Any, only(False)] = None
    length_penalty: Annotated[Any, only(0, 1)] = None
    include_stop_str_in_output: Annotated[Any, only(False)] = None
    skip_special_tokens: Annotated[Any, only(True)] = None
    mirostat: Annotated[Any, only(0)] = None
    typical_p: Annotated[Any, only(1)] = None
    top_a: Annotated[Any, only(0)] = None
    tfs_z: Annotated[Any, only(1)] = None
    xtc_probability: Annotated[Any, only(0)] = None
    dry_multiplier: Annotated[Any, only(0)] = None
    dynatemp_range: Annotated[Any, only(0)] = None


class Common(Unsupported):
    """Fields that are taken and change nothing, see the module."""

    user: Annotated[str | None, NoEffect()] = None
    metadata: Annotated[dict[str, Any] | None, NoEffect()] = None


class Sampling(Common, sampled({name: name for name in PARAMETERS} | GENERATION_CONFIG)):
    """How tokens are chosen, and where the answer ends; what is left out, the model's settings
    decide."""

    logit_bias: LogitBias | None = None
    stop: StopText | StopTexts | None = None
    context: Count | None = None
    overflow: Literal["stop", "shift"] | None = None
    keep: Whole | None = None
    draft: DrafterName | None = None
    adapter: AdapterNames | None = None
    keep_alive: Real | str | None = None

    def sampling_options(self) -> dict[str, Any]:
        """Keywords of `Request.of`."""
        bias = self.logit_bias
        return self.sampling() | {
            "logit_bias": bias and {int(token): value for token, value in bias.items()},
            "stop": self.stop or None,
            "context": self.context,
            "overflow": self.overflow,
            "keep": self.keep,
            "draft": self.draft,
            "adapter": self.adapter,
        }


class GoesOn(Part):
    """Whether an assistant message at the end is gone on from, or closed."""

    continue_final_message: bool | None = Field(
        None, description="Go on from the last message, an answer that has begun, as vLLM does."
    )
    add_generation_prompt: bool | None = None

    def go_on(self, begun: bool) -> bool:
        """Whether the answer goes on from the last message.

        Args:
            begun: whether that is an assistant message without calls.

        Raises:
            UsageError: the fields that say so do not go together, or with the messages.
        """
        goes_on, opens = self.continue_final_message, self.add_generation_prompt
        if goes_on and not begun:
            raise UsageError(
                "continue_final_message goes on from an assistant message without calls, and the "
                "last message is none"
            )
        if goes_on and opens:
            raise UsageError("continue_final_message and add_generation_prompt exclude each other")
        if opens is False and (goes_on is False or not begun):
            raise UsageError(
                "add_generation_prompt: false is for continue_final_message: true, to go on from "
                "an answer that has begun"
            )
        return begun and (goes_on if goes_on is not None else not opens)


class Conversing(GoesOn):
    """What the requests with conversations share."""

    parallel_tool_calls: bool | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="More variables of the model's chat template."
    )


class StreamOptions(Part):
    """What a stream has besides the answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(
        None, description="With include_usage: each event has the usage so far, as vLLM's do."
    )
    include_obfuscation: Annotated[bool | None, NoEffect()] = None


class Streamed(Sampling):
    """A request whose answer may be streamed."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    min_tokens: Whole | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Streamed:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    def sampling_options(self) -> dict[str, Any]:
        """Keywords of `Request.of`."""
        ends = {"min_tokens": self.min_tokens, "ignore_eos": self.ignore_eos}
        return super().sampling_options() | ends

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def usage_of(self, answer: AnswerState) -> dict[str, Any]:
        """The `usage` field of an event within a stream."""
        if not self.wants_usage:
            return {}
        assert self.stream_options is not None
        in_each = self.stream_options.continuous_usage_stats
        return {"usage": usage_so_far(answer) if in_each else None}


class TextFormat(Part):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Part):
    """A JSON object."""

    type: Literal["json_object"]


class RegexFormat(Part):
    """Text that a regular expression matches from start to end. An extension."""

    type: Literal["regex"]
    regex: Text


class GrammarFormat(Part):
    """Text that a grammar in llguidance's dialect of Lark accepts. An extension."""

    type: Literal["grammar"]
    grammar: Text
    syntax: Literal["lark"] = "lark"


class SchemaOf(Part):
    """A named JSON schema."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="The answer always follows the schema.")


class JsonSchemaFormat(Part):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: SchemaOf


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | GrammarFormat,
    Field(discriminator="type"),
]


def reasoning_of(think: bool | str | None, effort: str | None) -> bool | str | None:
    """The value of `Request.think`.

    Raises:
        UsageError: both fields are set.
    """
    if think is not None and effort is not None:
        raise UsageError("think and reasoning_effort set the same: give one")
    return think if effort is None else _THINK.get(effort, effort)


def format_grammar(format: ResponseFormat | SchemaOf | None) -> Grammar | None:
    """The grammar of a response format or of a named schema; None for any text."""
    match format:
        case JsonObjectFormat():
            return Grammar("json_object")
        case JsonSchemaFormat():
            return format_grammar(format.json_schema)
        case SchemaOf():
            return Grammar("json_schema", json.dumps(format.schema_))
        case RegexFormat():
            return Grammar("regex", format.regex)
        case GrammarFormat():
            return Grammar("lark", format.grammar)
    return None
