"""An agent's sessions against a running server: what each request computes of its prompt.

The shape is a coding agent's: a billing line, a system text that ends with a git status, tools and
history behind it in the template. A token is a byte here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.command_line import chat_model, environment
from tests.support.server_process import Server

TEMPLATE = (
    "<|im_start|>system\n{{ messages[0]['content'] }}\n# Tools\n"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% for m in messages[1:] %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m['tool_calls'] or () %}{{ call | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RULES = " ".join(f"Rule {i} of the agent." for i in range(60))
TOOL = {"name": "read", "description": RULES[:900], "input_schema": {"type": "object"}}
PAGE = 256
FRAME = 200
"""Tokens of a new message, its frame and a block that tells a state."""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    chat_model(tmp_path / "models" / "tiny", max_position_embeddings=8192, template=TEMPLATE)
    return environment(tmp_path, MLXKV_KV=str(tmp_path / "kv"), MLXKV_KV_DISK="1GiB")


@pytest.fixture
def server(env: dict[str, str]) -> Iterator[Server]:
    made = Server(env, "--agent-prompts")
    yield made
    made.stop()


class Agent:
    """A coding agent: each request has another billing line."""

    def __init__(self, server: Server):
        self.server, self.n_asked = server, 0

    def ask(self, status: str, messages: list[Any]) -> dict[str, Any]:
        """The figures of one answer."""
        self.n_asked += 1
        system = [
            f"x-anthropic-billing-header: cc_version=2.1.{self.n_asked}; cch={self.n_asked:05};",
            f"You are an agent.\n\n{RULES}\n\ngitStatus: {status}",
        ]
        body = {
            "model": "tiny",
            "max_tokens": 2,
            "system": [{"type": "text", "text": text} for text in system],
            "tools": [TOOL],
            "messages": messages,
        }
        response = httpx.post(f"{self.server.url}/v1/messages", json=body, timeout=60)
        assert response.status_code == 200, response.text
        return response.json()["usage"]["prompt_cache"]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def history() -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [user("Do it.")]
    for i in range(3):
        call = {"type": "tool_use", "id": f"toolu_{i:09}", "name": "read", "input": {"i": i}}
        result = {"type": "tool_result", "tool_use_id": call["id"], "content": RULES[i:][:400]}
        left = {"type": "text", "text": f"<total_tokens>{9000 - i} tokens left</total_tokens>"}
        made += [{"role": "assistant", "content": [call]},
                 {"role": "user", "content": [result, left]}]  # fmt: skip
    return made


def test_a_session_computes_what_is_new_whatever_the_agent_changes(env, server):
    agent, turns = Agent(server), history()
    first = agent.ask("clean", turns)
    assert first["computed_tokens"] > 3000 and first["moved_chars"] == len("gitStatus: clean")
    for status, text in [("clean", "Go on."), ("M a.py", "And now?"), ("M a.py", "Fine.")]:
        turns = [*turns, {"role": "assistant", "content": "So."}, user(text)]
        assert agent.ask(status, turns)["computed_tokens"] < FRAME
    assert agent.ask("D c.py", [user("Something else.")])["computed_tokens"] < FRAME + PAGE
    assert server.stop() == 0
    agent.server = again = Server(env, "--agent-prompts")
    turns = [*turns, {"role": "assistant", "content": "So."}, user("Still there?")]
    after = agent.ask("?? new.py", turns)
    assert after["computed_tokens"] < FRAME + PAGE and after["restored_ssd_tokens"] > 3000
    assert again.stop() == 0


def test_without_the_option_a_changed_state_costs_what_is_behind_it(env):
    server = Server(env)
    agent, turns = Agent(server), history()
    agent.ask("clean", turns)
    turns = [*turns, {"role": "assistant", "content": "So."}, user("Go on.")]
    same, changed = agent.ask("clean", turns), agent.ask("M a.py", turns)
    assert same["computed_tokens"] < FRAME < 1500 < changed["computed_tokens"]
    assert "moved_chars" not in changed
    server.stop()
