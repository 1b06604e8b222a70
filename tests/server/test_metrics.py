"""What the server says of itself: to Prometheus, as JSON, and to who looks at its page."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from mlxkv.engine.messages import ClientCounts, Counts, EngineStats, Lost
from mlxkv.server.edge.api_keys import owner_of
from tests.support.fake_engine import MODEL, FakeEngine, serving

KEY = "some-key"
AUTHORIZED = {"authorization": f"Bearer {KEY}"}
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class WatchedEngine(FakeEngine):
    """Has the figures that a test gives it; `None` for the fake's own."""

    figures: EngineStats | None = None

    def stats(self, owner: str | None = None) -> EngineStats:
        return self.figures or super().stats()


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[WatchedEngine, str]]:
    engine = WatchedEngine()
    with serving(engine) as url:
        yield engine, url


@pytest.fixture(scope="module")
def locked() -> Iterator[str]:
    with serving(FakeEngine(), api_keys=(KEY,)) as url:
        yield url


@pytest.fixture
def engine(server: tuple[WatchedEngine, str]) -> WatchedEngine:
    server[0].figures, server[0].alive = None, True
    return server[0]


@pytest.fixture
def url(server: tuple[WatchedEngine, str], engine: WatchedEngine) -> str:
    return server[1]


def samples(url: str) -> dict[tuple[str, ...], float]:
    """(name, values of its labels by their names) -> value, of all that `/metrics` has."""
    answer = httpx.get(url + "/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_metrics_are_the_engines_figures(url, engine):
    stats = engine.stats()
    counts = stats.models[MODEL]
    tokens = ("prompt", "restored_ram", "restored_ssd", "computed", "generated")
    expected: dict[tuple[str, ...], float] = {
        ("mlxkv_running",): stats.running,
        ("mlxkv_queued",): stats.queued,
        ("mlxkv_rejected_total",): stats.rejected,
        ("mlxkv_requests_total", MODEL, "answered"): counts.answered,
        ("mlxkv_requests_total", MODEL, "failed"): counts.failed,
        ("mlxkv_requests_total", MODEL, "cancelled"): counts.cancelled,
        ("mlxkv_misses_total", MODEL, "diverged"): 3,
        ("mlxkv_misses_total", MODEL, "dropped"): 1,
    }
    expected["mlxkv_draft_passes_total", MODEL] = counts.draft_passes
    for kind, of in (("proposed", counts.drafted_tokens), ("accepted", counts.accepted_tokens)):
        for drafter, n in of.items():
            expected["mlxkv_draft_tokens_total", drafter, kind, MODEL] = n
    expected["mlxkv_next_turn_saved_seconds_total", MODEL] = counts.next_turn_saved_s
    expected["mlxkv_fetched_bytes_total", MODEL] = counts.fetched_bytes
    expected["mlxkv_fetch_saved_seconds_total", MODEL] = counts.fetch_saved_s
    for kind in (*tokens, "next_turn", "next_turn_used", "upper"):
        expected["mlxkv_tokens_total", kind, MODEL] = getattr(counts, f"{kind}_tokens")
    for kind, n_bytes in stats.memory.items():
        expected["mlxkv_memory_bytes", kind] = n_bytes
    assert samples(url) == expected


def test_metrics_are_read_when_they_are_asked_for(url, engine):
    assert samples(url)["mlxkv_running",] == 1
    engine.figures = dataclasses.replace(engine.stats(), running=7)
    assert samples(url)["mlxkv_running",] == 7


def test_a_server_without_a_model_has_metrics(url, engine):
    engine.figures = EngineStats(0, 0, 0, {}, {"limit": 10})
    assert samples(url) == {
        ("mlxkv_running",): 0,
        ("mlxkv_queued",): 0,
        ("mlxkv_rejected_total",): 0,
        ("mlxkv_memory_bytes", "limit"): 10,
    }


def test_a_models_name_cannot_add_lines_to_the_metrics(url, engine):
    name = 'a"} 1\nmlxkv_running 99\n\\'
    engine.figures = EngineStats(0, 0, 0, {name: Counts(answered=3)}, {})
    found = samples(url)
    assert found["mlxkv_running",] == 0
    assert found["mlxkv_requests_total", name, "answered"] == 3


def test_two_servers_in_one_process_have_metrics_of_their_own(url, engine):
    engine.figures = EngineStats(0, 5, 0, {}, {})
    with serving(FakeEngine()) as other:
        assert samples(url)["mlxkv_queued",] == 5
        assert samples(other)["mlxkv_queued",] == 2


def test_the_json_has_the_same_and_the_models_in_memory(url, engine):
    before = time.time()
    found = httpx.get(url + "/stats.json").json()
    stats = engine.stats()
    assert before <= found["time_s"] <= time.time()
    assert found["alive"] is True
    assert [found[name] for name in ("running", "queued", "rejected")] == [1, 2, 4]
    assert found["memory"] == stats.memory
    assert found["models"].keys() == {MODEL}
    assert found["models"][MODEL]["counts"] == dataclasses.asdict(stats.models[MODEL])
    assert found["models"][MODEL]["loaded"]["family"] == "llama"
    assert "path" not in found["models"][MODEL]["loaded"]


AGENT = ClientCounts(
    "", "agent", 3, 100, 60, 40, 9, 1024, [Lost("diverged", 7, "at <b>|ten", "at <b>|two", 55, 2)]
)


def test_clients_have_their_prompts_and_the_texts_that_cost_most(url, engine):
    other = dataclasses.replace(AGENT, owner="x", computed_tokens=1)
    engine.figures = dataclasses.replace(engine.stats(), clients=[AGENT, other])
    (found,) = httpx.get(url + "/stats.json").json()["clients"]
    assert found == {name: x for name, x in dataclasses.asdict(AGENT).items() if name != "owner"}
    assert found["lost"][0]["prompt"] == "at <b>|two"
    assert samples(url)["mlxkv_client_tokens_total", "agent", "computed"] == 41
    assert samples(url)["mlxkv_client_tokens_total", "agent", "restored"] == 120


def test_an_api_key_sees_its_own_clients_alone():
    engine = WatchedEngine()
    mine, others = (dataclasses.replace(AGENT, owner=owner_of(key)) for key in (KEY, "other"))
    others.client = "theirs"
    engine.figures = dataclasses.replace(engine.stats(), clients=[mine, others])
    with serving(engine, api_keys=(KEY, "other")) as url:
        found = httpx.get(url + "/stats.json", headers=AUTHORIZED).json()["clients"]
    assert [each["client"] for each in found] == ["agent"]


@pytest.mark.parametrize("n_keys", [1, 2])
def test_of_several_keys_each_sees_its_own_figures(n_keys):
    asked: list[Any] = []

    class Asked(FakeEngine):
        def stats(self, owner: str | None = None) -> EngineStats:
            asked.append(owner)
            return super().stats(owner)

        def loaded(self, owner: str | None = None) -> Any:
            asked.append(owner)
            return super().loaded(owner)

    with serving(Asked(), api_keys=(KEY, "other")[:n_keys]) as url:
        for path in ("/metrics", "/stats.json", "/api/ps"):
            asked.clear()
            assert httpx.get(url + path, headers=AUTHORIZED).status_code == 200
            assert set(asked) == {owner_of(KEY) if n_keys == 2 else None}


@pytest.mark.parametrize(
    ("header", "client"),
    [
        ("claude-cli/2.1.332 (external, cli)", "claude-cli"),
        ("OpenAI/Python 2.1", "OpenAI"),
        ("curl", "curl"),
        ("", "unknown"),
        ('<img src="x">/1', "unknown"),
        ("x" * 300, "unknown"),
    ],
)
def test_a_client_is_the_first_product_that_it_names(url, engine, header, client):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    sent = httpx.post(url + "/v1/chat/completions", json=body, headers={"user-agent": header})
    assert sent.status_code == 200 and engine.last.client == client


def test_the_json_says_that_the_engine_is_dead(url, engine):
    engine.alive = False
    assert httpx.get(url + "/stats.json").json()["alive"] is False
    assert httpx.get(url + "/health").status_code == 503


def test_the_page_may_run_its_own_script_and_nothing_else(url):
    answer = httpx.get(url + "/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(
        part.split(None, 1) for part in answer.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    for name in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy[name])
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"


def test_the_page_names_nothing_outside_of_the_server(url):
    page = httpx.get(url + "/").text
    assert "//" not in re.sub(r"^ *// .*$", "", page, flags=re.MULTILINE)
    assert "innerHTML" not in page and "style=" not in page and "onclick" not in page


def test_ollamas_client_finds_a_server_at_the_root(url):
    answer = httpx.head(url + "/")
    assert answer.status_code == 200 and answer.content == b""


def test_figures_need_a_key_and_the_page_that_asks_for_it_does_not(locked):
    for path in ("/metrics", "/stats.json"):
        assert httpx.get(locked + path).status_code == 401
        assert httpx.get(locked + path, headers=AUTHORIZED).status_code == 200
    page = httpx.get(locked + "/")
    assert page.status_code == 200 and MODEL not in page.text


@pytest.mark.parametrize("path", ["/", "/metrics", "/stats.json"])
def test_another_host_sees_nothing(url, path):
    assert httpx.get(url + path, headers={"host": "evil.example"}).status_code == 403


def shown(address: str, folder: Path) -> str:
    """The page as a browser has it after its first answer."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-proxy-server",
         f"--user-data-dir={folder}", "--virtual-time-budget=3000", "--dump-dom", address],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout


def cells(dom: str) -> list[str]:
    return re.findall(r"<t[dh]>(.*?)</t[dh]>", dom)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
class TestInABrowser:
    def test_the_page_shows_models_memory_and_misses(self, url, tmp_path):
        dom = shown(url + "/", tmp_path)
        assert 'id="state" role="status" class="">working<' in dom
        found = cells(dom)
        assert found.count(MODEL) == 2 and "misses: diverged" in found and "70%" in found
        assert re.search(r'<div class="weights" title="weights: 3.9 KiB" style="width: 40%', dom)
        assert "queued" in dom and "generated tokens/s" in dom

    def test_the_page_shows_clients_and_where_they_lost_most(self, url, engine, tmp_path):
        engine.figures = dataclasses.replace(engine.stats(), clients=[AGENT])
        found = cells(shown(url + "/", tmp_path))
        assert found.count("agent") == 2 and "60%" in found and "1,024" in found
        assert "at &lt;b&gt;|ten" in found and "at &lt;b&gt;|two" in found

    def test_it_works_without_a_model(self, url, engine, tmp_path):
        engine.figures = dataclasses.replace(engine.stats(), running=0, queued=0, models={})
        dom = shown(url + "/", tmp_path)
        assert ">idle<" in dom and "No model is in memory" in dom

    def test_a_models_name_is_text(self, url, engine, tmp_path):
        name = "<img src=x onerror=document.title='owned'>"
        engine.figures = EngineStats(0, 0, 0, {name: Counts()}, engine.stats().memory)
        dom = shown(url + "/", tmp_path)
        assert "<td>&lt;img" in dom and "<title>mlxkv</title>" in dom

    def test_it_says_that_the_engine_is_dead(self, url, engine, tmp_path):
        engine.alive = False
        assert 'class="bad">the engine is dead' in shown(url + "/", tmp_path)

    def test_it_asks_for_a_key_and_takes_it_from_the_address(self, locked, tmp_path):
        dom = shown(locked + "/", tmp_path)
        assert "an API key is required" in dom and MODEL not in cells(dom)
        assert "not known" in shown(f"{locked}/#key=other", tmp_path)
        assert MODEL in cells(shown(f"{locked}/#key={KEY}", tmp_path))
