"""Chat and history, reasoning, structured output and tools."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

from mlxkv.bench.acceptance.report import Skip, Wrong, holds, said
from mlxkv.bench.acceptance.subject import Messages, Subject, paragraphs, user
from mlxkv.chat.chat_template import thinking_options
from mlxkv.errors import UsageError
from mlxkv.generation.outputs import Result, join_parts
from mlxkv.kv.types import STEP
from mlxkv.parsers.formats import thinks

THOUGHT_TOKENS = 512
CAPITAL = "What is the capital of France? Answer in one word."


def answers(subject: Subject) -> str:
    """A question is answered."""
    made = subject.ask(user(CAPITAL))
    said(made.text, ["Paris"])
    return made.text.strip()[:40]


def remembers(subject: Subject) -> str:
    """A second turn knows the first, and computes only what is new."""
    subject.needs_chat()
    talk = subject.llm.conversation("You are brief.")
    for _ in talk.send("My name is Ada. Greet me.", max_tokens=24):
        pass
    held = talk.kv_tokens
    chunks = list(talk.send("What is my name?", max_tokens=24))
    stats = chunks[-1].stats
    assert stats is not None
    if talk.append_only:
        new = stats.prompt_tokens - held
        holds(
            stats.computed_tokens <= max(new, 0) + STEP,
            f"{stats.computed_tokens} tokens were computed for {new} new ones",
        )
    said(join_parts(chunks)[0], ["Ada"])
    return f"{stats.computed_tokens} of {stats.prompt_tokens} tokens computed"


def chat_reuse(subject: Subject) -> str:
    """The same conversation again restores its KV."""
    messages = user(CAPITAL)
    subject.ask(messages, max_tokens=1)
    return subject.reused(messages)


def _switches(subject: Subject, think: bool) -> None:
    subject.needs_chat()
    tokenizer = subject.llm.tokenizer
    assert tokenizer.chat_template is not None
    try:
        thinking_options(tokenizer.chat_template, think, thinks(tokenizer))
    except UsageError:
        raise Skip("the chat template has no switch for reasoning") from None
    if not thinks(tokenizer):
        raise Skip("the model does not reason")


def thinks_on(subject: Subject) -> str:
    """With reasoning on, it comes apart from the answer."""
    _switches(subject, True)
    made = subject.ask(user("What is 17 + 25?"), think=True, max_tokens=THOUGHT_TOKENS)
    if not made.reasoning:
        raise Wrong(f"no reasoning; the answer is {made.text[:40]!r}")
    if made.finish_reason == "length":
        raise Wrong(f"the reasoning did not end within {THOUGHT_TOKENS} tokens")
    said(made.text, ["42"])
    return f"{len(made.reasoning):,} characters of reasoning"


def thinks_off(subject: Subject) -> str:
    """With reasoning off, there is none."""
    _switches(subject, False)
    made = subject.ask(user("What is 17 + 25?"), think=False)
    holds(not made.reasoning, f"it reasoned: {(made.reasoning or '')[:40]!r}")
    said(made.text, ["42"])
    return made.text.strip()[:40]


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Berlin", "Paris", "Rome"]},
        "is_capital": {"type": "boolean"},
        "rivers": {"type": "array", "items": {"enum": ["Seine", "Spree"]}, "maxItems": 2},
        "founded": {"type": "integer", "minimum": 1, "maximum": 2000},
    },
    "required": ["city", "is_capital", "rivers", "founded"],
    "additionalProperties": False,
}
DESCRIBE = "Describe the capital of France as a JSON object."


def schema(subject: Subject) -> str:
    """An answer matches a JSON schema."""
    made = subject.ask(user(DESCRIBE), format=SCHEMA, max_tokens=200)
    value: Any = None
    with contextlib.suppress(ValueError):
        value = json.loads(made.text)
    holds(_matches(value), f"it does not match the schema: {made.text[:60]!r}")
    said(value["city"], ["Paris"])
    return made.text


def _matches(value: Any) -> bool:
    properties = SCHEMA["properties"]
    if not isinstance(value, dict) or value.keys() != properties.keys():
        return False
    rivers, founded = value["rivers"], value["founded"]
    return (
        value["city"] in properties["city"]["enum"]
        and isinstance(value["is_capital"], bool)
        and isinstance(rivers, list)
        and len(rivers) <= 2
        and all(river in properties["rivers"]["items"]["enum"] for river in rivers)
        and type(founded) is int
        and 1 <= founded <= 2000
    )


def pattern(subject: Subject) -> str:
    """An answer matches a regular expression."""
    date = re.compile(r"(19|20)[0-9]{2}-[01][0-9]-[0-3][0-9]")
    made = subject.ask(user("When did humans first walk on the Moon?"), format=date)
    holds(date.fullmatch(made.text), f"it does not match: {made.text[:40]!r}")
    said(made.text, ["1969"])
    return made.text


def schema_reuse(subject: Subject) -> str:
    """A format does not cost the prefix."""
    subject.ask(user(DESCRIBE), format=SCHEMA, max_tokens=1)
    return subject.reused(user(DESCRIBE), format=SCHEMA)


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


def _agent(subject: Subject, question: str) -> Messages:
    subject.needs_chat()
    template = subject.llm.tokenizer.chat_template
    assert template is not None
    if "tools" not in template.variables:
        raise Skip("the chat template takes no tools")
    rules = f"You are an agent that works with tools.\n{paragraphs(subject, subject.agent_tokens)}"
    return [{"role": "system", "content": rules}, *user(question)]


def _checked(made: Result) -> Result:
    names = {tool["function"]["name"] for tool in TOOLS}
    for call in made.tool_calls:
        holds(call.name in names, f"it called {call.name!r}, which is none of the tools")
        holds(call.error is None, f"arguments of {call.name}: {call.error}")
    return made


def calls(subject: Subject) -> str:
    """One of several tools is called, behind a system prompt as agents have it."""
    messages = _agent(subject, "Read the file notes.txt.")
    made = _checked(subject.ask(messages, tools=TOOLS, max_tokens=128))
    for call in made.tool_calls:
        if call.name == "read_file":
            said(str(call.arguments.get("path")), ["notes.txt"])
            return f"{made.stats.prompt_tokens:,} tokens of prompt"
    raise Wrong(f"it did not call read_file: {_what(made)}")


def parallel(subject: Subject) -> str:
    """Two calls in one answer."""
    messages = _agent(subject, "What is the weather in Rome and in Oslo? Ask for both at once.")
    made = _checked(subject.ask(messages, tools=TOOLS, max_tokens=192))
    cities = " ".join(str(c.arguments.get("city")) for c in made.tool_calls if c.name == "weather")
    said(cities or _what(made), ["Rome"], ["Oslo"])
    return f"{len(made.tool_calls)} calls"


def results(subject: Subject) -> str:
    """A tool's result is used in the answer, and what was before it is restored."""
    question = _agent(subject, "Read the file notes.txt, and tell me the day of the meeting.")
    function = {"name": "read_file", "arguments": {"path": "notes.txt"}}
    call = {"id": "call12345", "type": "function", "function": function}
    result = {"role": "tool", "tool_call_id": "call12345", "name": "read_file"}
    subject.ask(question, tools=TOOLS, max_tokens=1)
    messages = [
        *question,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {**result, "content": "The meeting is on Thursday at 14:00."},
    ]
    made = _checked(subject.ask(messages, tools=TOOLS))
    stats = made.stats
    if subject.llm.pages is not None:
        holds(
            stats.computed_tokens <= 2 * STEP,
            f"{stats.computed_tokens:,} of {stats.prompt_tokens:,} tokens were computed again",
        )
    said(made.text or _what(made), ["Thursday"])
    return f"{stats.restored_tokens:,} of {stats.prompt_tokens:,} tokens restored"


def _what(made: Result) -> str:
    return ", ".join(call.name for call in made.tool_calls) or repr(made.text.strip()[:60])
