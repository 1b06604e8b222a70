"""openai-harmony itself; runs offline where GPT-OSS's tokenizer lies in a folder.

`scripts/gpt-oss-tokenizer` fetches it; `MLXKV_TEST_GPT_OSS` names another folder.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

FOLDER = "MLXKV_TEST_GPT_OSS"


def tokenizer_folder() -> Path:
    """Where the real tokenizer lies; skips the test where it does not."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get(FOLDER) or cache / "mlxkv-tests" / "gpt-oss")
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"{folder} has no tokenizer.json: see scripts/gpt-oss-tokenizer")
    return folder


def encoding(folder: Path, scratch: Path) -> Any:
    """The library's encoding, on a vocabulary file made of a tokenizer.json.

    Args:
        folder: of tokenizer.json.
        scratch: where to write the vocabulary; the library checks its hash.
    """
    harmony = pytest.importorskip("openai_harmony")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    raw = _bytes_of_signs()
    with (scratch / "o200k_base.tiktoken").open("w") as file:
        for text, token in sorted(vocabulary.items(), key=lambda item: item[1]):
            data = base64.b64encode(bytes(raw[sign] for sign in text)).decode()
            file.write(f"{data} {token}\n")
    os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(scratch)
    try:
        return harmony.load_harmony_encoding("HarmonyGptOss")
    finally:
        del os.environ["TIKTOKEN_ENCODINGS_BASE"]


def render(encoding: Any, case: Mapping[str, Any]) -> list[int]:
    """The tokens of a conversation of `cases`."""
    import openai_harmony as harmony

    messages = [harmony.Message.from_role_and_content(harmony.Role("system"), _system(case))]
    given = list(case["messages"])
    head = []
    while given and given[0]["role"] in ("system", "developer"):
        head.append(given.pop(0)["content"])
    instructions = "\n\n".join(text for text in head if text)
    tools = [tool["function"] for tool in case.get("tools", ())]
    if instructions or tools:
        messages.append(_developer(instructions, tools))
    names: dict[str, str] = {}
    for message in given:
        messages += _messages(message, names)
    talk = harmony.Conversation.from_messages(messages)
    if case.get("add_generation_prompt", True):
        return encoding.render_conversation_for_completion(talk, harmony.Role.ASSISTANT)
    return encoding.render_conversation(talk)


def namespace(encoding: Any, schema: Mapping[str, Any]) -> str:
    """The developer message of one tool whose arguments have a schema."""
    function = {"name": "f", "description": "Does it.", "parameters": schema}
    return encoding.decode_utf8(encoding.render(_developer("", [function])))


def _system(case: Mapping[str, Any]) -> Any:
    import openai_harmony as harmony

    made = harmony.SystemContent.new()
    made = made.with_conversation_start_date(case["conversation_start_date"])
    if "reasoning_effort" in case:
        effort = harmony.ReasoningEffort(case["reasoning_effort"].capitalize())
        made = made.with_reasoning_effort(effort)
    if "model_identity" in case:
        made = made.with_model_identity(case["model_identity"])
        made = made.with_knowledge_cutoff(case["knowledge_cutoff"])
    return made


def _developer(instructions: str, functions: Sequence[Mapping[str, Any]]) -> Any:
    import openai_harmony as harmony

    made = harmony.DeveloperContent.new()
    if instructions:
        made = made.with_instructions(instructions)
    if functions:
        tools = [
            harmony.ToolDescription.new(each["name"], each["description"], each["parameters"])
            for each in functions
        ]
        made = made.with_function_tools(tools)
    return harmony.Message.from_role_and_content(harmony.Role("developer"), made)


def _messages(message: Mapping[str, Any], names: dict[str, str]) -> list[Any]:
    """One of ours as the format's messages."""
    import openai_harmony as harmony

    role, text = message["role"], message["content"]
    if role in ("system", "developer"):
        return [_developer(text, ())]
    if role == "user":
        return [harmony.Message.from_role_and_content(harmony.Role("user"), text)]
    if role == "tool":
        author = harmony.Author.new(
            harmony.Role("tool"), f"functions.{names[message['tool_call_id']]}"
        )
        made = harmony.Message.from_author_and_content(author, text)
        return [made.with_recipient("assistant").with_channel("commentary")]

    def spoken(text: str, channel: str) -> Any:
        return harmony.Message.from_role_and_content(harmony.Role("assistant"), text).with_channel(
            channel
        )

    thought, calls = message.get("reasoning_content"), message.get("tool_calls", ())
    made = [spoken(thought, "analysis")] if thought else []
    if text:
        made.append(spoken(text, "commentary" if calls else "final"))
    for call in calls:
        function = call["function"]
        names[call["id"]] = function["name"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        one = spoken(arguments, "commentary").with_recipient(f"functions.{function['name']}")
        made.append(one.with_content_type("<|constrain|>json"))
    return made


def _bytes_of_signs() -> dict[str, int]:
    """The signs by which byte-level vocabularies write bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {
        chr(256 + i): byte for i, byte in enumerate(hidden)
    }
