"""The caches of one sequence, and how many tokens they hold: what `Session` is built on."""

from __future__ import annotations

from mlxkv.cache import make_caches
from mlxkv.generation.prefill import Listener
from mlxkv.kv.layout import Cache
from mlxkv.memory.figures import kv_use
from mlxkv.memory.types import KVUse
from mlxkv.nn.model import CausalLM


class Held:
    """See the module, and `session.Session`.

    Args:
        model: the model.
        kv_type: format of the KV that its caches begin in.
    """

    def __init__(self, model: CausalLM, kv_type: str):
        self.model = model
        self.kv_type = self._first_type = kv_type
        self.caches: list[Cache] = make_caches(model, kv_type)
        self._known = list[int]()
        self.listener: Listener | None = None

    def reset(self) -> None:
        """Forget everything."""
        raise NotImplementedError

    @property
    def tokens(self) -> list[int]:
        """The tokens whose KV is held."""
        return self._known[: self._settle()]

    @property
    def n_held(self) -> int:
        """Tokens that all caches hold: those of the last layers come last (`lifting`)."""
        return self.caches[-1].offset if self.caches else 0

    @property
    def nbytes(self) -> int:
        """Bytes that the caches take."""
        return sum(cache.nbytes for cache in self._all)

    @property
    def _all(self) -> list[Cache]:
        """Its caches, and its listener's."""
        return self.caches if self.listener is None else [*self.caches, *self.listener.caches]

    def use(self) -> KVUse:
        """What of the caches is used."""
        return kv_use(self._all)

    def _settle(self) -> int:
        """Tokens that every cache holds: an interrupt may have come between two layers."""
        offsets = {cache.offset for cache in self.caches}
        n = min(len(self._known), *offsets)
        return n if offsets <= {n} or self._rewind(n) else 0

    def _rewind(self, offset: int) -> bool:
        """Take all caches back; where one cannot, all start again."""
        if not (done := all(cache.rewind(offset) for cache in self.caches)):
            self.reset()
        return done
