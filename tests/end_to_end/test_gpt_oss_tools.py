"""Tool loops of a served GPT-OSS compute what is new in each turn, whatever the API and the client.

The model is a tiny one that is told what to write, in the many ways in which GPT-OSS writes calls.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from mlxkv.chat.gpt_oss.harmony_tokens import TOKENS
from mlxkv.chat.gpt_oss.harmony_writer import HarmonyTemplate, HarmonyWriter
from mlxkv.chat.replies import Replies
from mlxkv.engine.engine import ThreadedEngine
from mlxkv.engine.model_pool import key_of
from mlxkv.text.tokenizer import Tokenizer
from tests.families.test_gpt_oss import CONFIG, RELEASED, weights_of
from tests.support import tiny
from tests.support.fake_engine import serving
from tests.support.harmony import reference
from tests.support.scripted import script
from tests.support.threaded_engine import running

MODEL = "gpt-oss"
S, C, M, E, X = "<|start|>assistant", "<|channel|>", "<|message|>", "<|end|>", "<|call|>"
RESULT = '{"weather": "rain",\n "source": "<|end|> is text"}'
REPLIES = (
    f"{C}analysis{M}I look it up.{E}{S}{C}commentary to=functions.get_weather <|constrain|>json{M}"
    f'{{"place":"London",  "days": 1.0}}{X}',
    f' to=functions.get_weather{C}commentary json{M}{{ "place" : "Paris" }}{X}',
    f"{C}analysis{M}Once more.{E}{S}{C}commentary{M}I look at Rome, too.{E}{S} to=functions.now"
    f"{C}commentary <|constrain|>json{M}{{}}{X}",
    f'{C}analysis to=functions.get_weather code{M}{{"place": "Oslo"}}{X}',
    f"{C}analysis{M}Bern.{E}assistant{C}commentary to=functions.now<|constrain|>json{M}"
    f'{{"z":1}}{X}',
)
FINAL = f"{C}analysis{M}Enough.{E}{S}{C}final{M}It rains.<|return|>"
PROPERTIES = {"place": {"type": "string"}, "days": {"type": "number"}}
SCHEMA = {"type": "object", "properties": PROPERTIES}
NAMES = ("get_weather", "now")
QUESTION = "Where does it rain? " * 4


def small_tokenizer(folder: Path) -> None:
    """Bytes, the format's tokens, and the words of its frame as one token each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in ("assistant", "commentary", "functions"):
        merges += [(word[:i], word[i]) for i in range(1, len(word))]
    texts = [*TOKENS, *alphabet, *dict.fromkeys(a + b for a, b in merges)]
    backend = Backend(models.BPE({text: i for i, text in enumerate(texts)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(TOKENS))
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|return|>"}))


@pytest.fixture(scope="module")
def model(request, tmp_path_factory) -> Path:
    """A tiny GPT-OSS that has its own template, which drops and quotes, besides."""
    folder = tmp_path_factory.mktemp("models") / MODEL
    folder.mkdir()
    n_vocab = 512
    if request.param == "real":
        real = reference.tokenizer_folder()
        n_vocab = 201088
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(real / name, folder / name)
    else:
        small_tokenizer(folder)
    sizes = {"vocab_size": n_vocab, "max_position_embeddings": 8192, "hidden_size": 32}
    config = {**CONFIG, **sizes, "num_attention_heads": 2, "num_key_value_heads": 1}
    tiny.write_checkpoint(folder, {**RELEASED, **config}, weights_of(config))
    (folder / "chat_template.jinja").write_text(f"{C}{M}{{{{ raise_exception('unused') }}}}")
    return folder


@pytest.fixture
def engine(model) -> Iterator[ThreadedEngine]:
    with running(next_turns=False) as made:
        asyncio.run(made.load(str(model)))
        yield made


Post = Callable[[str, Mapping[str, Any]], Any]


def chat(
    post: Post, history: list[Any], *, keeps_reasoning: bool = True, choice: str = "auto"
) -> tuple[str, str] | None:
    """One turn over OpenAI's chat completions; id and name of the call that it ends in."""
    if not history:
        history += [{"role": "system", "content": "Be brief."}, ask()]
    tools = [{"type": "function", "function": {"name": n, "parameters": SCHEMA}} for n in NAMES]
    asked = {"messages": history, "tools": tools, "tool_choice": choice}
    body = post("/v1/chat/completions", asked)
    message = body["choices"][0]["message"]
    if not keeps_reasoning:
        message.pop("reasoning_content", None)
    history.append(message)
    for call in message.get("tool_calls") or ():
        history.append({"role": "tool", "tool_call_id": call["id"], "content": RESULT})
        return call["id"], call["function"]["name"]
    return None


def chat_without_reasoning(post: Post, history: list[Any]) -> tuple[str, str] | None:
    return chat(post, history, keeps_reasoning=False)


def chat_that_must_call(post: Post, history: list[Any]) -> tuple[str, str] | None:
    return chat(post, history, choice="required")


def responses(post: Post, history: list[Any]) -> tuple[str, str] | None:
    if not history:
        history += [{"role": "developer", "content": "Be brief."}, ask()]
    tools = [{"type": "function", "name": name, "parameters": SCHEMA} for name in NAMES]
    body = post("/v1/responses", {"input": history, "tools": tools})
    history += body["output"]
    for item in body["output"]:
        if item["type"] == "function_call":
            output = {"type": "function_call_output", "output": RESULT}
            history.append({**output, "call_id": item["call_id"]})
            return item["call_id"], item["name"]
    return None


def anthropic(post: Post, history: list[Any]) -> tuple[str, str] | None:
    if not history:
        history.append(ask())
    tools = [{"name": name, "input_schema": SCHEMA} for name in NAMES]
    body = post(
        "/v1/messages",
        {"messages": history, "tools": tools, "max_tokens": 1000, "system": "Be brief."},
    )
    history.append({"role": "assistant", "content": body["content"]})
    for block in body["content"]:
        if block["type"] == "tool_use":
            result = {"type": "tool_result", "tool_use_id": block["id"], "content": RESULT}
            history.append({"role": "user", "content": [result]})
            return block["id"], block["name"]
    return None


def ollama(post: Post, history: list[Any]) -> tuple[str, str] | None:
    """A client that knows no ids of calls."""
    if not history:
        history += [{"role": "system", "content": "Be brief."}, ask()]
    tools = [{"type": "function", "function": {"name": n, "parameters": SCHEMA}} for n in NAMES]
    body = post("/api/chat", {"messages": history, "tools": tools, "stream": False})
    message = body["message"]
    history.append(message)
    for call in message.get("tool_calls") or ():
        call.pop("id", None)
        name = call["function"]["name"]
        history.append({"role": "tool", "tool_name": name, "content": RESULT})
        return "", name
    return None


def ask() -> dict[str, Any]:
    return {"role": "user", "content": QUESTION}


def play(
    engine: ThreadedEngine, model: Path, turn: Any, answers: list[str]
) -> list[tuple[str, int, int]]:
    """Name of the call before a turn, tokens of the prompt, and how many of them were computed."""
    loaded = engine._pool.find(key_of(str(model)))
    assert loaded is not None
    prompts = script(loaded.scheduler.runtime, answers)
    history: list[Any] = []
    found = []
    with serving(engine) as url, httpx.Client(base_url=url, timeout=60) as client:  # pyright: ignore

        def post(path: str, body: Mapping[str, Any]) -> Any:
            made = client.post(path, json={"model": str(model), **body})
            assert made.status_code == 200, made.text
            return made.json()

        name = ""
        for _ in answers:
            before = engine.stats().models[str(model)].computed_tokens
            made = turn(post, history)
            computed = engine.stats().models[str(model)].computed_tokens - before
            found.append((name, len(prompts[-1]), computed))
            if made is None:
                history.append(ask())
            name = made[1] if made else ""
    assert len(prompts) == len(answers)
    return found


def n_result(model: Path, name: str) -> int:
    """Tokens of a result as the format frames it."""
    writer = HarmonyWriter(HarmonyTemplate(), Replies())
    call = {"id": "a", "function": {"name": name, "arguments": {}}}
    messages: list[Any] = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    result = {"role": "tool", "tool_call_id": "a", "content": RESULT}
    options: Any = {"add_generation_prompt": False, "conversation_start_date": "2026-01-01"}
    prompts = [writer.write(each, **options) for each in (messages, [*messages, result])]
    tokenizer = Tokenizer.from_dir(model)
    counts = [len(tokenizer.encode_rendered(prompt)) for prompt in prompts]
    return counts[1] - counts[0]


APIS = [chat, chat_without_reasoning, responses, anthropic, ollama]
SMALL = [("small", turn) for turn in APIS]


@pytest.mark.parametrize(("model", "turn"), [*SMALL, ("real", chat)], indirect=["model"])
def test_a_turn_of_a_tool_loop_computes_its_result(turn, engine, model):
    first, *rest = play(engine, model, turn, [*REPLIES, FINAL])
    assert first[1] == first[2]
    for name, n_prompt, computed in rest:
        assert n_prompt > first[1]
        assert computed <= n_result(model, name) + 8


@pytest.mark.parametrize(("model", "turn"), SMALL, indirect=["model"])
def test_so_does_one_in_a_later_turn_of_the_conversation(turn, engine, model):
    figures = play(engine, model, turn, [FINAL, FINAL, *REPLIES[:3], FINAL])
    for name, _, computed in figures[3:]:
        assert computed <= n_result(model, name) + 8


@pytest.mark.parametrize("model", ["small"], indirect=True)
def test_so_does_one_whose_calls_a_grammar_ends(engine, model):
    figures = play(engine, model, chat_that_must_call, [REPLIES[0], REPLIES[1], REPLIES[0]])
    for name, _, computed in figures[1:]:
        assert computed <= n_result(model, name) + 8


KEYS = {"authorization": "Bearer one"}, {"authorization": "Bearer two"}


@pytest.mark.parametrize("model", ["small"], indirect=True)
def test_a_reply_does_not_come_back_to_another_key(engine, model):
    loaded = engine._pool.find(key_of(str(model)))
    assert loaded is not None
    runtime = loaded.scheduler.runtime
    prompts = script(runtime, [REPLIES[1], FINAL, FINAL])
    history: list[Any] = []
    with serving(engine, api_keys=("one", "two")) as url:  # pyright: ignore[reportArgumentType]
        for key in (KEYS[0], KEYS[1], KEYS[0]):
            with httpx.Client(base_url=url, timeout=60, headers=key) as client:

                def post(path: str, body: Mapping[str, Any], client: httpx.Client = client) -> Any:
                    made = client.post(path, json={"model": str(model), **body})
                    assert made.status_code == 200, made.text
                    return made.json()

                # The history is that of the first key's call each time.
                given = history[:4]
                chat(post, given)
                history = history or given
    first, others, own = (runtime.tokenizer.decode(p, skip_special_tokens=False) for p in prompts)
    assert own.startswith(first + REPLIES[1])
    assert REPLIES[1] not in others
    assert (
        f'{S} to=functions.get_weather{C}commentary <|constrain|>json{M}{{"place": "Paris"}}'
        in (others)
    )


@pytest.mark.parametrize("model", ["small"], indirect=True)
@pytest.mark.parametrize(
    ("begun", "rest", "wanted"),
    [
        ({"content": "It "}, "rains.<|return|>", ("rains.", None)),
        ({"content": "It ", "reasoning_content": "Hm."}, "rains.<|return|>", ("rains.", None)),
        (
            {"content": "", "reasoning_content": "I think "},
            f"so.{E}{S}{C}final{M}It rains.<|return|>",
            ("It rains.", "so."),
        ),
        ({"content": ""}, FINAL, ("It rains.", "Enough.")),
    ],
)
def test_a_begun_answer_is_continued(engine, model, begun, rest, wanted):
    loaded = engine._pool.find(key_of(str(model)))
    assert loaded is not None
    script(loaded.scheduler.runtime, [rest])
    body = {"model": str(model), "messages": [ask(), {"role": "assistant", **begun}]}
    with serving(engine) as url:  # pyright: ignore[reportArgumentType]
        made = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert made.status_code == 200, made.text
    message = made.json()["choices"][0]["message"]
    assert (message["content"], message.get("reasoning_content")) == wanted


@pytest.mark.parametrize("model", ["small"], indirect=True)
@pytest.mark.parametrize(
    ("begun", "rest"),
    [
        ({"content": '{"a": '}, "12}<|return|>"),
        (
            {"content": "", "reasoning_content": "I "},
            f'see.{E}{S}{C}final{M}{{"a": 12}}<|return|>',
        ),
    ],
)
def test_a_begun_answer_and_its_rest_are_of_the_format(engine, model, begun, rest):
    loaded = engine._pool.find(key_of(str(model)))
    assert loaded is not None
    script(loaded.scheduler.runtime, [rest])
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"model": str(model), "messages": [ask(), {"role": "assistant", **begun}]}
    with serving(engine) as url:  # pyright: ignore[reportArgumentType]
        made = httpx.post(
            f"{url}/v1/chat/completions", json={**body, "response_format": form}, timeout=60
        )
    assert made.status_code == 200, made.text
    choice = made.json()["choices"][0]
    assert json.loads(begun["content"] + choice["message"]["content"]) == {"a": 12}
    assert choice["finish_reason"] == "stop"
