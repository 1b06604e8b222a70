"""How each program is pointed at a server: environment, arguments and files, as data.

Each entry was tried with the version that it names. None writes into a program's own settings:
where environment and arguments do not suffice, a file of ours is named by one of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxkv.errors import UsageError

MAX_OUTPUT = 32_000
"""Tokens of one answer that a program may ask for, at most; a quarter of a small context."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a program is pointed at.

    Args:
        url: the server's address, without a slash at the end.
        model: the model's name or alias.
        key: sent as the API key.
        context: tokens of prompt and answer together.
        folder: where the call's files go.
        sees: whether the model takes pictures: several programs send none unless they are told.
    """

    url: str
    model: str
    key: str
    context: int
    folder: Path
    sees: bool = False

    @property
    def inputs(self) -> list[str]:
        """What the model takes, as most programs call it."""
        return ["text", "image"] if self.sees else ["text"]

    @property
    def output(self) -> int:
        """Tokens to leave for an answer."""
        return min(MAX_OUTPUT, self.context // 4)


@dataclass(frozen=True, slots=True)
class Call:
    """How a program is called.

    Args:
        environment: variables to set.
        defaults: variables to set unless the user has.
        arguments: put before the user's.
        removed: variables that would lead the program to another server.
        files: name and content of what goes into the target's folder.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Program:
    """A program that can be launched.

    Args:
        name: as `mlxkv launch` takes it.
        title: its own name.
        command: what is looked up on PATH.
        install: a command that installs it.
        tried: the version that was tried.
        call: makes the call.
    """

    name: str
    title: str
    command: str
    install: str
    tried: str
    call: Callable[[Target], Call]


def find_program(name: str) -> Program:
    """The program of a name.

    Raises:
        UsageError: not in the table.
    """
    for program in PROGRAMS:
        if program.name == name:
            return program
    known = ", ".join(program.name for program in PROGRAMS)
    raise UsageError(f"PROGRAM must be one of {known}; got {name!r}")


def executable(program: Program) -> str:
    """The path of a program.

    Raises:
        UsageError: it is not installed.
    """
    path = shutil.which(program.command)
    if path is None:
        raise UsageError(
            f"{program.title} is not installed (no {program.command} on PATH): {program.install}"
        )
    return path


def _claude(to: Target) -> Call:
    kinds = ("OPUS", "SONNET", "HAIKU", "FABLE")
    names = [f"ANTHROPIC_DEFAULT_{kind}_MODEL" for kind in kinds]
    names += ["ANTHROPIC_MODEL", "ANTHROPIC_SMALL_FAST_MODEL", "CLAUDE_CODE_SUBAGENT_MODEL"]
    return Call(
        {
            "ANTHROPIC_BASE_URL": to.url,
            "ANTHROPIC_AUTH_TOKEN": to.key,
            **dict.fromkeys(names, to.model),
        },
        {
            # Compaction goes by the first; by the second, from 100,000 on, for names like claude-*.
            "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(to.context),
            "CLAUDE_CODE_AUTO_COMPACT_WINDOW": str(to.context),
            "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(to.output),
            # A line at the head of the system prompt that changes with every request.
            "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        },
        removed=(
            "ANTHROPIC_API_KEY",
            "CLAUDE_CODE_OAUTH_TOKEN",
            "CLAUDE_CODE_USE_BEDROCK",
            "CLAUDE_CODE_USE_VERTEX",
            "CLAUDE_CODE_USE_FOUNDRY",
        ),
    )


def _codex(to: Target) -> Call:
    # Codex reads the values as TOML, whose strings JSON's are.
    provider = ", ".join(
        f"{key}={json.dumps(value)}"
        for key, value in {
            "name": "mlxkv",
            "base_url": f"{to.url}/v1",
            "wire_api": "responses",
            "env_key": "MLXKV_API_KEY",
        }.items()
    )
    settings = {
        "model": json.dumps(to.model),
        "model_provider": '"mlxkv"',
        "model_providers.mlxkv": f"{{{provider}}}",
        "model_context_window": str(to.context),
    }
    arguments = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
    return Call({"MLXKV_API_KEY": to.key}, arguments=tuple(arguments))


def _opencode(to: Target) -> Call:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "mlxkv",
        "options": {"baseURL": f"{to.url}/v1", "apiKey": to.key},
        "models": {
            to.model: {
                "name": to.model,
                "limit": {"context": to.context, "output": to.output},
                "attachment": to.sees,
                "modalities": {"input": to.inputs, "output": ["text"]},
            }
        },
    }
    name = f"mlxkv/{to.model}"
    config = {"provider": {"mlxkv": provider}, "model": name, "small_model": name}
    return Call({"OPENCODE_CONFIG_CONTENT": json.dumps(config)})


def _qwen(to: Target) -> Call:
    file = "qwen.json"
    arguments = ("--auth-type", "openai", "--openai-base-url", f"{to.url}/v1", "--model", to.model)
    return Call(
        {
            "OPENAI_API_KEY": to.key,
            "OPENAI_BASE_URL": f"{to.url}/v1",
            "OPENAI_MODEL": to.model,
            # Defaults below all settings of the user's.
            "QWEN_CODE_SYSTEM_DEFAULTS_PATH": str(to.folder / file),
        },
        arguments=arguments,
        files={file: _json({"model": {"generationConfig": {"contextWindowSize": to.context}}})},
    )


def _copilot(to: Target) -> Call:
    return Call(
        {
            "COPILOT_PROVIDER_BASE_URL": f"{to.url}/v1",
            "COPILOT_PROVIDER_TYPE": "openai",
            "COPILOT_PROVIDER_API_KEY": to.key,
            "COPILOT_MODEL": to.model,
        },
        {
            "COPILOT_PROVIDER_MAX_PROMPT_TOKENS": str(to.context - to.output),
            "COPILOT_PROVIDER_MAX_OUTPUT_TOKENS": str(to.output),
        },
        removed=("COPILOT_PROVIDER_BEARER_TOKEN", "COPILOT_PROVIDER_MODEL_ID"),
    )


def _aider(to: Target) -> Call:
    file, name = "aider.json", f"openai/{to.model}"
    facts = {
        "max_input_tokens": to.context,
        "max_tokens": to.context,
        "max_output_tokens": to.output,
        "input_cost_per_token": 0,
        "output_cost_per_token": 0,
        "litellm_provider": "openai",
        "mode": "chat",
        "supports_vision": to.sees,
    }
    return Call(
        {
            "OPENAI_API_BASE": f"{to.url}/v1",
            "OPENAI_API_KEY": to.key,
            "AIDER_MODEL_METADATA_FILE": str(to.folder / file),
        },
        arguments=("--model", name),
        files={file: _json({name: facts})},
    )


def _cline(to: Target) -> Call:
    file, provider = "cline.json", "openai-compatible"
    settings = {
        "provider": provider,
        "apiKey": to.key,
        "model": to.model,
        "baseUrl": f"{to.url}/v1",
    }
    entry = {
        "settings": settings,
        "updatedAt": "2026-01-01T00:00:00.000Z",
        "tokenSource": "manual",
    }
    stored = {
        "version": 1,
        "lastUsedProvider": provider,
        "modes": {},
        "providers": {provider: entry},
    }
    return Call(
        {
            "CLINE_PROVIDER_SETTINGS_PATH": str(to.folder / file),
            # Else a daemon, which outlives the program, makes the requests.
            "CLINE_SESSION_BACKEND_MODE": "local",
        },
        files={file: _json(stored)},
    )


def _continue(to: Target) -> Call:
    file = "continue.yaml"  # YAML contains JSON
    model = {
        "name": to.model,
        "provider": "openai",
        "model": to.model,
        "apiBase": f"{to.url}/v1",
        "apiKey": to.key,
        "roles": ["chat", "edit", "apply"],
        "capabilities": ["tool_use", "image_input"] if to.sees else ["tool_use"],
        "defaultCompletionOptions": {"contextLength": to.context, "maxTokens": to.output},
    }
    config = {"name": "mlxkv", "version": "1.0.0", "schema": "v1", "models": [model]}
    arguments = ("--config", str(to.folder / file))
    return Call(arguments=arguments, files={file: _json(config)})


def _pi(to: Target) -> Call:
    file = "pi.js"
    model = {
        "id": to.model,
        "name": to.model,
        "reasoning": False,
        "input": to.inputs,
        "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0},
        "contextWindow": to.context,
        "maxTokens": to.output,
    }
    provider = {
        "name": "mlxkv",
        "baseUrl": f"{to.url}/v1",
        "apiKey": to.key,
        "api": "openai-completions",
        "models": [model],
    }
    text = f'export default (pi) => pi.registerProvider("mlxkv", {_json(provider).strip()});\n'
    arguments = ("-e", str(to.folder / file), "--provider", "mlxkv", "--model", to.model)
    return Call(arguments=arguments, files={file: text})


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _npm(package: str) -> str:
    return f"npm install -g {package}"


PROGRAMS = (
    Program(
        "claude",
        "Claude Code",
        "claude",
        _npm("@anthropic-ai/claude-code"),
        "2.1.197",
        _claude,
    ),
    Program("codex", "Codex", "codex", _npm("@openai/codex"), "0.171.0", _codex),
    Program("opencode", "OpenCode", "opencode", _npm("opencode-ai"), "1.18.33", _opencode),
    Program("qwen", "Qwen Code", "qwen", _npm("@qwen-code/qwen-code"), "0.15.10", _qwen),
    Program("copilot", "Copilot CLI", "copilot", _npm("@github/copilot"), "1.0.102", _copilot),
    Program("cline", "Cline CLI", "cline", _npm("cline"), "3.0.65", _cline),
    Program("continue", "Continue CLI", "cn", _npm("@continuedev/cli"), "1.5.47", _continue),
    Program("pi", "pi", "pi", _npm("@earendil-works/pi-coding-agent"), "0.74.2", _pi),
    Program("aider", "aider", "aider", "pip install aider-chat", "0.86.2", _aider),
)
"""What `mlxkv launch` starts."""
