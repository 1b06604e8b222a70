"""The conversations whose renderings are in golden.json. No transformers here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
GOLDEN = FOLDER / "golden.json"
TEMPLATES = {path.stem: path for path in sorted(FOLDER.glob("*.jinja"))}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

SYSTEM = {"role": "system", "content": "Be brief.\n"}
HELLO = {"role": "user", "content": "  Hello, <world> & 'you' \u2013 日本 🙂\n"}
ANSWER = {"role": "assistant", "content": " Hi there!\n\n"}
MORE = {"role": "user", "content": "And\\then?\t{{ not_a_variable }} {% if %}"}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA thought-out answer."}
APART = {"role": "assistant", "content": "Answer.", "reasoning": "kept apart", "name": None}
PARTS = {
    "role": "user",
    "content": [{"type": "image"}, {"type": "text", "text": " What is in it? "}],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather at a <place> \u2013 in °C & more",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "type": "function",
            "function": {"name": "weather", "arguments": {"place": "Köln", "n": 1.5}},
        }
    ],
}
TWO_CALLS = {**CALL, "content": "Both:", "tool_calls": CALL["tool_calls"] * 2}
NESTED_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "route",
            "description": "A way",
            "parameters": {
                "type": "object",
                "properties": {
                    "stops": {"type": "array", "items": {"type": "string"}, "description": "Via"},
                    "how": {"type": "string", "enum": ["foot", "bike"], "default": "foot"},
                    "limits": {
                        "type": "object",
                        "properties": {"km": {"type": "number"}, "hills": {"type": "boolean"}},
                        "required": ["km"],
                    },
                },
                "required": ["stops"],
            },
        },
    }
]
NESTED_CALL = {
    "role": "assistant",
    "reasoning_content": "Two lines\nof thought",
    "tool_calls": [
        {
            "type": "function",
            "function": {
                "name": "route",
                "arguments": {
                    "stops": ['a "b"', "c\nd"],
                    "limits": {"km": 3, "hills": False, "deep": [{"x": [1, []]}]},
                },
            },
        }
    ],
}
ANSWERS = {
    "role": "assistant",
    "tool_responses": [{"name": "route", "response": {"way": ["a", "c"], "km": 2.5}}],
}
RESULT = {"role": "tool", "content": '{"t": 21}'}

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one": {"messages": [HELLO]},
    "system": {"messages": [SYSTEM, HELLO]},
    "three turns": {"messages": [SYSTEM, HELLO, ANSWER, MORE]},
    "no generation prompt": {"messages": [HELLO, ANSWER], "add_generation_prompt": False},
    "two users": {"messages": [HELLO, MORE]},
    "parts": {"messages": [PARTS]},
    "reasoning in the text": {"messages": [HELLO, THOUGHT, MORE, THOUGHT]},
    "reasoning apart": {"messages": [HELLO, APART], "add_generation_prompt": False},
    "no thinking": {"messages": [HELLO], "enable_thinking": False},
    "thinking": {"messages": [SYSTEM, HELLO], "enable_thinking": True},
    "effort": {"messages": [HELLO], "reasoning_effort": "high"},
    "earlier reasoning": {"messages": [HELLO, APART, MORE]},
    "earlier reasoning kept": {"messages": [HELLO, APART, MORE], "clear_thinking": False},
    "nested call": {"messages": [HELLO, NESTED_CALL, RESULT], "tools": NESTED_TOOLS},
    "call and answer": {
        "messages": [SYSTEM, HELLO, NESTED_CALL, RESULT, ANSWER, MORE],
        "tools": NESTED_TOOLS,
        "enable_thinking": True,
    },
    "result in the turn": {"messages": [HELLO, NESTED_CALL, ANSWERS], "tools": NESTED_TOOLS},
    "date": {"messages": [HELLO], "date_string": "26 Jul 2024"},
    "tools": {"messages": [SYSTEM, HELLO], "tools": TOOLS},
    "tool call": {"messages": [HELLO, CALL, RESULT], "tools": TOOLS},
    "two tool calls": {"messages": [HELLO, TWO_CALLS, RESULT, RESULT], "tools": TOOLS},
}
