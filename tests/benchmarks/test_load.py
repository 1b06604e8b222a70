"""The load benchmarks of the server: what they ask, count and check."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks import load_client, load_server, serve, soak, soak_checks, soak_report
from benchmarks.load_client import ANSWERED, FAILED, HUNG_UP, Answer, Ask, HangUp, percentile
from benchmarks.report import Run, summary
from benchmarks.soak_checks import MiB, Record, Sample, checks, failed
from benchmarks.soak_pool import Deck, PoolSizes, pool


def words(text: str) -> int:
    return len(text.split())


# Statistics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("percent", "expected"), [(0, 1), (50, 2.5), (99, 3.97), (100, 4)])
def test_a_percentile_is_linear_between_neighbours(percent: float, expected: float):
    values = [3.0, 1.0, 4.0, 2.0]
    assert percentile(values, percent) == pytest.approx(expected)


def test_there_is_no_percentile_of_nothing():
    assert math.isnan(percentile([], 50))


# One request --------------------------------------------------------------------------------------


def chunk(text: str, reason: str | None = None) -> str:
    return json.dumps({"choices": [{"text": text, "finish_reason": reason}]})


def test_an_answer_counts_pieces_with_text_alone():
    answer = Answer("a")
    usage = {"completion_tokens": 3, "prompt_tokens": 9}
    usage |= {"prompt_tokens_details": {"cached_tokens": 5}}
    for data in (chunk("x"), chunk(""), chunk("y", "length")):
        assert not answer.take(data)
    assert not answer.take(json.dumps({"choices": [], "usage": usage}))
    assert answer.take("[DONE]")
    assert (answer.text, len(answer.piece_s), answer.finish_reason) == ("xy", 2, "length")
    assert (answer.n_tokens, answer.computed_tokens, len(answer.gaps_s)) == (3, 4, 1)


def test_an_error_in_a_stream_is_no_answer():
    with pytest.raises(ValueError, match="went wrong"):
        Answer("a").take(json.dumps({"error": {"message": "went wrong"}}))


def test_messages_are_for_the_chat_route():
    text, chat = Ask("a", "hello", 3), Ask("b", [{"role": "user", "content": "hello"}], 3)
    assert (text.path, chat.path) == ("/v1/completions", "/v1/chat/completions")
    assert text.body("m")["prompt"] == "hello" and "messages" in chat.body("m")


@pytest.fixture
def slow_server() -> Iterator[tuple[str, list[bool]]]:
    """Streams three pieces on end and then a piece each 50 ms for ever; whether clients went."""
    gone: list[bool] = []
    listening = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
        try:
            connection.sendall(head)
            for i in range(200):
                connection.sendall(f"data: {chunk(str(i % 10))}\n\n".encode())
                threading.Event().wait(0 if i < 2 else 0.05)
        except OSError:
            gone.append(True)
        connection.close()

    def accept() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}", gone
    listening.close()


def asked(url: str, hang_up: HangUp, limit_s: float = 20) -> Answer:
    async def one() -> Answer:
        async with load_client.new_client(url) as client:
            return await load_client.ask(client, "m", Ask("a", "p", 9), hang_up, limit_s)

    return asyncio.run(one())


@pytest.mark.parametrize("hang_up", [HangUp(after_pieces=3), HangUp(after_s=0.3)], ids=str)
def test_a_client_that_hangs_up_closes_the_connection(slow_server, hang_up: HangUp):
    url, gone = slow_server
    answer = asked(url, hang_up)
    assert answer.outcome == HUNG_UP and answer.text.startswith("012")
    for _ in range(100):
        if gone:
            break
        threading.Event().wait(0.05)
    assert gone


def test_a_request_without_an_end_has_failed(slow_server):
    answer = asked(slow_server[0], HangUp(), limit_s=0.3)
    assert answer.outcome == FAILED and "no end" in answer.error


def test_a_server_that_is_not_there_is_a_failure_and_no_exception():
    answer = asked(f"http://127.0.0.1:{load_server.free_port()}", HangUp())
    assert answer.outcome == FAILED and "Connect" in answer.error


# Both servers -------------------------------------------------------------------------------------


def test_settings_are_equal_mixed_and_shared():
    named = {s.name: s for s in serve.settings_of(8, [64, 512], 2048, 2000)}
    assert list(named) == ["8 x 64", "8 x 512", "7 x 64 + 2048", "8 sharing 2000"]
    assert named["7 x 64 + 2048"].lengths == (64,) * 7 + (2048,)
    assert [s.name for s in serve.settings_of(1, [64], 2048, 0)] == ["1 x 64"]


def test_every_run_has_prompts_of_its_own():
    setting = serve.Setting("s", (20, 20, 40))

    def cut(text: str, n: int) -> str:
        return " ".join(text.split()[:n])

    first, second = (setting.asks(seed, 5, cut, True) for seed in (1, 2))
    prompts = [ask.prompt for ask in (*first, *second)]
    assert len(set(map(str, prompts))) == 6
    assert prompts == [a.prompt for seed in (1, 2) for a in setting.asks(seed, 5, cut, True)]
    assert [words(str(ask.prompt)) for ask in first] == [20, 20, 40]


@pytest.mark.parametrize("chat", [True, False])
def test_a_system_prompt_is_shared_and_the_questions_are_not(chat: bool):
    asks = serve.Setting("s", (0, 0), 30).asks(1, 5, lambda text, n: text, chat)
    assert all(ask.is_chat == chat for ask in asks)
    one, two = (str(ask.prompt) for ask in asks)
    shared = next(i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    assert one != two and words(one[:shared]) > 30


def answer_of(start: float, pieces: list[float], n_tokens: int, text: str = "x") -> Answer:
    usage: dict[str, Any] = {"completion_tokens": n_tokens, "prompt_tokens": 10}
    usage["prompt_tokens_details"] = {"cached_tokens": 4}
    return Answer("a", start, ANSWERED, text, "length", pieces, pieces[-1], usage)


def test_figures_are_of_what_really_came():
    answers = [answer_of(0, [1, 2, 3, 4], 8), answer_of(0, [2, 3, 4, 5], 4)]
    found = serve.figures(serve.Setting("s", (1, 1), 9), 5.0, 0.6, answers)
    assert found["serve s cpu ms/tok"] == pytest.approx(50)
    assert found["serve s tok/s"] == 12 / 5
    # From 2 to 4: two pieces of two tokens, and two of one.
    assert found["all decoding s tok/s"] == (2 * 2 + 2 * 1) / 2
    assert found["first token s p50 s"] == 1.5 and found["between pieces s p99 ms"] == 1000
    # Prompts of 9 shared tokens and 1: 12 were computed, 2 of which are their own.
    assert found["computed of prompts, s, tokens"] == 12
    assert found["times that the shared 9 were"] == pytest.approx(10 / 9)


def test_answers_that_never_meet_have_no_common_rate():
    assert serve.all_together([answer_of(0, [1, 2], 2), answer_of(0, [3, 4], 2)]) is None


def test_a_request_that_failed_ends_the_measurement():
    lost = Answer("a", error="no end within 3 s")
    with pytest.raises(SystemExit, match="no end"):
        serve.figures(serve.Setting("s", (1,)), 1.0, 1.0, [lost])


def test_the_target_is_of_all_tokens_alone():
    figures = serve.figures(serve.Setting("s", (1,)), 2.0, 1.0, [answer_of(0, [1, 2], 2)])
    runs = [Run("serve", engine, 0, "", figures) for engine in ("mlxkv", "mlx-lm")]
    targets = {row.measure: row.target for row in summary(runs)}
    assert targets.pop("serve s tok/s") == 1.2 and set(targets.values()) == {None}


def test_texts_are_compared_within_a_pair():
    texts = {("s", 0, "mlxkv"): ["a", "b"], ("s", 0, "mlx-lm"): ["a", "c"]}
    texts |= {("s", 1, "mlxkv"): ["a", "b"], ("s", 1, "mlx-lm"): ["a", "b"]}
    assert serve.same_texts(texts).endswith("s: 3 of 4")


# The soak -----------------------------------------------------------------------------------------


def test_a_pool_is_mixed_and_the_same_for_the_same_seed():
    sizes = PoolSizes(24, 400, 40)
    asks = pool(words, sizes, True)
    assert asks == pool(words, sizes, True) != pool(words, sizes, True, seed=2)
    assert len({str(ask.prompt) for ask in asks}) == len({ask.name for ask in asks}) == 24
    assert words(str(asks[0].prompt)) >= 400
    assert min(words(str(ask.prompt)) for ask in asks) < 60
    assert {ask.is_chat for ask in asks} == {True, False}
    assert {ask.options["temperature"] for ask in asks} == {0.0, 0.8}
    assert all(1 <= ask.max_tokens <= 40 for ask in asks)
    heads = Counter(str(ask.prompt)[:200] for ask in asks if not ask.is_chat)
    assert max(heads.values()) > 1
    assert not any(ask.is_chat for ask in pool(words, sizes, False))


def test_a_deck_shows_all_of_the_pool_before_anything_comes_again():
    asks = pool(words, PoolSizes(9, 60, 20), False)
    deck = Deck(asks, 0.5)
    drawn = [deck.draw() for _ in range(90)]
    for start in range(0, 90, 9):
        assert len({ask.name.split()[0] for ask, _ in drawn[start : start + 9]}) == 9
    kinds = Counter((h.after_s is None, h.after_pieces is None) for _, h in drawn)
    assert len(kinds) == 3 and min(kinds.values()) > 5
    stays = {ask.name for ask, hang_up in drawn if hang_up == load_client.STAYS}
    assert stays == {ask.name for ask in asks} and deck.drawn == {a.name: a for a, _ in drawn}
    assert all(h == load_client.STAYS for _, h in (Deck(asks, 0.0).draw() for _ in range(9)))


@pytest.mark.parametrize("prompt", ["x", [{"role": "system", "content": "x"}, {"role": "user"}]])
def test_who_hangs_up_asks_what_no_page_has(prompt: Any):
    asks = [Ask("0", prompt, 5)]
    deck = Deck(asks, 1.0)
    drawn = [deck.draw()[0] for _ in range(2)]
    assert len({"0", *(ask.name for ask in drawn)}) == 3
    assert len({str(prompt), *(str(ask.prompt) for ask in drawn)}) == 3
    assert asks[0].prompt == prompt


def sample(t_s: float, **changes: int) -> Sample:
    kinds = {
        "rss": 500,
        "active": 300,
        "peak": 320,
        "cached": 30,
        "weights": 100,
        "pages": 150,
        "kv": 40,
        "room": 500,
    }
    kinds |= {"running": 8, "queued": 0}
    books = {k: n if k in ("running", "queued") else n * MiB for k, n in (kinds | changes).items()}
    return Sample(t_s, **books)


def record(**changes: Any) -> Record:
    answers = [answer_of(i, [1, 2], 2, text="yes") for i in range(3)]
    answers += [Answer("b", outcome=HUNG_UP), Answer("b", outcome=HUNG_UP, piece_s=[0.5])]
    counts: dict[str, Any] = {"answered": 4, "cancelled": 1, "failed": 0, "generated_tokens": 9}
    counts |= {f"{kind}_tokens": 7 for kind in ("prompt", "computed", "restored_ram")}
    counts |= {"restored_ssd_tokens": 0, "misses": {"diverged": 2}}
    made = Record(
        duration_s=120,
        n_missed=0,
        answers=answers,
        samples=[sample(t) for t in range(120)],
        after=sample(121, active=250, kv=0, running=0),
        counts=counts,
        rejected=0,
        health=200,
        solo={"a": {"text": "yes", "finish_reason": "length", "n_tokens": 2}},
    )
    return dataclasses.replace(made, **changes)


def test_all_checks_hold_of_a_good_soak():
    assert failed(checks(record())) == []


def leaking(**rates: float) -> list[Sample]:
    """Samples whose kinds grow by so many MiB a second."""
    base = {"rss": 500, "active": 300}
    return [sample(t, **{k: round(base[k] + r * t) for k, r in rates.items()}) for t in range(120)]


BROKEN: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a request fails": (
        {"answers": [*record().answers, Answer("c", error="status 500")]},
        ["no request is lost"],
    ),
    "the server counts failures": (
        {"counts": record().counts | {"failed": 1}},
        ["the server counts the same"],
    ),
    "a request is rejected": ({"rejected": 1}, ["the server counts the same"]),
    "an answer the server knows nothing of": (
        {"counts": record().counts | {"answered": 2}},
        ["the server counts the same"],
    ),
    "another text": (
        {"solo": {"a": {"text": "yea", "finish_reason": "length", "n_tokens": 2}}},
        ["text as alone"],
    ),
    "another end": (
        {"solo": {"a": {"text": "yes", "finish_reason": "stop", "n_tokens": 1}}},
        ["finish reason as alone", "number of tokens as alone"],
    ),
    "not run alone": (
        {"solo": {}},
        ["finish reason as alone", "number of tokens as alone", "text as alone"],
    ),
    "never all answered": (
        {"n_missed": 1},
        ["all of the pool is answered"],
    ),
    "no samples": (
        {"samples": []},
        [
            "the process keeps to MLX's peak and its own",
            "MLX beside weights, pages and KV is flat",
            "pages keep to their room",
            "memory is given back at the end",
        ],
    ),
    "pages take too much": (
        {"samples": [*record().samples[:-1], sample(119, rss=900, peak=700, pages=501)]},
        ["pages keep to their room"],
    ),
    "the process grows": (
        {"samples": leaking(rss=2)},
        ["the process keeps to MLX's peak and its own"],
    ),
    "MLX grows": ({"samples": leaking(active=1)}, ["MLX beside weights, pages and KV is flat"]),
    "memory is kept at the end": (
        {"after": sample(121, rss=700, active=250, kv=0, running=0)},
        ["memory is given back at the end"],
    ),
    "KV is kept": (
        {"after": sample(121, active=290, kv=40, running=0)},
        ["nothing runs, waits or holds KV at the end"],
    ),
    "a sequence runs on": (
        {"after": sample(121, active=250, kv=0, running=1)},
        ["nothing runs, waits or holds KV at the end"],
    ),
    "MLX keeps something": (
        {"after": sample(121, active=290, kv=0, running=0)},
        ["MLX holds weights and pages alone at the end"],
    ),
    "it is unwell": ({"health": 503}, ["/health is well, and the server ends in order"]),
    "it does not end": ({"exit_code": -9}, ["/health is well, and the server ends in order"]),
    "it has a trace": (
        {"log": "Traceback (most recent call last)"},
        ["/health is well, and the server ends in order"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_soak_that_is_broken_fails_in_what_is_broken(name: str):
    changes, expected = BROKEN[name]
    assert [check.name for check in failed(checks(record(**changes)))] == expected


def test_workspace_that_comes_and_goes_is_no_leak():
    draw = random.Random(1)
    active = [300 + 200 * (draw.random() < 0.4) for _ in range(120)]
    samples = [sample(t, active=n, rss=n + 200, peak=500) for t, n in enumerate(active)]
    assert failed(checks(record(samples=samples))) == []


def test_the_figures_of_a_soak():
    found = soak_checks.figures(record())
    assert found["requests"] == 5 and found["answered"] == 3
    assert found["hung up before the first text"] == found["hung up within the answer"] == 1
    assert found["first token p50, s"] == 1 and found["misses: diverged"] == 2
    assert found["rss at most, MiB"] == 500 and found["kv at the end, MiB"] == 0


def test_a_sample_is_read_from_the_servers_figures():
    kinds = ("weights", "kv_used", "kv_allocated", "pages", "active", "cached", "peak", "limit")
    memory = {kind: i * MiB for i, kind in enumerate(kinds)}
    read = Sample.of(3.0, 9, {"memory": memory, "running": 2, "queued": 1})
    assert (read.rss, read.kv, read.pages, read.running) == (9, 2 * MiB, 3 * MiB, 2)
    assert read.room == 7 * MiB // 4


def test_a_soak_is_written_down(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    args = soak.parse(["--model=m", f"--output={tmp_path / 'out'}"])
    made = record(solo={"a": {"text": "y|s", "finish_reason": "length", "n_tokens": 2}})
    soak.write(args, "m", made)
    table = (tmp_path / "out.md").read_text()
    assert "| text as alone | **fails** |" in table and "'\\|s'" in table
    assert "| no request is lost | holds |" in table
    assert json.loads((tmp_path / "out.json").read_text())["figures"]["requests"] == 5
    assert (tmp_path / "out.svg").read_text().startswith("<?xml")
    assert capsys.readouterr().out.strip() == table.strip()


def test_a_soak_of_no_answers_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    soak_report.plot("m", record(answers=[], samples=[]), tmp_path / "out.svg")
    assert (tmp_path / "out.svg").exists()
