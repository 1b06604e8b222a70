"""A model directory -> a model.

Every tensor is accounted for: what a checkpoint lacks, or has too much, is an error that lists
it. Weights stay lazy until they are in place, so the peak is the model and one layer's transient.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlxkv.base import device
from mlxkv.base.stepwise import finished
from mlxkv.base.units import human_bytes
from mlxkv.checkpoint.config import read_config, text_config, with_next_token, with_towers
from mlxkv.checkpoint.quantization import Format, Quantization
from mlxkv.checkpoint.tensor_names import towers_in
from mlxkv.checkpoint.weights import Weights, open_weights, skipped_text
from mlxkv.errors import Hint, OutOfMemory
from mlxkv.models import Family, family_for
from mlxkv.models.beside import Beside, assistant_beside
from mlxkv.models.copies import with_own_head, with_own_next_token
from mlxkv.models.dtypes import (
    checkpoint_dtype,
    compute_dtype,
    in_dtype,
    scale_dtypes,
    without_float16,
)
from mlxkv.models.fitting import check_names, pack_modules
from mlxkv.models.late import EncoderWeights, stamps_of
from mlxkv.models.reading import Reading
from mlxkv.nn.encoders import Waiting, encoder_of, placeholder
from mlxkv.nn.kernels import Settled, settle
from mlxkv.nn.layers import Prepared
from mlxkv.nn.linear import Embedding, QuantizedEmbedding
from mlxkv.nn.model import CausalLM

if TYPE_CHECKING:
    from mlxkv.models.adapter_targets import Weighted


_log = logging.getLogger("mlxkv")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a model directory says before a weight is read.

    Args:
        raw: config.json.
        source: its path, for errors.
        family: who defines the model.
        config: the family's view of `raw`.
        weights: headers of all tensors.
        skipped: tensors that are left out on purpose, such as a vision tower's.
        beside: formats of what lies beside it, by module path.
    """

    raw: Mapping[str, Any]
    source: str
    family: Family
    config: Any
    weights: Weights
    skipped: Sequence[str]
    beside: Mapping[str, Format | None] = dataclasses.field(default_factory=dict)

    @property
    def dtype(self) -> mx.Dtype:
        """What it was made for."""
        return checkpoint_dtype(self.raw, self.weights)


@dataclass(frozen=True, slots=True)
class Layout:
    """A model and the lazy weights that belong into it: nothing of either is in memory yet.

    Args:
        checkpoint: what it is of.
        model: built and packed, with placeholder weights.
        weights: by name, in the dtype they will be computed in.
        dtype: what is computed in.
    """

    checkpoint: Checkpoint
    model: CausalLM
    weights: dict[str, mx.array]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        """Bytes that the weights will take, without those of encoders."""
        return sum(x.nbytes for name, x in self.weights.items() if encoder_of(name) is None)

    @property
    def encoder_bytes(self) -> dict[str, int]:
        """Kind of media -> bytes that the weights of its encoder will take."""
        found: dict[str, int] = {}
        for name, array in self.weights.items():
            if (kind := encoder_of(name)) is not None:
                found[kind] = found.get(kind, 0) + array.nbytes
        return found

    def have_encoders_wait(self, path: Path) -> None:
        """Leave the weights of encoders in the files until they are needed."""
        if not (n_bytes := self.encoder_bytes):
            return
        at = self.checkpoint
        stamps = stamps_of(at.weights)
        later = EncoderWeights(path, at.family, at.config, self.dtype, stamps)
        self.model.waiting = Waiting(n_bytes, later)
        for name, array in self.weights.items():
            if encoder_of(name) is not None:
                self.weights[name] = placeholder(array)

    def settle_dtype(self) -> None:
        """Tell the model what it computes in: packed weights, and those kept in 16 bits, do not
        show it."""
        self.model.compute_dtype = self.dtype
        for module in self.model.modules():
            if isinstance(module, Embedding | QuantizedEmbedding):
                module.compute_dtype = self.dtype


def open_checkpoint(
    path: Path, *, text_only: bool = False, guesses: bool = True
) -> tuple[Checkpoint, dict[str, mx.array]]:
    """Read a model directory's headers; with them its lazy weights, under the family's names.

    The model gets the towers and the next-token layer that both config.json and the weights have,
    and an assistant that lies beside it.

    Args:
        path: see `load_model`.
        text_only: leave the towers out.
        guesses: with what guesses the next tokens.

    Raises:
        As `load_model`.
    """
    raw = read_config(path)
    source = str(path / "config.json")
    family = family_for(raw, source)
    weights = open_weights(path)
    towers = frozenset() if text_only else towers_in(weights.infos)
    found = with_next_token(with_towers(raw, towers), weights.infos if guesses else ())
    config = family.config(found, source)
    kept, skipped = family.remap(weights.arrays(), config)
    beside = assistant_beside(path, config) if guesses else Beside()
    if beside.config is not None:
        config, kept = (
            dataclasses.replace(config, assistant=beside.config),
            {**kept, **beside.weights},
        )
    if family.embeds:
        from mlxkv.checkpoint.sentence import dense_weights, read_sentence, with_dense

        sentence = read_sentence(path, weights.infos, config.hidden_size)
        config = dataclasses.replace(config, sentence=sentence)
        dense = dense_weights(path, sentence, weights)
        weights, kept = with_dense(weights, dense), {**kept, **dense.arrays}
    return Checkpoint(raw, source, family, config, weights, skipped, beside.formats), kept


def lay_out(
    path: str | Path,
    dtype: mx.Dtype | str = "auto",
    *,
    headers_only: bool = False,
    text_only: bool = False,
    guesses: bool = True,
) -> Layout:
    """Find out what a model directory loads as; arguments and errors as for `load_model`.

    Args:
        path: see `load_model`.
        dtype: see `load_model`.
        headers_only: the files hold headers and no weights. A tied model's own head then counts:
            whether it is a copy, which loading drops, is known from the weights alone, and a
            sum must not come out smaller than what will be needed.
        text_only: leave encoders of pictures and sound out.
        guesses: with the next-token layer, or the assistant, that drafts (`--draft mtp`).
    """
    compute_dtype(dtype, mx.float32)
    path = Path(path)
    checkpoint, kept = open_checkpoint(path, text_only=text_only, guesses=guesses)
    if checkpoint.skipped:
        _log.info("%s: left out %s", path, skipped_text(checkpoint.skipped))
    config = with_own_head(checkpoint.config, kept, compare=not headers_only)
    config = with_own_next_token(config, kept, compare=not headers_only)
    with random_state_kept():
        model = checkpoint.family.build(config)
        root = model.weights_root()
        quantization = Quantization.from_config(text_config(checkpoint.raw), checkpoint.source)
        if checkpoint.beside:
            quantization = (quantization or Quantization()).adding(checkpoint.beside)
        pack_modules(root, kept, quantization, checkpoint.source)
    check_names(root, kept, path)
    target = without_float16(model, dtype, compute_dtype(dtype, checkpoint.dtype))
    if not model.mixes_dtypes and mx.float32 in scale_dtypes(kept, target).values():
        target = mx.float32
    return Layout(checkpoint, model, in_dtype(model, kept, target), target)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Put MLX's random state back: each weight that a module makes up, and checkpoints replace,
    draws from it lazily, and its graph of drawn keys grew with every load (50 KiB of 3 layers).
    """
    high, low = cast(Any, mx.random.state)[0].tolist()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)  # which is that key again


def load_model(
    path: str | Path, dtype: mx.Dtype | str = "auto", limit_bytes: int | None = None
) -> CausalLM:
    """Load a model without its tokenizer.

    Args:
        path: a directory with config.json and safetensors.
        dtype: what to compute in; "auto" is float32 on the CPU backend, else the checkpoint's.
        limit_bytes: what the weights may take; None for no limit.

    Returns:
        `model(tokens [B, L], caches=None) -> logits [B, L, V]`.

    Raises:
        ModelNotFound: no such directory.
        CheckpointError: the files are damaged or do not fit together (ConfigError, WeightsError,
            UnsupportedModel say how).
        OutOfMemory: the weights are over the limit; nothing of them was loaded.
    """
    return finished(loading(path, dtype, limit_bytes))


def loading(
    path: str | Path,
    dtype: mx.Dtype | str = "auto",
    limit_bytes: int | None = None,
    layout: Layout | None = None,
    *,
    encoders_wait: bool = False,
    adapters: Sequence[Weighted] = (),
    meanwhile: Callable[[], object] = lambda: None,
) -> Generator[None, None, CausalLM]:
    """`load_model` in steps, each of a block or of `reading.MOST_BYTES`.

    Args:
        path: see `load_model`, and so for the next two.
        dtype: in which it is laid out.
        limit_bytes: for its weights.
        layout: what `lay_out` found already; its weights are taken out of it.
        encoders_wait: leave encoders on the disk until `CausalLM.load_encoder`.
        adapters: to add, see `adapters.attach`.
        meanwhile: called once, while weights are being read: for work that computes nothing.
    """
    if not device.can_compile():
        mx.disable_compile()
    layout = layout or lay_out(path, dtype)
    yield
    n_bytes = layout.nbytes + (0 if encoders_wait else sum(layout.encoder_bytes.values()))
    _check_process(path, n_bytes)
    _check_limit(path, n_bytes, limit_bytes)
    device.core_streams()  # with what OpenBLAS needs for them, while it can be refused
    model = layout.model
    if encoders_wait:
        layout.have_encoders_wait(Path(path))
    model.weights_root().update(tree_unflatten(list(layout.weights.items())))
    # A lazy array keeps what it is made of alive: only the model may hold them from here on.
    layout.weights.clear()
    layout.settle_dtype()
    model.eval()
    yield from _settling(model, meanwhile)
    if adapters:
        from mlxkv.models.adapters import adapted_bytes, attach

        added = attach(model, layout.checkpoint.family, adapters)
        _check_limit(path, n_bytes + adapted_bytes(model), limit_bytes)
        for module in added:
            mx.eval(module.parameters())
            if isinstance(module, Settled):
                module.settle()
    return model


def _check_limit(path: str | Path, n_bytes: int, limit_bytes: int | None) -> None:
    if limit_bytes is not None and n_bytes > limit_bytes:
        raise OutOfMemory(
            f"{path}: its weights take {human_bytes(n_bytes)} and the limit is "
            f"{human_bytes(limit_bytes)}: quantize the model (see `mlxkv convert`), or allow more",
            hints=[Hint("memory", f"{-(-n_bytes // 2**20)}MiB", "holds the weights")],
        )


def _check_process(path: str | Path, n_bytes: int) -> None:
    """Raise OutOfMemory where a limit of the process, a container's for one, is too small."""
    tight, allowed = device.tightest(), device.process_allows()
    if tight is None or allowed is None:
        return
    free = max(0, allowed - mx.get_active_memory())
    if n_bytes > free:
        raise OutOfMemory(
            f"{path}: its weights take {human_bytes(n_bytes)}, and {tight} leaves "
            f"{human_bytes(free)} for them: raise it, or quantize the model (see `mlxkv convert`)"
        )


def _settling(model: CausalLM, meanwhile: Callable[[], object]) -> Iterator[None]:
    """Bring the weights into memory, and find what computes with them."""
    reading = Reading()
    yield from _read(model, reading)
    meanwhile()
    reading.finish()
    settle(model)
    mx.clear_cache()


def _read(model: CausalLM, reading: Reading) -> Iterator[None]:
    """Begin to read the weights, block by block so that fused copies are those of few."""
    # No list of all modules: it would keep the parts of a fused projection alive to the end.
    blocks = [(at, m) for at, m in model.named_modules() if isinstance(m, Prepared)]
    begun = set[int]()
    for at, module in blocks:
        if (kind := encoder_of(at)) is not None and model.waiting_bytes(kind):
            continue
        module.prepare()
        arrays = [cast(mx.array, x) for _, x in tree_flatten(module.parameters())]
        begun.update(map(id, arrays))
        reading.add(arrays, copied=True)
        yield
    others = [cast(mx.array, x) for _, x in tree_flatten(model.parameters()) if id(x) not in begun]
    for array in sorted(others, key=lambda x: x.nbytes):  # the largest is not waited for
        if reading.add([array], copied=False):
            yield
