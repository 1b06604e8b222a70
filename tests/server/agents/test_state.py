"""What an agent's conversation is told of its state, and where: the same in every turn."""

from __future__ import annotations

from typing import Any

from mlxkv.server.agents.state import NOTE, History, plan_history, split, with_blocks
from mlxkv.server.agents.state_memory import StateMemory

HELP = "You help.\n\n"
SYSTEM = f"You help.\n\n{NOTE}"


def git(state: str) -> str:
    return f"gitStatus: {state}"


def block(*lines: str) -> str:
    return "<current-state>\n" + "\n".join(lines) + "\n</current-state>"


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": "1"}


def call(call_id: str) -> list[dict[str, Any]]:
    return [{"id": call_id, "function": {"name": "ls", "arguments": {"path": "."}}}]


class Client:
    """One client of a server: sends conversations, and sees what the template gets."""

    def __init__(self, memory: StateMemory | None = None, owner: str = ""):
        self.memory, self.owner = memory or StateMemory(), owner

    def send(self, system: str, *messages: dict[str, Any]) -> list[Any]:
        """The contents of the messages that are rendered."""
        sent = [{"role": "system", "content": system}, *messages]
        conversation = split(self.owner, sent)
        if conversation is None:
            return [message["content"] for message in sent]
        history = plan_history(conversation, self.memory)
        self.memory.put(conversation.names[conversation.newest], history)
        return [message["content"] for message in with_blocks(conversation, history)]


def test_a_new_conversation_is_told_its_state_behind_the_first_question():
    rendered = Client().send(HELP + git("clean"), user("hi"))
    assert rendered == [SYSTEM, f"hi\n\n{block(git('clean'))}"]


def test_a_prompt_without_state_stays_as_it_is():
    assert Client().send(HELP, user("hi")) == [HELP, "hi"]


def test_a_conversation_without_a_user_stays_as_it_is():
    assert Client().send(HELP + git("clean"))[0] == HELP + git("clean")


def test_turns_with_the_same_state_only_append():
    client, head = Client(), HELP + git("clean")
    turns = [user("hi"), assistant("", tool_calls=call("1")), tool("a.py"), assistant("So."),
             user("on"), assistant("Yes."), user("more")]  # fmt: skip
    before: list[str] = []
    for n in (1, 3, 5, 7):
        rendered = client.send(head, *turns[:n])
        assert rendered[: len(before)] == before
        before = rendered
    assert before[1:] == [f"hi\n\n{block(git('clean'))}", "", "a.py", "So.", "on", "Yes.", "more"]


def test_a_changed_state_is_told_in_the_newest_message_and_stays_there():
    client = Client()
    turns = [user("hi"), assistant("So."), user("on"), assistant("Yes."), user("more")]
    first = client.send(HELP + git("clean"), *turns[:1])
    second = client.send(HELP + git("M a.py"), *turns[:3])
    third = client.send(HELP + git("M a.py"), *turns)
    assert second == [*first, "So.", f"on\n\n{block(git('M a.py'))}"]
    assert third == [*second, "Yes.", "more"]


def test_a_state_that_goes_back_is_told_again():
    client, turns = Client(), [user("hi"), assistant("So."), user("on"), assistant("Yes.")]
    client.send(HELP + git("clean"), *turns[:1])
    client.send(HELP + git("M a.py"), *turns[:3])
    assert client.send(HELP + git("clean"), *turns, user("x"))[-1] == f"x\n\n{block(git('clean'))}"


def test_only_what_differs_is_told():
    client, date = Client(), "Current date: {}\n"
    client.send(date.format(1) + git("clean"), user("hi"))
    more = [user("hi"), assistant("So."), user("on")]
    rendered = client.send(date.format(2) + git("clean"), *more)
    assert rendered[-1] == f"on\n\n{block('Current date: 2')}"


def test_where_something_is_gone_all_is_told():
    client, date = Client(), "Current date: 1"
    client.send(f"{date}\n{git('clean')}", user("hi"))
    rendered = client.send(date, user("hi"), assistant("So."), user("on"))
    assert rendered[-1] == f"on\n\n{block(date)}"


def test_a_tools_result_may_be_the_newest_message():
    client, made = Client(), assistant("", tool_calls=call("1"))
    client.send(HELP + git("clean"), user("ls"))
    rendered = client.send(HELP + git("M a.py"), user("ls"), made, tool("a.py"))
    assert rendered[-1] == f"a.py\n\n{block(git('M a.py'))}"


def test_messages_behind_the_newest_question_are_left_alone():
    rendered = Client().send(HELP + git("clean"), user("hi"), assistant("I beg"))
    assert rendered[1:] == [f"hi\n\n{block(git('clean'))}", "I beg"]


def test_reasoning_and_the_ids_of_calls_do_not_matter():
    client = Client()
    client.send(HELP + git("1"), user("ls"))
    seen = [user("ls"), assistant("", tool_calls=call("1"), reasoning_content="hm"), tool("a.py")]
    second = client.send(HELP + git("2"), *seen)
    again = [user("ls"), assistant("", tool_calls=call("x")), tool("a.py"), assistant("So.")]
    assert client.send(HELP + git("2"), *again, user("on")) == [*second, "So.", "on"]


def test_the_same_request_again_is_the_same_prompt():
    client = Client()
    sent = HELP + git("1"), user("hi")
    assert client.send(*sent) == client.send(*sent)
    client.send(HELP + git("2"), *sent[1:])
    assert client.send(*sent) == [SYSTEM, f"hi\n\n{block(git('1'))}"]


def test_conversations_that_begin_alike_keep_what_each_was_told():
    client, more = Client(), [user("hi"), assistant("So."), user("on")]
    first, second = (client.send(HELP + git(n), user("hi")) for n in "12")
    assert client.send(HELP + git("1"), *more) == [*first, "So.", "on"]
    assert client.send(HELP + git("2"), *more) == [*second, "So.", "on"]


def test_a_conversation_that_is_not_known_is_told_in_its_first_message():
    turns = [user("hi"), assistant("So."), user("on")]
    known = Client()
    known.send(HELP + git("clean"), user("hi"))
    expected = known.send(HELP + git("clean"), *turns)
    assert Client().send(HELP + git("clean"), *turns) == expected
    assert expected == [SYSTEM, f"hi\n\n{block(git('clean'))}", "So.", "on"]


def test_owners_do_not_know_each_others_conversations():
    memory = StateMemory()
    Client(memory, "a").send(HELP + git("1"), user("hi"))
    more = [user("hi"), assistant("So."), user("on")]
    assert git("1") not in "".join(Client(memory, "b").send(HELP + git("2"), *more))


def test_a_history_that_does_not_fit_its_conversation_is_no_error():
    conversation = split("", [{"role": "system", "content": git("1")}, user("hi")])
    assert conversation is not None
    odd = plan_history(conversation, StateMemory())
    odd = History(tuple(type(odd.blocks[0])(at, "x") for at in (-1, 0, 1, 7)), odd.state)
    assert [m["content"] for m in with_blocks(conversation, odd)] == [NOTE, "hi\n\nx"]


def test_a_message_with_a_picture_is_told_behind_it():
    def seen(data: bytes, *texts: str) -> dict[str, Any]:
        parts: list[Any] = [{"type": "text", "text": text} for text in texts]
        return {"role": "user", "content": [{"type": "image", "image": data}, *parts]}

    client, said = Client(), block(git("clean"))
    first = client.send(HELP + git("clean"), seen(b"cat"))
    assert first[1:] == [seen(b"cat", said)["content"]]
    more = [seen(b"cat"), assistant("So."), seen(b"dog", "this?")]
    second = client.send(HELP + git("M a.py"), *more)
    changed = block(git("M a.py"))
    assert second == [*first, "So.", seen(b"dog", f"this?\n\n{changed}")["content"]]
    other = client.send(HELP + git("M a.py"), seen(b"another cat"), *more[1:])
    assert other[1] == seen(b"another cat", changed)["content"]


def test_reminders_beside_a_picture_are_told_behind_it():
    reminder = "<system-reminder>\nCurrent date: 1\nBe kind.\n</system-reminder>"
    content = [{"type": "text", "text": reminder}, {"type": "image", "image": b"x"}]
    (rendered,) = Client().send(HELP, {"role": "user", "content": content})[1:]
    assert "Current date" not in rendered[0]["text"] and "Be kind." in rendered[0]["text"]
    assert rendered[1:] == [content[1], {"type": "text", "text": block("Current date: 1")}]
