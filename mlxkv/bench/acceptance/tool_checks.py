"""Tools, behind a system prompt as agents have it."""

from __future__ import annotations

import json
from typing import Any

from mlxkv.bench.acceptance.report import Failed, Skip, Wrong, brief, holds, said
from mlxkv.bench.acceptance.subject import Messages, Subject, figures, paragraphs, user
from mlxkv.errors import UsageError
from mlxkv.generation.outputs import Result
from mlxkv.sampling.grammar import Grammar

CALL_TOKENS, FORCED_TOKENS = 192, 320
"""Of answers with calls. White space inside a forced one is the model's choice, within bounds."""


def _tool(name: str, about: str, **arguments: str) -> dict[str, Any]:
    properties = {key: {"type": "string", "description": text} for key, text in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": name, "description": about, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [
    _tool("read_file", "Read a file.", path="its path"),
    _tool("list_folder", "List the files in a folder.", path="its path"),
    _tool("search", "Search all files for a text.", text="what to find"),
    _tool("run", "Run a shell command.", command="the command line"),
    _tool("weather", "The weather of a city now.", city="its name"),
]
NAMES = [tool["function"]["name"] for tool in TOOLS]
CITIES = ["Oslo", "Rome"]
READ = "Read the file notes.txt, and tell me the day of the meeting."


def _agent(subject: Subject, question: str) -> Messages:
    subject.needs_chat()
    rules = f"You are an agent that works with tools.\n{paragraphs(subject, subject.agent_tokens)}"
    messages = [{"role": "system", "content": rules}, *user(question)]
    needed = len(subject.tokens(messages, tools=TOOLS)) + FORCED_TOKENS
    if needed > subject.llm.context:
        raise Skip(f"five tools and their answers need a context of {needed:,} tokens")
    return messages


def _told(subject: Subject, messages: Messages, *texts: str) -> None:
    """Raise Failed unless the prompt tells of all tools, and has these texts in that order."""
    prompt = subject.llm.render(messages, tools=TOOLS)
    for name in NAMES:
        holds(name in prompt, f"the prompt does not tell of the tool {name}")
    at = 0
    for text in texts:
        holds(text in prompt[at:], f"the prompt does not hold {text!r} in its place")
        at += prompt[at:].index(text) + len(text)


def _what(made: Result) -> str:
    called = ", ".join(
        f"{call.name}({brief(str(dict(call.arguments)))})" for call in made.tool_calls
    )
    return called or repr(brief(made.text))


def _sound(made: Result) -> None:
    """Raise Wrong if a call is none of the tools', or cannot be read."""
    for call in made.tool_calls:
        if call.error is not None or call.name not in NAMES:
            raise Wrong(f"a call cannot be run: {call.name}: {call.error or 'no such tool'}")


def calls(subject: Subject) -> str:
    """One of several tools is called."""
    messages = _agent(subject, "Read the file notes.txt.")
    _told(subject, messages, "notes.txt")
    made = subject.ask(messages, tools=TOOLS, max_tokens=CALL_TOKENS)
    _sound(made)
    for call in made.tool_calls:
        if call.name == "read_file":
            said(str(call.arguments.get("path")), ["notes.txt"])
            return f"a call behind {made.stats.prompt_tokens:,} tokens"
    raise Wrong(f"it did not call read_file: {_what(made)}")


def forced(subject: Subject) -> str:
    """A call that has to come follows the tool's schema, whatever the model would say."""
    messages = _agent(subject, "What is the weather in Rome?")
    schema = {
        "type": "object",
        "properties": {"city": {"enum": CITIES}},
        "required": ["city"],
        "additionalProperties": False,
    }
    wanted = {"tools": [{"name": "weather", "parameters": schema}], "parallel": False}
    call_of = Grammar("tools", json.dumps({**wanted, "content": None}))
    try:
        made = subject.ask(messages, tools=TOOLS, format=call_of, max_tokens=FORCED_TOKENS)
    except UsageError as error:
        raise Skip(f"calls cannot be forced: {error}") from None
    if made.finish_reason == "length":
        raise Wrong(f"the call did not end within {FORCED_TOKENS} tokens")
    if len(made.tool_calls) != 1:
        raise Failed(f"{len(made.tool_calls)} calls, and one was forced: {_what(made)}")
    (call,) = made.tool_calls
    holds(call.error is None and call.name == "weather", f"it called {_what(made)}: {call.error}")
    city = call.arguments.get("city")
    holds(city in CITIES and len(call.arguments) == 1, f"not the schema: {_what(made)}")
    said(str(city), ["Rome"])
    return _what(made)


def parallel(subject: Subject) -> str:
    """Two calls in one answer."""
    messages = _agent(subject, "What is the weather in Rome and in Oslo? Ask for both at once.")
    made = subject.ask(messages, tools=TOOLS, max_tokens=CALL_TOKENS)
    _sound(made)
    cities = " ".join(str(c.arguments.get("city")) for c in made.tool_calls if c.name == "weather")
    said(cities or _what(made), ["Rome"], ["Oslo"])
    if len(made.tool_calls) < 2:
        raise Wrong(f"one call for two cities: {_what(made)}")
    return f"{len(made.tool_calls)} calls"


def _with_result(question: Messages) -> Messages:
    function = {"name": "read_file", "arguments": {"path": "notes.txt"}}
    call = {"id": "call12345", "type": "function", "function": function}
    result = {"role": "tool", "tool_call_id": "call12345", "name": "read_file"}
    return [
        *question,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {**result, "content": "The meeting is on Thursday at 14:00."},
    ]


def results(subject: Subject) -> str:
    """A tool's result is used in the answer."""
    messages = _with_result(_agent(subject, READ))
    _told(subject, messages, "day of the meeting", "notes.txt", "on Thursday at 14:00")
    made = subject.ask(messages, tools=TOOLS)
    _sound(made)
    said(made.text or _what(made), ["Thursday"])
    return brief(made.text)


def reuse(subject: Subject) -> str:
    """The turn with a tool's result restores all that was before it."""
    question = _agent(subject, f"This is request {subject.mark}. {READ}")
    made = subject.reuses(question, _with_result(question), tools=TOOLS, max_tokens=1)
    return figures(made.stats)
