"""In every family's template a changed state costs no more than the text that tells it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlxkv.chat.chat_template import ChatTemplate
from mlxkv.server.agents.state import plan_history, split, with_blocks
from mlxkv.server.agents.state_memory import StateMemory
from tests.support import chat_templates

TEMPLATES = sorted(Path(chat_templates.__path__[0]).glob("*.jinja"))
TOOL = {
    "type": "function",
    "function": {
        "name": "read",
        "description": "Read a file. " * 20,
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
    },
}
HISTORY = [
    {"role": "user", "content": "Do it."},
    {"role": "assistant", "content": "It is done. " * 9},
    {"role": "user", "content": "Go on."},
]


class Renderer:
    """Renders a client's conversations, as a server that tells what changes behind what stays."""

    def __init__(self, template: Path):
        source = template.read_text(encoding="utf-8")
        self.template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
        self.memory = StateMemory()

    def render(self, state: str, messages: list[dict[str, Any]]) -> str:
        system = {"role": "system", "content": f"You are an agent. {'Mind. ' * 99}\n\n{state}"}
        conversation = split("", [system, *messages])
        assert conversation is not None
        history = plan_history(conversation, self.memory)
        self.memory.put(conversation.names[conversation.newest], history)
        return self.template.render(with_blocks(conversation, history), tools=[TOOL])


def n_lost(before: str, now: str) -> int:
    """Characters that have to be computed where those of `before` are held."""
    pairs = enumerate(zip(before, now, strict=False))
    shared = next((i for i, (a, b) in pairs if a != b), min(len(before), len(now)))
    return len(now) - shared


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_a_changed_state_costs_the_text_that_tells_it(template: Path):
    clean, dirty = "gitStatus: clean", "gitStatus: M a.py"
    lost = []
    for state in (clean, dirty):
        renderer = Renderer(template)
        first = renderer.render(clean, HISTORY[:1])
        lost.append(n_lost(first, renderer.render(state, HISTORY)))
    same, changed = lost
    assert changed - same == len(f"\n\n<current-state>\n{dirty}\n</current-state>")


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_a_new_conversation_shares_the_system_text_and_the_tools(template: Path):
    renderer, other = Renderer(template), [{"role": "user", "content": "Else?"}]
    first = renderer.render("gitStatus: clean", HISTORY[:1])
    assert n_lost(first, renderer.render("gitStatus: M a.py", other)) < 250
