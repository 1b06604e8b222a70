"""How a failure to get memory looks, by the texts that MLX raises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlxkv
from mlxkv.engine.scheduler import Scheduler
from mlxkv.engine.tasks import Task
from mlxkv.generation.decoder import Decoder, RowResult
from mlxkv.generation.outputs import Chunk
from mlxkv.generation.request import Request
from mlxkv.memory.types import is_allocation_failure
from tests.support.command_line import chat_model

PROMPT = "".join(chr(97 + i * i % 23) for i in range(300))

FAILED = "[METAL] Command buffer execution failed: "
OUT_OF_MEMORY = (
    f"{FAILED}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."
)
NO_MEMORY = [
    "[malloc] Unable to allocate 4096 bytes.",
    "[malloc_or_wait] Unable to allocate 17179869184 bytes.",
    "[metal::malloc] Attempting to allocate 15032385536 bytes which is greater than the maximum "
    "allowed buffer size of 9534832640 bytes.",
    "[metal::malloc] Resource limit (499000) exceeded.",
    OUT_OF_MEMORY,
    f"{FAILED}Nicht genügend Speicher (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).",
    "cudaMallocAsync(&data, size, stream) failed: out of memory",
    "cudaMallocManaged(&data, size) failed: out of memory",
    "cudaGraphInstantiate(&exec, graph) failed: out of memory",
    "cublasLtCreate(&handle) failed with code: 3.",
]
OTHERS = [
    f"{FAILED}Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout).",
    f"{FAILED}Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang).",
    f"{FAILED}Ignored (for causing prior/excessive GPU errors) "
    "(00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored).",
    f"{FAILED}Discarded (victim of GPU error/recovery) "
    "(00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim).",
    f"{FAILED}Caused GPU Address Fault Error (0000000b:kIOGPUCommandBufferCallbackErrorPageFault).",
    f"{FAILED}Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity).",
    "[metal::Device] Unable to load kernel steel_gemm",
    "[metal::Device] Unable to construct residency set.",
    "[metal::set_wired_limit] Setting a wired limit larger than the maximum working set size is "
    "not allowed.",
    "[load_safetensors] Failed to open allocations.safetensors",
    "cudaMemcpyAsync(data, source, size, kind, stream) failed: an illegal memory access was "
    "encountered",
    "cublasLtMatmul(handle) failed with code: 13.",
    "fft failed with code: 3.",
    "no kernel",
]


@pytest.mark.parametrize("text", NO_MEMORY)
def test_what_mlx_says_where_there_is_no_memory_is_recognised(text):
    assert is_allocation_failure(RuntimeError(text))


@pytest.mark.parametrize("text", OTHERS)
def test_other_failures_are_not_taken_for_it(text):
    assert not is_allocation_failure(RuntimeError(text))


def test_pythons_own_error_is_recognised_and_no_other_type_is():
    assert is_allocation_failure(MemoryError())
    assert not is_allocation_failure(ValueError(NO_MEMORY[0]))


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return chat_model(tmp_path_factory.mktemp("memory") / "m", max_position_embeddings=2048)


def fails_once(function: Callable[..., Any], at: int, text: str) -> Callable[..., Any]:
    """A function whose call number `at` raises: the step was computed, and waiting for it fails."""
    n = 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal n
        n += 1
        if n == at:
            raise RuntimeError(text)
        return function(*arguments, **options)

    return call


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "drawn"])
def test_a_decode_step_without_memory_on_the_gpu_changes_no_answer(path, monkeypatch, sampling):
    llm = mlxkv.load(path, dtype="float32")
    expected = llm.generate(PROMPT, max_tokens=20, **sampling)
    monkeypatch.setattr(Decoder, "_deliver", fails_once(Decoder._deliver, 10, OUT_OF_MEMORY))
    result = llm.generate(PROMPT, max_tokens=20, draft="off", **sampling)
    assert result.tokens == expected.tokens
    assert "chunk" in [rung.kind for rung in result.stats.rungs]


def test_a_step_that_fails_behind_one_without_memory_is_not_wanted(path, monkeypatch):
    """Metal gives up what it had queued: the error waits for the next look at the device."""
    prompt = PROMPT[:40]  # without a page that could be restored
    expected = mlxkv.load(path, dtype="float32").generate(prompt, max_tokens=20).tokens
    llm, given = mlxkv.load(path, dtype="float32"), Decoder._deliver
    waited: list[list[RowResult]] = []
    pending: list[str] = []

    def fails_at_the_tenth(*arguments: Any, **options: Any) -> list[RowResult]:
        if len(waited) == 10:
            waited.append([])
            pending.append(OTHERS[3])
            raise RuntimeError(OUT_OF_MEMORY)
        waited.append(given(*arguments, **options))
        return waited[-1]

    def looking(function: Callable[..., None]) -> Callable[..., None]:
        def look(*arguments: Any) -> None:
            if pending:
                raise RuntimeError(pending.pop())
            function(*arguments)

        return look

    monkeypatch.setattr(Decoder, "_deliver", fails_at_the_tenth)
    for name in ("eval", "async_eval", "synchronize"):
        monkeypatch.setattr(mx, name, looking(getattr(mx, name)))
    assert llm.generate(prompt, max_tokens=20).tokens == expected
    assert not pending and len(waited) > 10


def test_a_batch_without_memory_on_the_gpu_changes_no_answer(path, monkeypatch):
    llm = mlxkv.load(path, dtype="float32")
    prompts = [PROMPT[:200], PROMPT[50:]]
    expected = [llm.generate(prompt, max_tokens=20).tokens for prompt in prompts]
    monkeypatch.setattr(Decoder, "_deliver", fails_once(Decoder._deliver, 9, OUT_OF_MEMORY))
    served = Scheduler(llm, 16)
    told: list[list[Any]] = [[], []]
    for prompt, items in zip(prompts, told, strict=True):
        request = Request.of(prompt, max_tokens=20, draft="off")
        served.add(Task(request, items.append, bool))
    while not served.is_idle:
        served.step()
    for items, tokens in zip(told, expected, strict=True):
        chunks = [item for item in items if isinstance(item, Chunk)]
        assert [chunk.token for chunk in chunks if chunk.token is not None] == tokens
        assert "chunk" in [rung.kind for rung in chunks[-1].stats.rungs]
    served.stop()
    llm.close()


def test_a_gpu_that_hangs_is_no_lack_of_memory(path, monkeypatch):
    llm = mlxkv.load(path, dtype="float32")
    monkeypatch.setattr(Decoder, "_deliver", fails_once(Decoder._deliver, 10, OTHERS[1]))
    with pytest.raises(RuntimeError, match="Hang"):
        llm.generate(PROMPT, max_tokens=20)
