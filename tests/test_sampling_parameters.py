"""One table of sampling parameters: each interface offers what it has, in the range it has."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from typer.testing import CliRunner

from mlxkv.cli import app
from mlxkv.commands.options import options_of
from mlxkv.errors import UsageError
from mlxkv.generation.request import SAMPLING
from mlxkv.sampling.params import DEFAULTS, PARAMETERS, Parameter, SamplingParams
from mlxkv.server.anthropic.fields import MessagesRequest
from mlxkv.server.ollama.fields import Options
from mlxkv.server.openai.chat import ChatRequest
from mlxkv.server.openai.completions import CompletionRequest
from mlxkv.server.openai.response_request import ResponseRequest
from mlxkv.terminal.slash_commands import PARAMETERS as CHAT

TABLE = [*PARAMETERS.items()]
APIS = (ChatRequest, CompletionRequest, ResponseRequest, Options)
HELLO = [{"role": "user", "content": "hi"}]
NEEDED: dict[type[BaseModel], dict[str, Any]] = {
    ChatRequest: {"model": "m", "messages": HELLO},
    CompletionRequest: {"model": "m", "prompt": "hi"},
    ResponseRequest: {"model": "m", "input": "hi"},
    Options: {},
    MessagesRequest: {"model": "m", "messages": HELLO, "max_tokens": 5},
}


def outside(parameter: Parameter) -> list[Any]:
    """Values on both sides of a range, near it."""
    step = 1 if parameter.kind is int else 0.01
    found: list[Any] = [
        parameter.low - 2 * step,
        parameter.low if parameter.above else parameter.low - 3,
    ]
    return found if math.isinf(parameter.high) else [*found, parameter.high + step]


def test_the_table_has_all_parameters_but_the_bias():
    assert {*PARAMETERS, "logit_bias"} == SAMPLING
    assert {name: getattr(DEFAULTS, name) for name in PARAMETERS} == {
        name: parameter.off for name, parameter in TABLE
    }


@pytest.mark.parametrize(("name", "parameter"), TABLE, ids=[*PARAMETERS])
@pytest.mark.parametrize("api", APIS)
def test_every_api_has_each_parameter_in_its_range(api, name, parameter):
    schema = api.model_json_schema()["properties"][name]["anyOf"][0]
    assert schema["type"] == ("integer" if parameter.kind is int else "number")
    low = "exclusiveMinimum" if parameter.above else "minimum"
    assert schema[low] in (parameter.low, -1)
    assert schema["maximum"] == parameter.high or math.isinf(parameter.high)
    if parameter.off is not None:
        assert api(**NEEDED[api], **{name: parameter.off}).sampling() == {name: parameter.off}
    for value in outside(parameter):
        with pytest.raises(ValidationError, match=name):
            api(**NEEDED[api], **{name: value})
        with pytest.raises(UsageError, match=f"{name} must be"):
            SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "parameter"), TABLE, ids=[*PARAMETERS])
def test_anthropics_api_has_what_the_table_says(name, parameter):
    asked = {**NEEDED[MessagesRequest], name: parameter.off or 1}
    assert MessagesRequest(**asked).sampling() == {name: asked[name]}


@pytest.mark.parametrize(("name", "parameter"), TABLE, ids=[*PARAMETERS])
def test_run_and_the_chat_have_each_parameter_with_a_help_line(name, parameter):
    option = f"--{name.replace('_', '-')}"
    assert (name in CHAT) == bool(parameter.help)
    assert options_of(app, ["run"]).name(name) == (option if parameter.help else None)
    shown = " ".join(
        CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "200"}).output.split()
    )
    assert (f"{option} <{parameter.kind.__name__}> {parameter.help}" in shown) == bool(
        parameter.help
    )


def test_run_says_what_an_option_takes():
    said = CliRunner().invoke(app, ["run", "m", "hi", "--top-p", "0"])
    assert isinstance(said.exception, UsageError)
    assert str(said.exception) == "top_p must be above 0 and at most 1; got 0.0"
    assert "is not a valid int" in CliRunner().invoke(app, ["run", "--top-k", "1.5"]).output


def test_one_parameter_under_two_names_is_refused():
    asked = json.loads('{"repeat_penalty": 1.1, "repetition_penalty": 1.1}')
    with pytest.raises(UsageError, match="repeat_penalty and repetition_penalty are one thing"):
        CompletionRequest(**NEEDED[CompletionRequest], **asked).sampling()
