"""The same conversations over the three APIs, on models whose templates refuse them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.chat_templates.cases import TEMPLATES
from tests.support.command_line import chat_model, environment
from tests.support.server_process import Server

APIS = ("openai", "responses", "ollama", "anthropic")
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system comes first') }}{% endif %}[{{ m.role }}]{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOOL = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 1, "maximum": 3}}}
CLOSED = {**TOOL, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    for name, template in (("turns", TEMPLATES["turns"].read_text("utf-8")), ("strict", STRICT)):
        path = home / "models" / name
        chat_model(path, template=template, ascii=True, max_position_embeddings=4096)
    made = Server(environment(home, MLXKV_KV=str(home / "kv"), MLXKV_KV_DISK="0"))
    yield made
    assert made.stop() == 0, "".join(made.lines)


def ask(server: Server, api: str, model: str, messages: list[dict[str, Any]]) -> tuple[str, int]:
    """An answer of eight tokens and the length of its prompt."""
    path, body = {
        "openai": ("/v1/chat/completions", {"max_tokens": 8, "temperature": 0}),
        "responses": ("/v1/responses", {"max_output_tokens": 8, "temperature": 0}),
        "ollama": ("/api/chat", {"stream": False, "options": {"num_predict": 8, "temperature": 0}}),
        "anthropic": ("/v1/messages", {"max_tokens": 8, "temperature": 0}),
    }[api]
    messages = [dict(message) for message in messages]
    if api == "openai" and messages[-1]["role"] == "assistant":
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    body |= {"model": model, "input" if api == "responses" else "messages": messages}
    answer = httpx.post(server.url + path, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    said = answer.json()
    if api == "openai":
        return said["choices"][0]["message"]["content"], said["usage"]["prompt_tokens"]
    if api == "responses":
        return said["output"][0]["content"][0]["text"], said["usage"]["input_tokens"]
    if api == "ollama":
        return said["message"]["content"], said["prompt_cache"]["prompt_tokens"]
    usage = said["usage"]
    n = usage["input_tokens"] + usage["cache_read_input_tokens"]
    return said["content"][0]["text"], n


def says(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


@pytest.mark.parametrize("api", APIS)
def test_roles_in_a_row_are_what_one_message_is(server, api):
    joined = [says("user", "Translate.\n\nbonjour")]
    apart = [says("user", "Translate."), says("user", "bonjour")]
    assert ask(server, api, "turns", apart) == ask(server, api, "turns", joined)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("model", ["turns", "strict"])
def test_a_late_system_message_is_the_users(server, api, model):
    late = [says("user", "Hi"), says("assistant", "Yo"), says("system", "n"), says("user", "A")]
    folded = [*late[:2], says("user", "n\n\nA")]
    assert ask(server, api, model, late) == ask(server, api, model, folded)


@pytest.mark.parametrize("api", APIS)
def test_a_begun_answer_is_gone_on_from(server, api):
    whole, n = ask(server, api, "turns", [says("user", "Q")])
    rest, m = ask(server, api, "turns", [says("user", "Q"), says("assistant", whole[:5])])
    assert m == n + 5
    assert rest.startswith(whole[5:])


@pytest.mark.parametrize(
    ("api", "path", "given", "limit", "count"),
    [
        ("openai", "/v1/chat/completions", "messages", "max_tokens", "prompt_tokens"),
        ("responses", "/v1/responses", "input", "max_output_tokens", "input_tokens"),
    ],
)
def test_openai_closes_an_answer_where_it_is_told_to(server, api, path, given, limit, count):
    messages = [says("user", "Q"), says("assistant", "A")]
    body = {"model": "turns", limit: 2, given: messages}
    _, n = ask(server, api, "turns", messages)

    def n_tokens(**more: Any) -> int:
        return httpx.post(server.url + path, json=body | more).json()["usage"][count]

    assert n_tokens() == n_tokens(add_generation_prompt=False) == n
    assert n_tokens(continue_final_message=False) == n_tokens(add_generation_prompt=True) > n
    for wrong in (
        {"continue_final_message": True, "add_generation_prompt": True},
        {"continue_final_message": False, "add_generation_prompt": False},
        {"continue_final_message": True, given: messages[:1]},
        {"add_generation_prompt": False, given: messages[:1]},
    ):
        refused = httpx.post(server.url + path, json=body | wrong)
        assert refused.status_code == 400
        assert "continue_final_message" in refused.json()["error"]["message"]


def test_a_stored_response_that_went_on_is_one_answer_with_what_was_begun(server):
    url = f"{server.url}/v1/responses"
    body = {"model": "turns", "max_output_tokens": 4, "temperature": 0}
    turns = [says("user", "Q"), says("assistant", "be gun")]
    went_on = httpx.post(url, json={**body, "input": turns}, timeout=60).json()
    rest = went_on["output"][0]["content"][0]["text"]
    by_id = {**body, "previous_response_id": went_on["id"], "input": "And?"}
    whole = [turns[0], says("assistant", "be gun" + rest), says("user", "And?")]
    found = [
        httpx.post(url, json=each, timeout=60).json() for each in (by_id, body | {"input": whole})
    ]
    assert len({each["usage"]["input_tokens"] for each in found}) == 1
    assert found[0]["output"][0]["content"] == found[1]["output"][0]["content"]


def test_a_call_and_its_result_go_through_a_template_without_tools(server):
    tool = {"type": "function", "function": {"name": "f", "parameters": CLOSED}}
    user = says("user", "w")
    body = {"model": "turns", "max_tokens": 200, "tools": [tool], "temperature": 0}
    url = f"{server.url}/v1/chat/completions"
    made = httpx.post(url, json={**body, "messages": [user], "tool_choice": "required"}, timeout=60)
    message = made.json()["choices"][0]["message"]
    call = message["tool_calls"][0]
    assert call["function"]["name"] == "f"
    result = {"role": "tool", "tool_call_id": call["id"], "content": "18"}
    message["tool_call_errors"] = [{"name": "f", "error": "as an answer of ours has it"}]
    body |= {"max_tokens": 2, "messages": [user, message, result]}
    after = httpx.post(url, json=body, timeout=60)
    assert after.status_code == 200, after.text
    bare = httpx.post(url, json={"model": "turns", "max_tokens": 2, "messages": [user]}).json()
    told = httpx.post(url, json={**body, "messages": [user]}).json()
    assert told["usage"]["prompt_tokens"] > bare["usage"]["prompt_tokens"]


@pytest.mark.parametrize("api", APIS)
def test_control_in_a_message_is_text(server, api):
    plain = ask(server, api, "turns", [says("user", "a im_end b")])
    spelled = ask(server, api, "turns", [says("user", "a<|im_end|>b")])
    assert spelled[1] == plain[1] + 2  # a token a character
