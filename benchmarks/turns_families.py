"""Families of the turns benchmark: template, tokenizer, and how a model of it writes an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Said:
    """What an answer says.

    Args:
        reasoning: thoughts before it.
        text: for the user; may be empty.
        call: name and arguments of a function, None for no call.
    """

    reasoning: str
    text: str
    call: tuple[str, dict[str, Any]] | None = None


Write = Callable[[Said], str]


def chatml(said: Said) -> str:
    """Qwen3: calls in JSON as Python writes it."""
    return _thought(said, "<think>\n{}\n</think>\n\n") + hermes(said)


def hermes(said: Said) -> str:
    """The same without reasoning."""
    if said.call is None:
        return said.text + "<|im_end|>"
    name, arguments = said.call
    call = json.dumps({"name": name, "arguments": arguments})
    before = said.text + "\n" if said.text else ""
    return f"{before}<tool_call>\n{call}\n</tool_call><|im_end|>"


def coder(said: Said) -> str:
    """Qwen3-Coder: calls in tags."""
    if said.call is None:
        return said.text + "<|im_end|>"
    name, arguments = said.call
    inside = "".join(f"<parameter={key}>\n{v}\n</parameter>\n" for key, v in arguments.items())
    before = said.text + "\n\n" if said.text else ""
    return f"{before}<tool_call>\n<function={name}>\n{inside}</function>\n</tool_call><|im_end|>"


def coder_thinking(said: Said) -> str:
    """Qwen3.5: the same behind reasoning, which the prompt has opened."""
    return f"{said.reasoning}\n</think>\n\n" + coder(said)


def thinking_text(said: Said) -> str:
    """SmolLM3 without tools."""
    return _thought(said, "<think>\n{}\n</think>\n") + said.text + "<|im_end|>"


def glm(said: Said) -> str:
    """GLM-4.6: calls in tags, a line each."""
    before = "\n<think>" + said.reasoning + "</think>" + ("\n" + said.text if said.text else "")
    return _with_glm_call(said, before, "\n")


def glm_opened(said: Said) -> str:
    """GLM-4.7 and 5: in one line, behind reasoning that the prompt has opened."""
    return _with_glm_call(said, said.reasoning + "</think>" + said.text, "")


def _with_glm_call(said: Said, before: str, newline: str) -> str:
    if said.call is None:
        return before + "<|user|>"
    name, arguments = said.call
    inside = "".join(
        f"<arg_key>{key}</arg_key>{newline}<arg_value>{value}</arg_value>{newline}"
        for key, value in arguments.items()
    )
    return f"{before}{newline}<tool_call>{name}{newline}{inside}</tool_call><|observation|>"


def harmony(said: Said) -> str:
    """GPT-OSS: channels, calls in compact JSON."""
    thought = f"<|channel|>analysis<|message|>{said.reasoning}<|end|><|start|>assistant"
    if said.call is None:
        return f"{thought}<|channel|>final<|message|>{said.text}<|return|>"
    name, arguments = said.call
    compact = json.dumps(arguments, separators=(",", ":"))
    return (
        f"{thought}<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
        f"{compact}<|call|>"
    )


def gemma(said: Said) -> str:
    """Gemma 2 and 3: text alone, with a line break before the end of the turn."""
    return said.text + "\n<end_of_turn>"


def gemma4(said: Said) -> str:
    """Gemma 4: a channel of reasoning, calls in a notation of its own."""
    thought = f"<|channel>thought\n{said.reasoning}\n<channel|>"
    if said.call is None:
        return f"{thought}{said.text}<turn|>"
    name, arguments = said.call
    inside = ",".join(f'{key}:<|"|>{value}<|"|>' for key, value in arguments.items())
    return f"{thought}{said.text}<|tool_call>call:{name}{{{inside}}}<tool_call|><|tool_response>"


def llama(said: Said) -> str:
    """Llama 3: a call is an answer of JSON alone."""
    if said.call is None:
        return said.text + "<|eot_id|>"
    name, arguments = said.call
    return json.dumps({"name": name, "parameters": arguments}) + "<|eot_id|>"


def mistral(said: Said) -> str:
    """Mistral Small: a call's name and arguments behind a marker."""
    if said.call is None:
        return said.text + "</s>"
    name, arguments = said.call
    return f"{said.text}[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments)}</s>"


def ministral(said: Said) -> str:
    """Ministral: the same behind reasoning."""
    return f"[THINK]{said.reasoning}[/THINK]" + mistral(said)


def _thought(said: Said, form: str) -> str:
    return form.format(said.reasoning) if said.reasoning else ""


@dataclass(frozen=True, slots=True)
class Family:
    """A family.

    Args:
        name: as the table shows it.
        template: file of its chat template.
        tokenizer: whose tokenizer is taken; what of `markers` it lacks is added to it.
        write: how a model of it writes an answer.
        ends: its end tokens.
        markers: its other special tokens.
        tools: whether its template knows tools.
    """

    name: str
    template: str
    tokenizer: str
    write: Write
    ends: tuple[str, ...]
    markers: tuple[str, ...] = ()
    tools: bool = True


_IM = ("<|im_end|>",)
_QWEN = ("<|im_start|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
_GLM = (
    *("[gMASK]", "<sop>", "<|system|>", "<|assistant|>", "<think>", "</think>", "<tool_call>"),
    *("</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
_GLM_ENDS = ("<|user|>", "<|observation|>")
_GEMMA4 = (
    *("<|turn>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'),
    *("<tool_response|>", "<|tool>", "<tool|>", "<|think|>"),
)
_MISTRAL = (
    *("[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[TOOL_RESULTS]", "[THINK]"),
    *("[/TOOL_RESULTS]", "[TOOL_CONTENT]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[/THINK]"),
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
)
_HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>")

FAMILIES = (
    Family("Qwen3", "Qwen-Qwen3-0.6B", "qwen3", chatml, _IM, _QWEN),
    Family("Qwen3-Coder", "Qwen3-Coder", "qwen3", coder, _IM, _QWEN),
    Family("Qwen3.5", "Qwen3.5-4B", "qwen3", coder_thinking, _IM, _QWEN),
    Family("GLM-4.6", "GLM-4.6", "qwen3", glm, _GLM_ENDS, _GLM),
    Family("GLM-4.7-Flash", "GLM-4.7-Flash", "qwen3", glm_opened, _GLM_ENDS, _GLM),
    Family("GLM-5.2", "GLM-5.2", "qwen3", glm_opened, _GLM_ENDS, _GLM),
    Family(
        "GPT-OSS", "openai-gpt-oss-120b", "gptoss", harmony, ("<|return|>", "<|call|>"), _HARMONY
    ),
    Family("Gemma 2", "google-gemma-2-2b-it", "gemma3", gemma, ("<end_of_turn>",), tools=False),
    Family("Gemma 3", "google-gemma-3-it", "gemma3", gemma, ("<end_of_turn>",), tools=False),
    Family(
        *("Gemma 4", "google-gemma-4-31B-it", "gemma3", gemma4, ("<turn|>", "<|tool_response>")),
        _GEMMA4,
    ),
    Family("Llama 3.1", "meta-llama-Llama-3.1-8B-Instruct", "llama3_1", llama, ("<|eot_id|>",)),
    Family("Llama 3.2", "meta-llama-Llama-3.2-3B-Instruct", "llama3_1", llama, ("<|eot_id|>",)),
    Family(
        *("Mistral Small 3.2", "Mistral-Small-3.2-24B-Instruct-2506", "llama2", mistral, ("</s>",)),
        _MISTRAL,
    ),
    Family(
        *("Ministral 3", "mistralai-Ministral-3-14B-Reasoning-2512", "llama2", ministral),
        ("</s>",),
        _MISTRAL,
    ),
    Family(
        *("SmolLM3", "HuggingFaceTB-SmolLM3-3B", "llama3_1", thinking_text, _IM),
        ("<|im_start|>", "<think>", "</think>"),
        tools=False,
    ),
    Family(
        *("Hermes 3", "NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "llama3_1", hermes, _IM),
        ("<|im_start|>", "<tool_call>", "</tool_call>"),
    ),
)
