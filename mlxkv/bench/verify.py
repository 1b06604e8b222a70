"""The checks of `mlxkv verify`: one prompt computed on every path that mlxkv has.

The reference is a cold run in one process: nothing restored, the device's own chunks. Every other
path gets the reference's greedy answer, and its distribution at each position is compared with the
reference's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkv.base.device import default_chunk
from mlxkv.bench.cases import prompts
from mlxkv.errors import UsageError
from mlxkv.generation.decoder import Row as DecoderRow
from mlxkv.generation.decoder import decode
from mlxkv.generation.session import Session
from mlxkv.kv.types import AUTO, KV_TYPES, STEP, ceil_step, layer_types
from mlxkv.llm.llm import LLM
from mlxkv.nn.model import model_windows
from mlxkv.prefix.open import open_pages
from mlxkv.prefix.pages import Pages
from mlxkv.sampling.params import SamplingParams
from mlxkv.sampling.sampler import Sampler
from mlxkv.terminal.console import table

N_ANSWER = 24
"""Tokens of the answer that every path is compared on."""
N_REWOUND = 40
TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}
"""KL divergence in nats that the order of sums explains, by compute dtype."""
FORMAT_TOLERANCE = {"native": 0.0, "q8": 5e-3, "k8v4": 5e-2, "q4": 0.3}
"""What quantized KV adds to that: a sum in another order may round to another code."""
QUANTIZED_TOLERANCE = {"native": 0.0, "q8": 5e-2, "k8v4": 0.7, "q4": 1.0}
"""KL divergence that a format itself may cost against native KV."""


@dataclass(frozen=True, slots=True)
class Row:
    """One path's result.

    Args:
        restored: tokens of the prompt that were not computed.
        n_tokens: tokens of the answer that were compared.
        n_same: positions with the reference's likeliest token.
        kl_max: the largest KL divergence from the reference over all positions, in nats.
        tolerance: the largest allowed.
        note: another failure; "" for none.
    """

    path: str
    kv_type: str
    restored: int
    n_tokens: int
    n_same: int
    kl_max: float
    tolerance: float
    note: str = ""

    @property
    def verdict(self) -> str:
        """`exact`: bit for bit; `ok`: within the tolerance; else `FAILED`."""
        if self.note or not self.kl_max <= self.tolerance:
            return "FAILED"
        return "exact" if self.kl_max == 0 else "ok"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` found: `window` is the largest sliding window, `rows` has one for each path."""

    model: str
    dtype: str
    n_prompt: int
    window: int | None
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether no path failed."""
        return all(row.verdict != "FAILED" for row in self.rows)


def verify(llm: LLM, n_tokens: int | None = None, kv_types: Sequence[str] = ()) -> VerifyReport:
    """Compare all ways to compute a prompt.

    Args:
        n_tokens: length of the prompt; None for one that wraps every window twice.
        kv_types: KV types to check; none for all formats, and the model's own if it is by layer.

    Raises:
        UsageError: `n_tokens` is below two pages or longer than the context allows, or the model
            makes vectors.
    """
    llm.must_write()
    own = () if llm.kv_type == AUTO else (llm.kv_type,)
    kv_types = kv_types or tuple(dict.fromkeys((*KV_TYPES, *own)))
    prompt = _prompt(llm, n_tokens)
    reference = _Reference(llm, prompt, "native")
    rows = [row for kv_type in kv_types for row in _rows(reference, kv_type)]
    return VerifyReport(str(llm.path), reference.dtype, len(prompt), _window(llm), tuple(rows))


def _most(tolerance: Mapping[str, float], kv_type: str) -> float:
    """The largest tolerance of the formats that a KV type has in its layers."""
    return max(tolerance[name] for name in layer_types(kv_type).names)


def _window(llm: LLM) -> int | None:
    """The largest sliding window."""
    return max((w for w in model_windows(llm.model.cache_specs()) if w), default=None)


def _prompt(llm: LLM, n_tokens: int | None) -> list[int]:
    longest = llm.context - N_ANSWER - N_REWOUND - 1
    if longest <= 2 * STEP:
        least = 2 * STEP + 1 + llm.context - longest
        raise UsageError(f"verify needs a context of {least:,} tokens or more; got {llm.context:,}")
    # Past the second wrap, and one token past a page: if chunks are pages, a restored prompt
    # continues in the reference's own chunks, and must be equal bit for bit.
    wanted = n_tokens
    if wanted is None:
        wanted = min(2 * ceil_step(max(STEP, _window(llm) or 0)) + 2 * STEP + 1, longest)
    if not 2 * STEP < wanted <= longest:
        raise UsageError(
            f"must be {2 * STEP + 1:,} to {longest:,} for this model; got {wanted:,}",
            field="tokens",
        )
    return prompts(llm.tokenizer, wanted, 1)[0]


class _Reference:
    """A cold run: its distribution at each position of the answer.

    Args:
        answer: tokens to feed after the prompt; None for the likeliest.
    """

    def __init__(
        self, llm: LLM, prompt: list[int], kv_type: str, answer: Sequence[int] | None = None
    ):
        self.llm, self.prompt, self.kv_type = llm, prompt, kv_type
        self.dtype = str(llm.model.compute_dtype).rpartition(".")[2]
        session = Session(llm.model, kv_type)
        logits = session.prefill(prompt)
        self.answer: list[int] = []
        self.log_p: list[np.ndarray] = []
        for i in range(N_ANSWER):
            self.log_p.append(_log_softmax(logits))
            likeliest = int(self.log_p[-1].argmax())
            self.answer.append(likeliest if answer is None else answer[i])
            logits = llm.model.last_logits(mx.array([self.answer[-1:]]), session.caches)

    def row(
        self, path: str, session: Session, logits: mx.array, restored: int, note: str = ""
    ) -> Row:
        """Feed a path the answer and compare."""
        log_p = []
        for token in self.answer:
            log_p.append(_log_softmax(logits))
            logits = self.llm.model.last_logits(mx.array([[token]]), session.caches)
        tolerance = TOLERANCE[self.dtype] + _most(FORMAT_TOLERANCE, self.kv_type)
        return self.compared(path, self.kv_type, log_p, tolerance, restored, note)

    def compared(
        self,
        path: str,
        kv_type: str,
        log_p: Sequence[np.ndarray],
        tolerance: float,
        restored: int = 0,
        note: str = "",
    ) -> Row:
        """Compare a path's distributions with this run's."""
        pairs = list(zip(self.log_p, log_p, strict=True))
        n_same = sum(int(p.argmax() == q.argmax()) for p, q in pairs)
        kl = 0.0
        for p, q in pairs:
            kl = float(np.maximum(kl, _divergence(p, q)))  # keeps a NaN
        return Row(path, kv_type, restored, len(pairs), n_same, kl, tolerance, note)


def _rows(native: _Reference, kv_type: str) -> Iterator[Row]:
    """Every path of one KV format: the cold run against native KV, the others against that run."""
    llm, prompt = native.llm, native.prompt
    model = llm.model
    reference = native
    if kv_type == "native":
        again = _Reference(llm, prompt, kv_type, native.answer)
        yield native.compared("cold", kv_type, again.log_p, TOLERANCE[native.dtype])
    else:
        reference = _Reference(llm, prompt, kv_type, native.answer)
        tolerance = _most(QUANTIZED_TOLERANCE, kv_type)
        yield native.compared("cold, beside native", kv_type, reference.log_p, tolerance)

    def computed(path: str, chunk: int | None) -> Row:
        session = Session(model, kv_type)
        return reference.row(path, session, session.prefill(prompt, chunk=chunk), 0)

    for chunk in (77, STEP, 1024):
        if chunk != default_chunk():
            yield computed(f"chunks of {chunk}", chunk)
    yield _rewound(reference, kv_type, None)
    with tempfile.TemporaryDirectory() as folder:

        def pages_on_disk() -> Pages | None:
            return open_pages(model, llm.path, kv_type, 1 << 40, Path(folder))

        pages = pages_on_disk()
        if pages is None:
            return
        session = Session(model, kv_type, pages)
        session.prefill(prompt)
        session.finish()
        yield _restored(reference, kv_type, "warm, from RAM", pages)
        yield _rewound(reference, kv_type, pages)
        if pages.disk is None:
            return
        pages.close()
        again = pages_on_disk()
        assert again is not None
        yield _restored(reference, kv_type, "after a restart, from SSD", again, from_ssd=True)
        again.close()


def _restored(
    reference: _Reference, kv_type: str, path: str, pages: Pages, from_ssd: bool = False
) -> Row:
    session = Session(reference.llm.model, kv_type, pages)
    known = session.restore(reference.prompt)
    expected = len(reference.prompt) - 1
    note = ""
    if known.n_tokens < expected:
        note = f"{known.n_tokens:,} of {expected:,} tokens came back"
    elif from_ssd and known.ssd_tokens < expected:
        note = "not read from disk: MLXKV_KV_DISK, or a full disk"
    return reference.row(path, session, session.prefill(reference.prompt), known.n_tokens, note)


def _rewound(reference: _Reference, kv_type: str, pages: Pages | None) -> Row:
    """Go past the prompt by some other tokens, and back.

    Without pages the tokens are one chunk, which every cache can rewind; with pages they are
    decoded one by one, which a window that has wrapped cannot rewind.
    """
    session = Session(reference.llm.model, kv_type, pages)
    prompt = reference.prompt
    if pages is None:
        session.prefill(prompt + prompt[:N_REWOUND])
    else:
        session.restore(prompt)
        sampler = Sampler(SamplingParams(temperature=0), reference.llm.config.vocab_size)
        for _ in decode(DecoderRow(session, session.prefill(prompt), sampler, N_REWOUND)):
            pass
    known = session.restore(prompt)
    path = "after a rewind" if pages is None else "back from an answer"
    return reference.row(path, session, session.prefill(prompt), known.n_tokens)


def _log_softmax(logits: mx.array) -> np.ndarray:
    """float64 log-probabilities `[V]` of logits `[1, V]`."""
    x = np.array(logits[0].astype(mx.float32)).astype(np.float64)
    x -= x.max()
    return x - np.log(np.exp(x).sum())


def _divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q) in nats of log-probabilities; 0 only for the same ones."""
    if np.array_equal(p, q):
        return 0.0
    # Rounding may make a tiny sum negative.
    return float(np.maximum((np.exp(p) * (p - q)).sum(), np.finfo(np.float64).tiny))


def to_dict(report: VerifyReport) -> dict[str, Any]:
    """A report as JSON has it."""
    rows = [asdict(row) | {"verdict": row.verdict} for row in report.rows]
    return asdict(report) | {"rows": rows, "passed": report.passed}


def text(report: VerifyReport) -> str:
    """A report as a table with a verdict."""
    rows = [
        (
            row.path,
            row.kv_type,
            f"{row.restored:,}",
            f"{row.n_same} of {row.n_tokens}",
            f"{row.kl_max:.1e}" if row.kl_max else "0",
            f"{row.tolerance:.0e}",
            row.verdict + (f": {row.note}" if row.note else ""),
        )
        for row in report.rows
    ]
    header = ("PATH", "KV", "RESTORED", "SAME TOKENS", "KL MAX", "ALLOWED", "VERDICT")
    window = f"windows of {report.window:,}" if report.window else "no windows"
    n_failed = sum(row.verdict == "FAILED" for row in report.rows)
    verdict = f"{n_failed} of {len(rows)} paths FAILED" if n_failed else "all paths agree"
    head = f"{report.model}, {report.dtype}, {report.n_prompt:,} tokens, {window}"
    listed = table(header, rows, right=("RESTORED", "SAME TOKENS", "KL MAX", "ALLOWED"))
    return f"{head}\n\n{listed}\n\n{verdict}"
